"""The operator that scores pairs."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import fiftyone as fo
import fiftyone.operators as foo
import fiftyone.operators.types as types

from fiftyone_ecif.errors import EcifError

from .forms import blocked, dropdown, looks_like_a_path, menu_button, model_names, refuse, unusable, warning

logger = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {
    "caption_field": "caption",
    "model": "ViT-B-32",
    "pretrained": "",
    "brain_key": "ecif",
    "overwrite": False,
    "scope": "heads",
    "role": "exact",
    "solver": None,
    "damping": 0.0,
    "target_loss": "contrastive",
    "label_field": None,
    "n_partitions": 1,
    "scores": [],
    "keep_gradients": None,
    "fit": False,
    "proximal": 1.0,
    "batch_size": None,
    "seed": 0,
    "skip_failures": True,
    "device": None,
    "num_workers": None,
}

_METHOD = (
    *("scope", "role", "solver", "damping", "target_loss", "label_field", "n_partitions", "scores", "keep_gradients"),
    *("fit", "proximal", "batch_size", "seed"),
)
_SCOPES = {
    "heads": "Both final projections (seconds)",
    "heads+logit_scale": "Both final projections and the temperature",
    "lora": "Low-rank adapters on attention and MLP weights",
    "blocks:1": "The last block of both towers",
}


class ComputeInfluence(foo.Operator):
    """Writes the influence of every pair on a validation view."""

    @property
    def config(self) -> foo.OperatorConfig:
        return foo.OperatorConfig(
            name="compute_influence",
            label="Compute ECIF influence",
            description="Which image-caption pairs help a model on a validation view, and which hurt",
            icon="insights",
            dynamic=True,
            execute_as_generator=True,
            allow_immediate_execution=True,
            allow_delegated_execution=True,
            risk_level="medium",
        )

    def resolve_placement(self, ctx: Any) -> types.Placement:
        return menu_button("Compute ECIF influence", "insights")

    def resolve_input(self, ctx: Any) -> types.Property:
        inputs = types.Object()
        if unusable(inputs, ctx) or not _what_to_score(inputs, ctx):
            return types.Property(inputs, view=types.View(label="Compute ECIF influence"))
        _what_model(inputs, ctx)
        _under_which_key(inputs, ctx)
        _how(inputs, ctx)
        return types.Property(inputs, view=types.View(label="Compute ECIF influence"))

    def resolve_run_name(self, ctx: Any) -> str:
        return f"ECIF influence {ctx.params.get('brain_key', _DEFAULTS['brain_key'])}"

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Runs the job, reporting progress and failures in a way that the App shows."""
        try:
            yield from _score(ctx)
        except Exception as error:  # an exception inside a generator would never reach the user
            if ctx.delegated:
                raise
            message = str(error)
            if not isinstance(error, EcifError):
                logger.exception("compute_influence failed")
                message = f"{type(error).__name__}: {error}"
            yield ctx.ops.set_progress(label=f"Failed: {message}", progress=1)
            yield ctx.ops.notify(message, variant="error")

    def __call__(self, samples: Any, target: str, delegate: bool = False, **options: Any) -> Any:
        """Scores a dataset or view; ``target`` is ``"tag: NAME"`` or ``"saved view: NAME"``.

        The other options are those of :func:`fiftyone_ecif.compute_influence`, and
        so are the errors.
        """
        params = {"target": target, **_DEFAULTS, **options}
        params = {name: value for name, value in params.items() if value is not None}
        result = foo.execute_operator(
            self.uri, {"view": samples.view(), "dataset": samples._dataset}, params=params, request_delegation=delegate
        )
        for request in result.executor.to_json()["requests"]:
            if request["operator_uri"] == "notify" and request["params"]["variant"] == "error":
                raise EcifError(request["params"]["message"])
        return result


