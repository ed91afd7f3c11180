"""What the plots of the panel show."""

from __future__ import annotations

from typing import Any

from fiftyone_ecif.samples.pairs import every_sample, pairs_now

from .state import current_cut, current_direction, current_field, get, run_config, run_keys, score_table

_GROUPS = 5  # tags with a colour of their own
_MEANINGS = ("harmful", "valuable", "suspect", "misaligned", "aligned")  # tags that come before the others


def draw_plots(ctx: Any) -> None:
    """Draws both plots of the overview."""
    draw_histogram(ctx)
    draw_scatter(ctx)


def _has_scores(ctx: Any) -> bool:
    return get(ctx, "key") in run_keys(ctx) and current_field(ctx) != ""


def draw_histogram(ctx: Any) -> None:
    """Draws how the score is distributed, and what the cut takes."""
    from .plots import histogram_bars

    if not _has_scores(ctx):
        return
    bars = histogram_bars(score_table(ctx), current_field(ctx), current_direction(ctx), current_cut(ctx).threshold)
    ctx.panel.set_data("histogram", bars)


def draw_scatter(ctx: Any, lassoed: list[str] | None = None) -> None:
    """Draws the score against another one, with tags in colour; what a lasso took stays marked."""
    from .plots import Group, scatter_points, tag_colours

    if not _has_scores(ctx):
        return
    board, other = score_table(ctx), get(ctx, "other")
    if other not in board.columns:
        return
    field = current_field(ctx)
    scored = every_sample(ctx.dataset).exists(field)
    counts = scored.count_sample_tags()
    some = [tag for tag in counts if counts[tag] < len(board.scored(field))]
    shown = sorted(some, key=lambda tag: (tag not in _MEANINGS, counts[tag], tag))[:_GROUPS]
    colours = tag_colours(shown, get(ctx, "colours") or {})
    ctx.panel.set_state("colours", colours)
    groups = {tag: Group(set(scored.match_tags(tag).values("id")), colours[tag]) for tag in shown}
    ids = board.ids[board.points(field, other)].tolist()
    captions = {
        sample: text for sample, (_, text) in pairs_now(ctx.dataset, run_config(ctx).caption_field, ids).items()
    }
    points = scatter_points(board, field, other, groups, ctx.selected or [], captions, lassoed)
    ctx.panel.set_data("scatter", points)
