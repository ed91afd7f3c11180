"""The operator that looks for pairs whose caption does not belong to the image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fiftyone.operators as foo
import fiftyone.operators.types as types

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.detectors import DETECTORS, Detector
from fiftyone_ecif.samples.review_tags import check_score_tag

from .estimates import estimate, remember
from .forms import (
    advanced,
    ask_background,
    ask_fit_and_batches,
    ask_key,
    ask_model,
    ask_pairs,
    ask_target,
    dropdown,
    is_from_form,
    menu_button,
    refuse,
    target_names,
    target_view,
    unusable,
    warning,
)
from .jobs import Job, call, report, run_job, show, with_progress

_LABEL, _ICON = "Detect misaligned pairs", "link_off"
_DEFAULTS: dict[str, Any] = {
    "caption_field": "caption",
    "model": "ViT-B-32",
    "pretrained": "",
    "brain_key": "audit",
    "overwrite": False,
    "detector": "fused",
    "fit": True,
    "trained": False,
    "target": None,
    "tag": None,
    "share": None,
    "threshold": None,
    "proximal": 1.0,
    "batch_size": None,
    "seed": 0,
    "skip_failures": True,
    "device": None,
    "num_workers": None,
}
_METHOD = ("detector", "fit", "trained", "proximal", "batch_size", "seed")
_TAGGING = {
    "none": "None",
    "estimated": "As many as the estimated noise rate says",
    "share": "A share of the pairs",
    "threshold": "All above a score",
}


class DetectMisalignment(foo.Operator):
    """ProcessGroup pairs by how likely the caption does not belong to the image, and says why."""

    @property
    def config(self) -> foo.OperatorConfig:
        return foo.OperatorConfig(
            name="detect_misalignment",
            label=_LABEL,
            description="Which captions do not belong to their image, without labels",
            icon=_ICON,
            dynamic=True,
            execute_as_generator=True,
            allow_immediate_execution=True,
            allow_delegated_execution=True,
            risk_level="medium",
        )

    def resolve_placement(self, ctx: Any) -> types.Placement:
        return menu_button(_LABEL, _ICON)

    def resolve_input(self, ctx: Any) -> types.Property:
        inputs = types.Object()
        form = types.Property(inputs, view=types.View(label=_LABEL))
        if unusable(inputs, ctx):
            return form
        from fiftyone_ecif.runs.misalignment import MisalignmentConfig

        samples = ask_pairs(inputs, ctx)
        if samples is None:
            return form
        params = _DEFAULTS | ctx.params
        takes = estimate(_kind(params), len(samples), params["model"], "heads")
        inputs.view("counts", types.Notice(label=f"{len(samples):,} pairs will be scored", description=takes))
        ask_model(inputs, ctx, _DEFAULTS["model"])
        described = "Names the run and its fields: KEY_misalignment, KEY_reason, KEY_duplicate"
        ask_key(inputs, ctx, _DEFAULTS["brain_key"], described, MisalignmentConfig())
        _ask_trained(inputs, ctx)
        _ask_tag(inputs, ctx)
        if advanced(inputs, ctx):
            _ask_detector(inputs, ctx, samples)
            ask_fit_and_batches(inputs, ctx, _DEFAULTS)
        ask_background(inputs)
        return form

    def resolve_run_name(self, ctx: Any) -> str:
        return f"Misalignment, run {ctx.params.get('brain_key', _DEFAULTS['brain_key'])!r}"

    def execute(self, ctx: Any) -> Iterator[Any]:
        """Runs the job, reporting progress and failures in a way that the App shows."""
        yield from run_job(ctx, self.resolve_run_name(ctx), _detect)

    def __call__(self, samples: Any, delegate: bool = False, **options: Any) -> Any:
        """Looks for misaligned pairs in a dataset or view.

        The options are those of :func:`fiftyone_ecif.compute_misalignment`, and so
        are the errors; ``target`` is ``"tag: NAME"`` or ``"saved view: NAME"``.
        """
        return call(self.uri, samples, delegate, {**_DEFAULTS, **options})


def _kind(params: dict[str, Any]) -> str:
    """All that a run's pace depends on."""
    return " ".join(map(str, ("misalignment", *(params.get(name) for name in ("model", "detector", "fit")))))


def _ask_trained(inputs: Any, ctx: Any) -> None:
    inputs.bool(
        "fit",
        default=_DEFAULTS["fit"],
        label="Fit the heads to these pairs first",
        description="In memory, from the loaded weights. Influence tells about pairs that a model was fitted to",
        view=types.CheckboxView(),
    )
    inputs.bool(
        "trained",
        default=_DEFAULTS["trained"],
        label="The model was trained on these pairs",
        description="It then knows wrong captions by heart, and their share is estimated another way",
        view=types.CheckboxView(),
    )
    if not _knows_the_pairs(ctx):
        warning(
            inputs,
            "no_influence",
            "Influence will be left out: it misleads about pairs that the model was not trained on. "
            "Tick one of these two to use it",
        )