def _what_to_score(inputs: Any, ctx: Any) -> bool:
    """Asks for pairs, captions and target; says whether the dataset has what it takes."""
    from fiftyone_ecif.samples import caption_fields, check_collection

    inputs.view_target(ctx, action_description="Score")
    fields = caption_fields(ctx.dataset)
    if not fields:
        blocked(inputs, "no_captions", "This dataset has no string field that could hold captions")
        return False
    field = ctx.params.get("caption_field")
    choice = dropdown(
        inputs,
        "caption_field",
        fields,
        _DEFAULTS["caption_field"],
        label="Caption field",
        description="The text of each pair",
    )
    samples = ctx.target_view()
    if field:
        try:
            check_collection(samples, field)
        except EcifError as error:
            refuse(choice, str(error))

    targets = [f"tag: {tag}" for tag in ctx.dataset.distinct("tags")]
    targets += [f"saved view: {name}" for name in ctx.dataset.list_saved_views()]
    if not targets:
        blocked(inputs, "no_target", "Tag some validation pairs, or save a view of them: influence needs a target")
        return False
    target = dropdown(
        inputs,
        "target",
        targets,
        "tag: val",
        label="Validation pairs",
        description="Influence is measured on the loss of these pairs",
    )
    chosen = ctx.params.get("target")
    if chosen in targets:
        aims = _target_view(ctx.dataset, chosen)
        if len(aims) < 2:
            refuse(target, f"The target needs at least 2 pairs, it has {len(aims)}")
        shared = len(set(samples.values("id")) & set(aims.values("id")))
        inputs.view(
            "counts",
            types.Notice(label=f"{len(samples):,} pairs will be scored towards {len(aims):,} validation pairs"),
        )
        if shared:
            warning(
                inputs,
                "shared",
                f"{shared:,} validation pairs are also scored. Show only training pairs to keep them apart",
            )
    return True


def _what_model(inputs: Any, ctx: Any) -> None:
    names = model_names()
    view = types.AutocompleteView(allow_user_input=True)
    for name in names:
        view.add_choice(name, label=name)
    model = inputs.str(
        "model",
        required=True,
        default=_DEFAULTS["model"],
        label="Model",
        description="An open_clip model name",
        view=view,
    )
    name = ctx.params.get("model") or ""
    brings_weights = ":" in name
    if name and not brings_weights and name not in names:
        refuse(model, f"open_clip has no model {name!r}")
    pretrained = inputs.str(
        "pretrained",
        required=not brings_weights,
        label="Pretrained",
        description="A pretrained tag of the model, or the path of a checkpoint",
    )
    weights = ctx.params.get("pretrained") or ""
    if looks_like_a_path(weights) and not Path(weights).is_file():
        refuse(pretrained, f"There is no file {weights}")


def _under_which_key(inputs: Any, ctx: Any) -> None:
    from fiftyone_ecif.runs import InfluenceConfig, check_key

    key = inputs.str(
        "brain_key",
        required=True,
        default=_DEFAULTS["brain_key"],
        label="Key",
        description="Names the run and its fields: KEY_influence, KEY_positive, KEY_negative",
    )
    name = ctx.params.get("brain_key")
    if not name:
        return
    if ctx.dataset.has_brain_run(name):
        inputs.bool("overwrite", default=False, label=f"Replace the run {name!r}", view=types.CheckboxView())
    try:
        check_key(ctx.dataset, name, bool(ctx.params.get("overwrite")), InfluenceConfig())
    except EcifError as error:
        refuse(key, str(error))


def _how(inputs: Any, ctx: Any) -> None:
    inputs.bool(
        "fit",
        default=_DEFAULTS["fit"],
        label="Fit the heads first",
        description="Brings both projections to a stationary point on these pairs, in memory: influence presumes one",
        view=types.CheckboxView(),
    )
    _what_loss(inputs, ctx)
    inputs.bool("advanced", default=False, label="Advanced settings", view=types.SwitchView())
    if not ctx.params.get("advanced"):
        return
    scope = types.AutocompleteView(allow_user_input=True)
    for name, label in _SCOPES.items():
        scope.add_choice(name, label=label)
    inputs.str(
        "scope",
        default=_DEFAULTS["scope"],
        label="Scope",
        description="The parameters to attribute; also lora:RANK:BLOCKS, blocks:K or a regular expression",
        view=scope,
    )
    inputs.int(
        "n_partitions",
        default=_DEFAULTS["n_partitions"],
        min=1,
        label="Partitions",
        description="Random partitions into batches to average over; more than one gives a standard error",
    )
    proximal = inputs.float(
        "proximal",
        default=_DEFAULTS["proximal"],
        label="Proximal strength",
        description="Pull to the loaded weights, and the damping of the Hessian",
    )
    if not (ctx.params.get("proximal") or _DEFAULTS["proximal"]) > 0:
        refuse(proximal, "Must be a positive number")
    batch_size = inputs.int(
        "batch_size", label="Batch size", description="Pairs that compete in one softmax; 256 if left empty"
    )
    if ctx.params.get("batch_size") is not None and ctx.params["batch_size"] < 2:
        refuse(batch_size, "Use at least 2")
    inputs.int("seed", default=_DEFAULTS["seed"], label="Seed", description="Which pairs share a batch")
    inputs.str("device", label="Device", description="cpu or cuda; a GPU where there is one if left empty")
    inputs.bool(
        "skip_failures",
        default=_DEFAULTS["skip_failures"],
        label="Skip samples that cannot be scored",
        view=types.CheckboxView(),
    )


