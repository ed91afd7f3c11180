"""Pairs that the panel proposes, what is said of them, and what is learned from that."""

from __future__ import annotations

from typing import Any

from fiftyone_ecif.samples.pairs import every_sample

from ..memory import dismiss_outcome
from .grid import bring
from .pages import PROPOSALS
from .state import get, run_results
from .turning import first_share


def propose(ctx: Any) -> None:
    """Proposes pairs to look at."""
    from fiftyone_ecif.api.review import propose_pairs

    ctx.panel.set_state("queue", propose_pairs(run_results(ctx), PROPOSALS, seed=len(get(ctx, "queue") or [])))
    ctx.panel.set_state("place", 0)


def answer(ctx: Any, tag: str | None) -> None:
    """Says of the pair that is shown what it is, or leaves it open, and turns to the next."""
    from fiftyone_ecif.samples.review_tags import set_review_tag

    queue, place = get(ctx, "queue"), get(ctx, "place") or 0
    if tag:
        set_review_tag(ctx.dataset, queue[place], tag)
    ctx.panel.set_state("place", place + 1)


def learn_from_tags(ctx: Any) -> None:
    """Refits the score to what was said, and brings the new order to the grid."""
    from fiftyone_ecif.api.review import review_misalignment

    review = review_misalignment(run_results(ctx), PROPOSALS)
    ctx.panel.set_state(
        "learned",
        f"Learned from {review.aligned} aligned and {review.misaligned} misaligned pairs. About "
        f"**{review.expected:,.0f}** pairs are misaligned. AUROC **{review.auroc:.2f}** ({review.auroc_low:.2f} to "
        f"{review.auroc_high:.2f}): how often a misaligned pair comes before an aligned one, each judged "
        "by the others.",
    )
    ctx.panel.set_state({"queue": review.proposals, "place": 0, "share": first_share(ctx)})
    dismiss_outcome(ctx)  # which may say otherwise
    field = f"{get(ctx, 'key')}_misalignment"
    ctx.ops.reload_dataset()
    bring(ctx, every_sample(ctx.dataset).exists(field).sort_by(field, reverse=True))