def _knows_the_pairs(ctx: Any) -> bool:
    return any(ctx.params.get(name, _DEFAULTS[name]) for name in ("fit", "trained"))


def _ask_tag(inputs: Any, ctx: Any) -> None:
    choice = types.RadioGroup()
    for name, label in _TAGGING.items():
        choice.add_choice(name, label=label)
    inputs.enum("tagging", choice.values(), default="none", label="Pairs to tag", view=choice)
    tagging = ctx.params.get("tagging") or "none"
    if tagging == "none":
        return
    tag = inputs.str("tag", required=True, default="suspect", label="Tag")
    try:
        check_score_tag(ctx.params.get("tag"))
    except EcifError as error:
        refuse(tag, str(error))
    if tagging == "estimated":
        return
    if tagging == "share":
        limit = inputs.float("share", required=True, default=0.1, label="Share, from 0 to 1")
    else:
        limit = inputs.float(
            "threshold",
            required=True,
            default=0.9,
            label="Score, from 0 to 1",
            description="Of a pair: the share of the pairs that are less suspicious",
        )
    if not 0 <= (ctx.params.get(tagging) or 0) <= 1:
        refuse(limit, "Must be from 0 to 1")


def _ask_detector(inputs: Any, ctx: Any, samples: Any) -> None:
    offered = {
        name: f"{name}: {detector.says}"
        for name, detector in DETECTORS.items()
        if not detector.needs_target or target_names(ctx.dataset)
    }
    detector = dropdown(inputs, "detector", offered, _DEFAULTS["detector"], label="Detector")
    chosen = _detector(ctx.params)
    if chosen.needs_training and not _knows_the_pairs(ctx):
        refuse(detector, "It needs a model that was trained on the pairs: tick one of the two boxes above")
    if chosen.needs_target:
        ask_target(inputs, ctx, samples)


def _detector(params: dict[str, Any]) -> Detector:
    """The chosen detector, the default where none that is known was chosen."""
    chosen: str = params.get("detector") or ""
    return DETECTORS[chosen if chosen in DETECTORS else _DEFAULTS["detector"]]


def _detect(ctx: Any, job: Job) -> Iterator[Any]:
    from fiftyone_ecif.api.misalignment import misalignment_steps
    from fiftyone_ecif.runs.misalignment import MisalignmentConfig

    params = _DEFAULTS | {name: value for name, value in _chosen(ctx.params).items() if value is not None}
    samples = ctx.target_view()
    if len(samples) == 0:
        raise EcifError("No samples are selected")
    work = misalignment_steps(
        samples,
        MisalignmentConfig(
            caption_field=params["caption_field"],
            model=params["model"],
            pretrained=params["pretrained"] or None,
            **{name: params[name] for name in _METHOD},
        ),
        target=target_view(ctx.dataset, params["target"]) if params["target"] else None,
        brain_key=params["brain_key"],
        device=params["device"] or None,
        num_workers=params["num_workers"] if ctx.delegated else 0,  # the App's server must not fork
        **{name: params[name] for name in ("tag", "share", "threshold", "skip_failures", "overwrite")},
    )
    results = yield from with_progress(ctx, job, work)
    remember(_kind(params), len(results.ids), job.watch)

    key = params["brain_key"]
    yield report(ctx, f"Scored {len(results.ids):,} pairs, skipped {len(results.skipped):,}", 1.0)
    if not ctx.delegated:
        field = f"{key}_misalignment"
        view = samples.exists(field).sort_by(field, reverse=True)
        yield from show(ctx, view, params["caption_field"], field, f"{key}_reason")
        yield ctx.ops.notify(_summary(results, params["tag"]), variant="success")


def _chosen(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters without what was entered before a choice was changed."""
    if not is_from_form(params):
        return params
    tagging = params.get("tagging") or "none"
    stale = {name for name in ("share", "threshold") if name != tagging}
    stale |= {"tag"} if tagging == "none" else set()
    stale |= {"target"} if not _detector(params).needs_target else set()
    return {name: value for name, value in params.items() if name not in stale}


def _summary(results: Any, tag: str | None) -> str:
    """A run in a few sentences."""
    rate = results.noise_rate
    said = [
        f"Scored {len(results.ids):,} pairs, skipped {len(results.skipped):,}",
        f"About {rate.rate:.0%} of the captions are wrong ({rate.low:.0%} to {rate.high:.0%})",
    ]
    if rate.high < 0.01 and not results.config.trained:
        said.append("If the model was trained on these pairs, that is too low: say so and run this again")
    if tag:
        said.append(f"Tagged {results.diagnostics['tagged']:,} pairs {tag!r}")
    if not results.diagnostics["trained"]:
        said.append("Influence was left out: the model was not trained on these pairs")
    return ". ".join([*said, "The most suspicious come first"])
