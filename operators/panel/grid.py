"""What the panel brings to the grid."""

from __future__ import annotations

from typing import Any

from fiftyone import ViewField

from fiftyone_ecif.samples.pairs import every_sample

from ..jobs import set_thumbnails, thumbnail_fields
from .state import current_direction, current_field, get, run_config, score_table


def bring(ctx: Any, view: Any) -> None:
    """Brings a view to the grid, with what the run says on the thumbnails."""
    key, config = get(ctx, "key"), run_config(ctx)
    set_thumbnails(ctx, config.caption_field, *thumbnail_fields(key, config))
    ctx.ops.set_view(view=view)


def show_ids(ctx: Any, ids: list[str]) -> None:
    """Shows some samples in this order."""
    bring(ctx, every_sample(ctx.dataset).select(ids, ordered=True))


def show_scores(ctx: Any, low: float, high: float) -> None:
    """Shows the samples with a score in ``[low, high]``, which is quick however many they are."""
    field = current_field(ctx)
    score = ViewField(field)
    found = every_sample(ctx.dataset).match((score >= low) & (score <= high))
    bring(ctx, found.sort_by(field, reverse=towards_end(ctx) < 0))


def show_bins(ctx: Any, bins: list[int]) -> None:
    """Shows the samples of some bars of the histogram."""
    edges, _ = score_table(ctx).histogram(current_field(ctx))
    show_scores(ctx, float(edges[min(bins)]), float(edges[max(bins) + 1]))


def towards_end(ctx: Any) -> int:
    """1 if ascending scores begin with those furthest at the chosen end, -1 if descending ones do."""
    return 1 if current_direction(ctx) == "harmful" else -1
