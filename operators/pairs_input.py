"""Which pairs a form is about, and where their captions are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fiftyone.operators.types as types
from fiftyone import ViewField

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import every_sample

from .forms import blocked, dropdown, refuse, warning
from .memory import entered_before
from .view_fields import fields_of_runs

_CAPTIONS = ("caption", "description", "prompt", "text", "sentence", "title")  # in names of fields, the likeliest first
_LOOKED_AT = 50  # samples whose texts are compared
_MOSTLY = 0.5  # of the samples, fewer texts than which are worth a word


def ask_caption_field(inputs: Any, ctx: Any, samples: Any) -> Any:
    """Asks where the captions of samples are, and warns of a field that is mostly empty; None if there can be none.

    The fields that runs write are not offered, and the likeliest of the others is chosen.
    """
    from fiftyone_ecif.samples.pairs import advice_on_captions, caption_fields

    ours = fields_of_runs(ctx.dataset)
    fields = [name for name in caption_fields(ctx.dataset) if name not in ours]
    if not fields:
        blocked(inputs, "no_captions", f"No string field could hold captions. {advice_on_captions(ctx.dataset)}")
        return None
    before = entered_before(ctx).get("caption_field")
    default = before if before in fields else likely_caption_field(ctx.dataset, fields)
    choice = dropdown(
        inputs, "caption_field", fields, default, label="Caption field", description="The text of each pair"
    )
    field = ctx.params.get("caption_field")
    if field in fields and samples.has_sample_field(field):
        text = ViewField(field)
        full = samples.match((text != None) & (text != "")).count()  # noqa: E711
        if full < _MOSTLY * len(samples):
            warning(inputs, "empty", f"Only {full:,} of {len(samples):,} samples have a text in {field!r}")
    return choice


def likely_caption_field(dataset: Any, fields: Sequence[str]) -> str:
    """The field that most likely holds captions: by its name, else the one with the longest texts."""
    named = sorted(
        (_CAPTIONS.index(word), name) for name in fields for word in _CAPTIONS if word in name.lower().split(".")[-1]
    )
    if named:
        return named[0][1]
    texts = zip(*every_sample(dataset).limit(_LOOKED_AT).values(list(fields), unwind=False), strict=True)
    words = [sum(len(str(text or "").split()) for text in row) for row in zip(*texts, strict=True)]
    return max(zip(words, fields, strict=True), key=lambda found: found[0])[1] if words else fields[0]


def pairs_to_act_on(ctx: Any) -> Any:
    """The samples that a form is about: of grouped data the slice that the App shows, of a ``group_by`` all samples."""
    samples = ctx.target_view()
    return samples.flatten() if samples._is_dynamic_groups else in_shown_slice(ctx, samples)


def in_shown_slice(ctx: Any, samples: Any) -> Any:
    """Those of some samples that are in the slice that the App shows, or in any of images if that has none."""
    dataset = ctx.dataset
    if dataset.media_type != "group":
        return samples
    shown = ctx.group_slice or dataset.default_group_slice
    is_of_images = dataset.group_media_types.get(shown) == "image"
    if samples.media_type == "group":
        chosen = {"slices": shown} if is_of_images else {"media_type": "image"}
        return samples.select_group_slices(**chosen)
    return samples.match(ViewField(f"{dataset.group_field}.name") == shown) if is_of_images else samples


def ask_leave_out(inputs: Any, which: str, why: str) -> None:
    """Asks whether some pairs are left out, which they are by default: ``leave_out``."""
    view = types.CheckboxView()
    inputs.bool("leave_out", default=True, label=f"Leave out the {which}", description=why, view=view)


def ask_pairs(inputs: Any, ctx: Any) -> Any:
    """Asks which pairs to score and where their captions are; returns them, or None if there can be none."""
    from fiftyone_ecif.samples.pairs import check_collection

    inputs.view_target(ctx, action_description="Score")
    samples = pairs_to_act_on(ctx)
    choice = ask_caption_field(inputs, ctx, samples)
    if choice is None:
        return None
    if field := ctx.params.get("caption_field"):
        try:
            check_collection(samples, field)
        except EcifError as error:
            refuse(choice, str(error))
    if len(samples) == 1:
        blocked(
            inputs, "one_pair", "Scoring needs at least 2 pairs, and 1 is selected. Select more, or take the whole view"
        )
    return samples
