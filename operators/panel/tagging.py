"""Tags that the panel gives and takes."""

from __future__ import annotations

from typing import Any

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import every_sample

from .drawing import draw_scatter
from .state import current_cut, get


def toggle(ctx: Any, sample: str, tag: str) -> None:
    """Gives a sample a tag, or takes it away."""
    view = every_sample(ctx.dataset).select(sample)
    if tag in view.first().tags:
        view.untag_samples(tag)
    else:
        view.tag_samples(tag)
    ctx.ops.reload_samples()
    draw_scatter(ctx)


def tag_the_cut(ctx: Any, untag: bool) -> None:
    """Tags what the cut takes, or takes the tag back.

    Raises:
        EcifError: if the tag has no name or one that is a person's, or the cut takes no pairs
    """
    from fiftyone_ecif.samples.review_tags import check_score_tag

    tag = (get(ctx, "act.tag") or "").strip()
    ids = current_cut(ctx).ids
    check_score_tag(tag)
    if not tag or not ids:
        raise EcifError("Give the tag a name" if not tag else "The cut takes no pairs. Move the slider")
    view = every_sample(ctx.dataset).select(ids, ordered=True)
    if untag:
        view.untag_samples(tag)
    else:
        view.tag_samples(tag)
    ctx.ops.notify(f"{'Untagged' if untag else 'Tagged'} {len(ids):,} pairs {tag!r}", variant="success")
    ctx.ops.reload_samples()
    draw_scatter(ctx)
