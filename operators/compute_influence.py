"""The operator that scores pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fiftyone as fo
import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings

from .base import JobOperator
from .estimates import Plan, estimate
from .forms import advanced, ask_background, ask_option, dropdown, is_from_form, refuse
from .jobs import Job, call, report, show, with_progress
from .memory import entered_before, wish
from .model_input import ask_embeddings, ask_fit_and_batches, ask_model, chosen
from .name_input import ask_key
from .pairs_input import ask_pairs, pairs_to_act_on
from .target_input import ask_split, split

_DEFAULTS = {**InfluenceSettings.defaults(), **JobSettings.defaults(), "brain_key": "ecif", "pretrained": ""}
_SCOPES = ("heads", "heads+logit_scale", "lora:4", "blocks:1")


class ComputeInfluence(JobOperator):
    """Writes the influence of every pair on a validation view."""

    identifier = "compute_influence"
    title = "Compute ECIF influence"
    about = "Which image-caption pairs help a model on a validation view, and which hurt"
    icon = "insights"

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        from fiftyone_ecif.runs.influence import InfluenceConfig

        samples = ask_pairs(inputs, ctx)
        if samples is None:
            return
        counts = ask_split(inputs, ctx, samples)
        if counts is not None:
            said = f"{counts[0]:,} pairs will be scored towards {counts[1]:,} validation pairs"
            takes = estimate(_plan(_DEFAULTS | ctx.params, sum(counts)))
            inputs.view("counts", types.Notice(label=said, description=takes))
        if not ask_embeddings(inputs, ctx, InfluenceSettings):
            ask_model(inputs, ctx, _DEFAULTS["model"])
        described = "Names the run and its fields: KEY_influence, KEY_positive, KEY_negative"
        ask_key(inputs, ctx, _DEFAULTS["brain_key"], described, InfluenceConfig())
        _how(inputs, ctx, len(samples))
        ask_background(inputs)

    @override
    def resolve_run_name(self, ctx: Any) -> str:
        return f"ECIF influence, run {ctx.params.get('brain_key', _DEFAULTS['brain_key'])!r}"

    def work(self, ctx: Any, job: Job) -> Iterator[Any]:
        """Scores the pairs, and brings them to the grid."""
        from fiftyone_ecif.api.influence import influence_steps

        params = _DEFAULTS | {name: value for name, value in ctx.params.items() if value is not None}
        if is_from_form(ctx.params) and not _needs_labels(params["target_loss"]):
            params["label_field"] = None
        samples = pairs_to_act_on(ctx)
        if len(samples) == 0:
            raise EcifError("No samples are selected")
        samples, target = split(ctx, samples)
        plan = _plan(params, len(samples) + len(target))
        work = influence_steps(
            samples,
            target,
            *chosen(ctx, params, InfluenceSettings),
            params["brain_key"],
        )
        results = yield from with_progress(ctx, job, plan, work)

        key = params["brain_key"]
        done = f"Scored {len(results.ids):,} pairs, skipped {len(results.skipped):,}"
        yield report(ctx, done, 1.0)
        if not ctx.delegated:
            field = f"{key}_influence"
            yield from show(ctx, samples.exists(field).sort_by(field), params["caption_field"], f"{key}_rank")
            wish(ctx, key, "overview")
            yield ctx.ops.notify(f"{done}. The most harmful come first", variant="success")

    def __call__(self, samples: Any, target: str, delegate: bool = False, **options: Any) -> Any:
        """Scores a dataset or view; ``target`` is ``"tag: NAME"`` or ``"saved view: NAME"``.

        With ``target="hold out"``, ``held_out`` per cent of the pairs are drawn with
        ``held_out_seed``, tagged and left out. So are validation pairs that are among
        the samples, unless ``leave_out=False``. The other options are those of
        :func:`fiftyone_ecif.compute_influence`, and
        so are the errors.
        """
        return call(self.uri, samples, delegate, {"target": target, **_DEFAULTS, **options})


def _plan(params: dict[str, Any], pairs: int) -> Plan:
    kind = " ".join(map(str, ("influence", *(params.get(name) for name in ("model", "scope", "fit")))))
    partitions = params.get("n_partitions")
    return Plan(kind, pairs, params["model"], params["scope"], partitions if isinstance(partitions, int) else 1)


def _how(inputs: Any, ctx: Any, pairs: int) -> None:
    ask_option(inputs, ctx, InfluenceSettings, "fit", default=entered_before(ctx).get("fit", InfluenceSettings.fit))
    _what_loss(inputs, ctx)
    if not advanced(inputs, ctx):
        return
    _what_scope(inputs, ctx)
    for name in ("solver", "damping", "spare_equal", "n_partitions"):
        ask_option(inputs, ctx, InfluenceSettings, name)
    ask_fit_and_batches(inputs, ctx, InfluenceSettings, pairs)


def _what_scope(inputs: Any, ctx: Any) -> None:
    from fiftyone_ecif.influence.scope_choice import parse_scope

    view = types.AutocompleteView(allow_user_input=True)
    for name in _SCOPES:
        view.add_choice(name, label=name)
    scope = ask_option(inputs, ctx, InfluenceSettings, "scope", view=view)
    try:
        parse_scope(ctx.params.get("scope") or _DEFAULTS["scope"])
    except EcifError as error:
        refuse(scope, str(error))


def _what_loss(inputs: Any, ctx: Any) -> None:
    labels = [
        name
        for name, field in ctx.dataset.get_field_schema().items()
        if getattr(field, "document_type", None) is fo.Classification
        or (isinstance(field, fo.StringField) and name not in ("filepath", ctx.params.get("caption_field")))
    ]
    offered = {name: f"{name}: {loss.says}" for name, loss in TARGET_LOSSES.items() if labels or not loss.needs_labels}
    ask_option(inputs, ctx, InfluenceSettings, "target_loss", choices=offered, description=None)
    if _needs_labels(ctx.params.get("target_loss")):
        dropdown(inputs, "label_field", labels, label="Classes", description="The field of the classes to tell apart")


def _needs_labels(target_loss: str | None) -> bool:
    return target_loss is not None and target_loss in TARGET_LOSSES and TARGET_LOSSES[target_loss].needs_labels
