"""Which run, score, page and pair the panel turns to."""

from __future__ import annotations

from typing import Any

from ..view_fields import follow_fields
from .drawing import draw_plots
from .state import (
    current_page,
    get,
    is_misalignment,
    run_config,
    run_fields,
    run_keys,
    run_results,
    score_table,
    written_fields,
)


def follow_runs(ctx: Any) -> list[str]:
    """Follows runs that were renamed, and takes leave of those that went; the keys known before, as they are now."""
    written = written_fields(ctx)
    keys = {run: key for run, (key, _) in written.items()}
    renamed: dict[str, str | None] = {}
    fates: dict[str, str | None] = {}
    for run, (key, fields) in (get(ctx, "written") or {}).items():
        renamed[key] = keys.get(run)
        now = written[run][1] if run in written else [None] * len(fields)
        fates |= dict(zip(fields, now, strict=False))
    follow_fields(ctx, {old: new for old, new in fates.items() if not ctx.dataset.has_sample_field(old)})
    if new_key := renamed.get(get(ctx, "key")):
        ctx.panel.set_state("key", new_key)
    return [renamed.get(key) or key for key in get(ctx, "runs") or []]


def follow_wish(ctx: Any, wish: dict[str, str]) -> None:
    """Turns to the run and page where an operator left something to see."""
    ctx.dataset.reload()
    if wish["key"] not in run_keys(ctx):
        return
    ctx.panel.set_state("traced", 0)
    if wish["key"] != get(ctx, "key"):
        open_run(ctx, wish["key"])
    if wish["page"] != current_page(ctx):
        ctx.panel.set_state("turns", (get(ctx, "turns") or 0) + 1)
        turn_to(ctx, wish["page"])


def open_run(ctx: Any, key: str | None) -> None:
    """Turns to a run and the first of its scores; to none where there is none."""
    ctx.panel.set_state({"key": key, "head.key": key, "queue": None, "learned": None})
    fields = [] if key is None else run_fields(ctx)
    if fields:
        open_field(ctx, fields[0])


def first_share(ctx: Any) -> float:
    """What the slider starts at, in percent: the estimated noise rate, where it can be told."""
    rate = run_results(ctx).noise_rate if is_misalignment(ctx) else None
    return round(100 * min(0.5, rate.rate), 1) if rate is not None and rate.told else 5.0


def open_field(ctx: Any, field: str) -> None:
    """Turns to a score, at its usual end and cut."""
    config = run_config(ctx)
    direction = "suspicious" if config.type == "misalignment" else "harmful"
    others = [name for name in score_table(ctx).columns if name != field]
    across = [name for name in others if name not in run_fields(ctx)]
    ctx.panel.set_state(
        {
            "field": field,
            "head.field": field,
            "direction": direction,
            "share": first_share(ctx),
            "act.tag": "suspect" if direction == "suspicious" else direction,
            "other": (across or [None])[0],  # a part of the same score says nothing new
            "first": 0,
        }
    )
    draw_plots(ctx)


def turn_to(ctx: Any, page: str) -> None:
    """Turns to a page."""
    ctx.panel.set_state("page", page)
    if page == "overview":
        draw_plots(ctx)


def take_selected(ctx: Any) -> None:
    """Looks at a pair newly selected in the grid; who then turns the page at once is not told of it in between."""
    if ctx.selected != (get(ctx, "selected") or []):
        ctx.panel.set_state("selected", ctx.selected)
        if len(ctx.selected) == 1:
            ctx.panel.set_state("pair", ctx.selected[0])


def look_at(ctx: Any, sample: str) -> None:
    """Turns to the page of a pair."""
    ctx.panel.set_state("pair", sample)
    ctx.panel.set_state("turns", (get(ctx, "turns") or 0) + 1)
    turn_to(ctx, "pair")