def _what_loss(inputs: Any, ctx: Any) -> None:
    from fiftyone_ecif.choices import TARGET_LOSSES

    labels = [
        name
        for name, field in ctx.dataset.get_field_schema().items()
        if getattr(field, "document_type", None) is fo.Classification
        or (isinstance(field, fo.StringField) and name not in ("filepath", ctx.params.get("caption_field")))
    ]
    choices = [name for name in TARGET_LOSSES if labels or name != "zero_shot"]
    dropdown(inputs, "target_loss", choices, _DEFAULTS["target_loss"], label="Target loss")
    if ctx.params.get("target_loss") == "zero_shot":
        dropdown(inputs, "label_field", labels, label="Classes", description="The field of the classes to tell apart")


def _target_view(dataset: Any, target: str) -> Any:
    kind, _, name = target.partition(": ")
    if kind == "tag":
        return dataset.match_tags(name)
    if kind == "saved view" and dataset.has_saved_view(name):
        return dataset.load_saved_view(name)
    raise EcifError(f"target={target!r} is neither 'tag: NAME' nor 'saved view: NAME' of this dataset")


def _score(ctx: Any) -> Iterator[Any]:
    yield _report(ctx, "Starting", 0.0)

    from fiftyone_ecif.api import influence_steps
    from fiftyone_ecif.runs import InfluenceConfig

    params = _DEFAULTS | {name: value for name, value in ctx.params.items() if value is not None}
    samples = ctx.target_view()
    if len(samples) == 0:
        raise EcifError("No samples are selected")
    work = influence_steps(
        samples,
        _target_view(ctx.dataset, ctx.params["target"]),
        InfluenceConfig(
            caption_field=params["caption_field"],
            model=params["model"],
            pretrained=params["pretrained"] or None,
            **{name: params[name] for name in _METHOD},
        ),
        brain_key=params["brain_key"],
        device=params["device"] or None,
        num_workers=params["num_workers"] if ctx.delegated else 0,  # the App's server must not fork
        skip_failures=params["skip_failures"],
        overwrite=params["overwrite"],
    )
    results = yield from _with_progress(ctx, work)

    key = params["brain_key"]
    done = f"Scored {len(results.ids):,} pairs, skipped {len(results.skipped):,}"
    yield _report(ctx, done, 1.0)
    if not ctx.delegated:
        field = f"{key}_influence"
        yield ctx.ops.reload_dataset()
        shown = [*ctx.active_fields, params["caption_field"], field, f"{key}_rank"]
        yield ctx.ops.set_active_fields(list(dict.fromkeys(shown)))
        yield ctx.ops.set_view(view=samples.exists(field).sort_by(field))
        yield ctx.ops.notify(f"{done}. The most harmful come first", variant="success")


def _with_progress(ctx: Any, work: Any) -> Generator[Any, None, Any]:
    """Shows the job's progress, at most twice a second, with rate and remaining time."""
    stage, since, last, overall = None, 0.0, 0.0, 0.0
    try:
        while True:
            step = next(work)
            now = time.monotonic()
            if step.stage != stage:
                stage, since = step.stage, now
            elif now - last < 0.5 and step.done < step.total:
                continue
            last = now
            label = f"{step.stage}: {step.done:,} of {step.total:,}" if step.total > 1 else step.stage
            if step.done and step.total > 1 and now > since:
                rate = step.done / (now - since)
                label += f" ({rate:,.0f} a second, {(step.total - step.done) / rate:,.0f} s left)"
            overall = max(overall, step.overall)  # a solve can start again
            yield _report(ctx, label, overall)
    except StopIteration as end:
        return end.value
    finally:
        work.close()


def _report(ctx: Any, label: str, progress: float) -> Any:
    if ctx.delegated:
        ctx.set_progress(progress=progress, label=label)
        return None
    return ctx.ops.set_progress(label=label, progress=progress)
