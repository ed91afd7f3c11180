"""The validation pairs that a form asks for."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import every_sample

from .forms import ask_percent, dropdown, refuse, warning
from .memory import entered_before
from .pairs_input import ask_leave_out, in_shown_slice

#: What is chosen for validation pairs that are yet to be drawn, and the tag that they get.
HOLD_OUT, HELD_OUT_TAG = "hold out", "held_out"


def target_names(dataset: Any) -> list[str]:
    """What can serve as validation pairs: tags and saved views."""
    tags = [f"tag: {tag}" for tag in every_sample(dataset).distinct("tags")]
    return tags + [f"saved view: {name}" for name in dataset.list_saved_views()]


def target_view(dataset: Any, target: str) -> Any:
    """The validation pairs that one of :func:`target_names` means."""
    kind, _, name = target.partition(": ")
    if kind == "tag":
        return every_sample(dataset).match_tags(name)
    if kind == "saved view" and dataset.has_saved_view(name):
        return dataset.load_saved_view(name)
    raise EcifError(f"target={target!r} is neither 'tag: NAME' nor 'saved view: NAME' of this dataset")


def ask_target(inputs: Any, ctx: Any, samples: Any) -> Any:
    """Asks for validation pairs, and warns of those that are scored too; returns them once they are chosen."""
    target_pairs, _ = _ask_target(inputs, ctx, target_names(ctx.dataset))
    if target_pairs is not None and (shared := _shared(samples, target_pairs)):
        warning(
            inputs,
            "shared",
            f"{shared:,} validation pairs are also scored. Show only training pairs to keep them apart",
        )
    return target_pairs


def ask_split(inputs: Any, ctx: Any, samples: Any) -> tuple[int, int] | None:
    """Asks for validation pairs, or for a share of the samples to hold out, and whether those are scored too.

    Returns:
        how many pairs will be scored, and how many are the target, once that is known
    """
    offered = {name: name for name in target_names(ctx.dataset)}
    offered[HOLD_OUT] = f"A share of these pairs, to be held out and tagged {HELD_OUT_TAG!r}"
    target_pairs, asked = _ask_target(inputs, ctx, offered)
    if ctx.params.get("target") == HOLD_OUT:
        ask_percent(inputs, ctx, "held_out", "Per cent of the pairs to hold out")
        inputs.int(
            "held_out_seed", default=0, label="Seed of the draw", description="The same one draws the same pairs"
        )
        held = _count_held_out(ctx, len(samples))
        if held < 2 or len(samples) - held < 2:
            refuse(asked, f"That would hold out {held:,} of {len(samples):,} pairs: at least 2 are needed on each side")
        return len(samples) - held, held
    if target_pairs is None:
        return None
    shared = _shared(samples, target_pairs)
    if shared:
        which = f"{shared:,} of these that are validation pairs"
        ask_leave_out(inputs, which, "A pair that is scored towards itself looks valuable")
    left_out = shared if ctx.params.get("leave_out", True) else 0
    if shared and len(samples) - left_out < 2:
        refuse(asked, "All of these are validation pairs. Show training pairs, or choose other validation pairs")
    return len(samples) - left_out, len(target_pairs)


def split(ctx: Any, samples: Any) -> tuple[Any, Any]:
    """What to score and towards what, as answered to :func:`ask_split`: what is held out is drawn and tagged.

    Raises:
        EcifError: if there is no such target
    """
    name = ctx.params["target"]
    if name == HOLD_OUT:
        ids = sorted(samples.values("id"))
        count = _count_held_out(ctx, len(ids))
        drawn = random.Random(ctx.params.get("held_out_seed") or 0).sample(ids, count)
        every_sample(ctx.dataset).match_tags(HELD_OUT_TAG).untag_samples(HELD_OUT_TAG)
        every_sample(ctx.dataset).select(drawn).tag_samples(HELD_OUT_TAG)
        name = f"tag: {HELD_OUT_TAG}"
    target_pairs = in_shown_slice(ctx, target_view(ctx.dataset, name))
    if ctx.params.get("leave_out", True) and _shared(samples, target_pairs):
        kind, _, tag = name.partition(": ")
        # by the tag where there is one, as a view that names many samples one by one cannot be recorded
        samples = samples.match_tags(tag, bool=False) if kind == "tag" else samples.exclude(target_pairs.values("id"))
    return samples, target_pairs


def _count_held_out(ctx: Any, pairs: int) -> int:
    return math.ceil((ctx.params.get("held_out") or 10.0) / 100 * pairs)


def _shared(samples: Any, target_pairs: Any) -> int:
    return len(set(samples.values("id")) & set(target_pairs.values("id")))


def _ask_target(inputs: Any, ctx: Any, offered: Iterable[str]) -> tuple[Any, Any]:
    """Asks for validation pairs; returns them once they are chosen, and the input."""
    offered = offered if isinstance(offered, Mapping) else {name: name for name in offered}
    before, usual = entered_before(ctx).get("target"), "tag: val"
    target = dropdown(
        inputs,
        "target",
        offered,
        next((name for name in (before, usual, next(iter(offered), None)) if name in offered), None),
        label="Validation pairs",
        description="Influence is measured on the loss of these pairs",
    )
    chosen = ctx.params.get("target")
    if chosen not in offered or chosen == HOLD_OUT:
        return None, target
    target_pairs = in_shown_slice(ctx, target_view(ctx.dataset, chosen))
    if len(target_pairs) < 2:
        refuse(target, f"The target needs at least 2 pairs, it has {len(target_pairs)}")
    return target_pairs, target
