"""The operator that learns from what a person says of pairs."""

from __future__ import annotations

from typing import Any

import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.api.review import review_or_propose
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.samples.review_tags import ALIGNED, LEAST, MISALIGNED, count_review_tags

from .base import FormOperator
from .forms import blocked, dropdown, refuse, warning
from .jobs import call, show

_KEY, _COUNT = "audit", 20
_HOW_TO_TAG = (
    f"Select some of these pairs, press the tag button above the grid, tag them {ALIGNED!r} or {MISALIGNED!r}, "
    "then run this again"
)


class ReviewMisalignment(FormOperator):
    """Refits a misalignment score to the pairs that were tagged, and shows those to look at next."""

    identifier = "review_misalignment"
    title = "Review misalignment"
    about = "Look at a few pairs, tag them, and let the score learn from that"
    icon = "rate_review"
    delegable = True

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        runs = ctx.dataset.list_brain_runs(type="misalignment", method="ecif")
        if not runs:
            blocked(inputs, "no_run", "Nothing to review yet: run Detect misaligned pairs first")
            return
        dropdown(inputs, "brain_key", runs, _KEY if _KEY in runs else runs[-1], label="Run")
        count = inputs.int("count", required=True, default=_COUNT, label="Pairs to look at next")
        if ctx.params.get("count") is not None and ctx.params["count"] < 1:
            refuse(count, "Must be at least 1")
        if ctx.params.get("brain_key") in runs:
            _say_what_happens(inputs, ctx)

    @override
    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.runs.manage import load_run

        key = ctx.params.get("brain_key", _KEY)
        results = load_run(ctx.dataset, key, "misalignment")
        tags, review, proposals = review_or_propose(results, ctx.params.get("count", _COUNT))
        found: dict[str, Any] = {"aligned": tags.aligned, "misaligned": tags.misaligned}
        if review is None:
            said = _HOW_TO_TAG
        else:
            auroc = f"{review.auroc:.2f} ({review.auroc_low:.2f} to {review.auroc_high:.2f})"
            said = (
                f"Learned from {review.aligned:,} aligned and {review.misaligned:,} misaligned pairs: AUROC {auroc}. "
                f"About {review.expected:,.0f} of {len(results.ids):,} pairs are misaligned"
            )
            found |= {"auroc": auroc, "expected": f"{review.expected:,.0f} of {len(results.ids):,}"}
        field = f"{key}_misalignment"
        view = every_sample(ctx.dataset).select(proposals, ordered=True)
        if not proposals:
            said += ". No pairs are left to look at"
            view = every_sample(ctx.dataset).exists(field).sort_by(field, reverse=True)
        for _ in show(ctx, view, results.config.caption_field, field, f"{key}_reason"):
            pass
        ctx.ops.notify(said, variant="success")
        return {**found, "proposed": len(proposals)}

    @override
    def resolve_output(self, ctx: Any) -> types.Property:
        outputs = types.Object()
        outputs.int("aligned", label="Pairs tagged aligned")
        outputs.int("misaligned", label="Pairs tagged misaligned")
        means = _HOW_TO_TAG
        if "auroc" in ctx.results:
            outputs.str("auroc", label="AUROC with 95 % interval")
            outputs.str("expected", label="Misaligned pairs expected")
            means = (
                "AUROC is how often a misaligned pair comes before an aligned one, each judged by the others. "
                f"{ctx.params['brain_key']}_misalignment is now the probability that a pair is misaligned"
            )
        outputs.int("proposed", label="Pairs to look at next")
        outputs.view("means", types.Notice(label=means))
        return types.Property(outputs, view=types.View(label=self.title))

    def __call__(self, samples: Any, brain_key: str = _KEY, count: int = _COUNT) -> Any:
        """Reviews a run of a dataset; a view stands for its dataset."""
        return call(self.uri, samples, False, {"brain_key": brain_key, "count": count})


def _say_what_happens(inputs: Any, ctx: Any) -> None:
    tags = count_review_tags(ctx.dataset, ctx.params["brain_key"])
    so_far = f"So far {tags.aligned:,} pairs are tagged {ALIGNED!r} and {tags.misaligned:,} {MISALIGNED!r}."
    if tags.enough:
        does = "The score will be refitted to them: it becomes the probability that a pair is misaligned."
    else:
        does = f"It takes {LEAST} of each to learn. You will be shown pairs to look at. {_HOW_TO_TAG}."
    inputs.view("tags", types.Notice(label=f"{so_far} {does}"))
    if tags.both:
        warning(inputs, "both", f"{tags.both:,} pairs have both tags. Take one of the two away")
