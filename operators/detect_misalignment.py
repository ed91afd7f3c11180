"""The operator that looks for pairs whose caption does not belong to the image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.detectors import DETECTORS, Detector
from fiftyone_ecif.misalignment.judgement import TRUSTED
from fiftyone_ecif.samples.review_tags import check_score_tag
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings

from .base import JobOperator
from .estimates import Plan, estimate
from .forms import advanced, ask_background, ask_option, ask_percent, is_from_form, refuse
from .jobs import Job, call, report, show, with_progress
from .memory import wish
from .model_input import ask_embeddings, ask_fit_and_batches, ask_model, chosen
from .name_input import ask_key
from .pairs_input import ask_leave_out, ask_pairs, pairs_to_act_on
from .target_input import HELD_OUT_TAG, ask_target, target_names, target_view

_DEFAULTS = {
    **MisalignmentSettings.defaults(),
    **JobSettings.defaults(),
    **dict.fromkeys(("target", "tag", "share", "threshold")),
    "brain_key": "audit",
    "pretrained": "",
}
_UNSEEN = (HELD_OUT_TAG, "val", "valid", "validation", "test", "dev")
_TAGGING = {
    "none": "None",
    "estimated": "As many as the estimated noise rate says",
    "share": "A share of the pairs",
    "threshold": "All above a probability",
}


class DetectMisalignment(JobOperator):
    """Ranks pairs by how likely the caption does not belong to the image, and says why."""

    identifier = "detect_misalignment"
    title = "Detect misaligned pairs"
    about = "Which captions do not belong to their image, without labels"
    icon = "link_off"

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        from fiftyone_ecif.runs.misalignment import MisalignmentConfig

        samples = ask_pairs(inputs, ctx)
        if samples is None:
            return
        params = _DEFAULTS | ctx.params
        unseen = _unseen_tags(samples) if params["trained"] else []
        others = len(samples.match_tags(unseen)) if unseen else 0
        if unseen and params.get("leave_out", True):
            samples = samples.match_tags(unseen, bool=False)
        takes = estimate(_plan(params, len(samples)))
        inputs.view("counts", types.Notice(label=f"{len(samples):,} pairs will be scored", description=takes))
        if not ask_embeddings(inputs, ctx, MisalignmentSettings):
            ask_model(inputs, ctx, _DEFAULTS["model"])
        described = "Names the run and its fields: KEY_misalignment, KEY_reason, KEY_duplicate"
        ask_key(inputs, ctx, _DEFAULTS["brain_key"], described, MisalignmentConfig())
        ask_option(inputs, ctx, MisalignmentSettings, "trained")
        if others:
            which = f"{others:,} that are tagged {' or '.join(map(repr, unseen))}"
            ask_leave_out(
                inputs, which, "A model that was not trained on those finds them wrong beside pairs it knows by heart"
            )
        _ask_tag(inputs, ctx)
        if advanced(inputs, ctx):
            _ask_detector(inputs, ctx, samples)
            ask_option(inputs, ctx, MisalignmentSettings, "fit")
            ask_fit_and_batches(inputs, ctx, MisalignmentSettings, len(samples))
        ask_background(inputs)

    @override
    def resolve_run_name(self, ctx: Any) -> str:
        return f"Misalignment, run {ctx.params.get('brain_key', _DEFAULTS['brain_key'])!r}"

    def work(self, ctx: Any, job: Job) -> Iterator[Any]:
        """Looks for misaligned pairs, and brings them to the grid."""
        from fiftyone_ecif.api.misalignment import misalignment_steps

        params = _DEFAULTS | {name: value for name, value in _entered(ctx.params).items() if value is not None}
        samples = pairs_to_act_on(ctx)
        if len(samples) == 0:
            raise EcifError("No samples are selected")
        if is_from_form(ctx.params) and params["trained"] and params.get("leave_out", True):
            unseen = _unseen_tags(samples)
            samples = samples.match_tags(unseen, bool=False) if unseen else samples
        work = misalignment_steps(
            samples,
            *chosen(ctx, params, MisalignmentSettings),
            params["brain_key"],
            target=target_view(ctx.dataset, params["target"]) if params["target"] else None,
            **{name: params[name] for name in ("tag", "share", "threshold")},
        )
        results = yield from with_progress(ctx, job, _plan(params, len(samples)), work)

        key = params["brain_key"]
        yield report(ctx, f"Scored {len(results.ids):,} pairs, skipped {len(results.skipped):,}", 1.0)
        if not ctx.delegated:
            field = f"{key}_misalignment"
            view = samples.exists(field).sort_by(field, reverse=True)
            yield from show(ctx, view, params["caption_field"], field, f"{key}_reason")
            wish(ctx, key, "overview")
            yield ctx.ops.notify(_summary(results, params["tag"]), variant="success")

    def __call__(self, samples: Any, delegate: bool = False, **options: Any) -> Any:
        """Looks for misaligned pairs in a dataset or view.

        The options are those of :func:`fiftyone_ecif.compute_misalignment`, and so
        are the errors; ``target`` is ``"tag: NAME"`` or ``"saved view: NAME"``.
        """
        return call(self.uri, samples, delegate, {**_DEFAULTS, **options})


def _plan(params: dict[str, Any], pairs: int) -> Plan:
    kind = " ".join(map(str, ("misalignment", *(params.get(name) for name in ("model", "detector", "fit")))))
    return Plan(kind, pairs, params["model"], "heads")


def _unseen_tags(samples: Any) -> list[str]:
    """The tags of those samples that a model is usually not trained on; none where hardly any others are left."""
    there = samples.distinct("tags")
    found = [tag for tag in _UNSEEN if tag in there]
    return found if found and len(samples.match_tags(found, bool=False)) > 1 else []


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
        ask_percent(inputs, ctx)
        return
    limit = inputs.float(
        "threshold",
        required=True,
        default=0.5,
        label="Probability, from 0 to 1",
        description="That image and caption do not belong together; by another detector than the default, the "
        "share of the pairs that are less suspicious",
    )
    if not 0 <= (ctx.params.get("threshold") or 0) <= 1:
        refuse(limit, "Must be from 0 to 1")


def _ask_detector(inputs: Any, ctx: Any, samples: Any) -> None:
    offered = {
        name: f"{name}: {detector.says}"
        for name, detector in DETECTORS.items()
        if not detector.needs_target or target_names(ctx.dataset)
    }
    asked = ask_option(inputs, ctx, MisalignmentSettings, "detector", choices=offered, description=None)
    detector = _detector(ctx.params)
    if detector.needs_training and not _knows_the_pairs(ctx):
        refuse(asked, "It needs a model that was trained on the pairs: tick one of the two boxes")
    if detector.needs_target:
        ask_target(inputs, ctx, samples)


def _detector(params: dict[str, Any]) -> Detector:
    """The chosen detector, the default where none that is known was chosen."""
    name: str = params.get("detector") or ""
    return DETECTORS[name if name in DETECTORS else MisalignmentSettings.detector]


def _entered(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters without what was entered before a choice was changed."""
    if not is_from_form(params):
        return params
    tagging = params.get("tagging") or "none"
    stale = {name for name in ("share", "threshold") if name != tagging}
    stale |= {"tag"} if tagging == "none" else set()
    stale |= {"target"} if not _detector(params).needs_target else set()
    if tagging == "share" and params.get("percent") is not None:
        params = {**params, "share": params["percent"] / 100}
    return {name: value for name, value in params.items() if name not in stale}


def _summary(results: Any, tag: str | None) -> str:
    """A run in a few sentences."""
    said = [f"Scored {len(results.ids):,} pairs, skipped {len(results.skipped):,}", str(results.noise_rate)]
    if results.diagnostics["power"]["random"] < TRUSTED:
        said.append("Known wrong captions are hardly found here, so do not rely on the score: use a stronger model")
    if tag:
        said.append(f"Tagged {results.diagnostics['tagged']:,} pairs {tag!r}")
    return ". ".join([*said, "The most suspicious come first"])
