"""One card for a pair, wherever one is shown: its image, whole caption, what is known of it, and what to do with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import fiftyone.operators.types as types

from fiftyone_ecif.runs.sidebar import HARMFUL, HELPFUL
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.samples.review_tags import ALIGNED, MISALIGNED

from .state import current_direction, current_field, get, is_misalignment, pairs_of, plain, score_table, values_of

#: The colour of a number that says that a pair harms, and that it helps.
TOWARDS = {-1: HARMFUL, 1: HELPFUL}
FULL = {"width": "100%", "boxSizing": "border-box"}
#: One column as wide as the place, rather than as its content.
COLUMN = {**FULL, "gridTemplateColumns": "minmax(0, 1fr)"}
_SHORT = {"positive": "as a positive", "negative": "as a negative"}  # of scores, else the end of the field's name
_PICTURE = {"maxWidth": "100%", "objectFit": "contain", "display": "block", "margin": "auto"}


def start(place: Any, name: str, **options: Any) -> Any:
    """A row of things that stand together at its start."""
    sx = {"display": "flex", "flexWrap": "wrap", "justifyContent": "start", "& > *": {"width": "auto !important"}}
    return place.h_stack(name, gap=1, align_y="center", componentsProps={"grid": {"sx": sx}}, **options)


def leaf(row: Any, event: Any, by: int, is_first: bool, is_last: bool) -> None:
    """The buttons that turn back and forth."""
    for name, label, icon, step, ends in (
        ("back", "Previous", "chevron_left", -by, is_first),
        ("on", "Next", "chevron_right", by, is_last),
    ):
        row.btn(name, label, icon=icon, variant="outlined", on_click=event, params={"by": step}, disabled=ends)


class Card(NamedTuple):
    """A pair as a card shows it.

    Attributes:
        id: its sample.
        image: address of its image.
        caption: whole.
        tags: of the sample.
        reason: what speaks against it, if anything does.
    """

    id: str
    image: str
    caption: str
    tags: list[str]
    reason: str | None


def cards_of(ctx: Any, ids: Iterable[str]) -> dict[str, Card]:
    """The cards of some pairs in their order, without those that are gone."""
    pairs = pairs_of(ctx, list(ids))
    view = every_sample(ctx.dataset).select(list(pairs))
    tags = dict(zip(*view.values(["id", "tags"]), strict=True))
    reasons = values_of(ctx, pairs, f"{get(ctx, 'key')}_reason")
    return {
        sample: Card(sample, image, caption, tags.get(sample) or [], reasons.get(sample))
        for sample, (image, caption) in pairs.items()
    }


def say_scores(ctx: Any, sample: str, fields: Iterable[str] | None = None) -> list[tuple[str, str | None]]:
    """Lines on a pair's place by the scores of the run, each with a colour if it says harmful or helpful."""
    board, said = score_table(ctx), list[tuple[str, "str | None"]]()
    for field in fields or [current_field(ctx)]:
        value = board.value(field, sample)
        if value is None:
            continue
        place, end = board.place(field, sample)
        colour = TOWARDS.get((value > 0) - (value < 0)) if field.endswith("_influence") else None
        end_of_name = field.removeprefix(f"{get(ctx, 'key')}_")
        name = _SHORT.get(end_of_name, end_of_name.replace("_", " "))
        said.append((f"no. {place:,} from the {end} · {name} {value:.4g}", colour))
    return said


def draw_card(
    events: Any,
    place: Any,
    name: str,
    card: Card,
    lines: Iterable[tuple[str, str | None]] = (),
    tag: str | None = None,
    height: int = 96,
    opens: bool = True,
    verdicts: bool = True,
) -> None:
    """Draws a card.

    Args:
        events: of the panel.
        place: to draw it in.
        name: of the card there.
        card: the pair.
        lines: what to say of it below the caption, each with a colour or None.
        tag (None): that its first button gives it or takes from it; none without one.
        height (96): of the image at most, in pixels; it has as much room beside the text as the others of its height.
        opens (True): whether a click on it opens the pair.
        verdicts (True): whether it has buttons to say aligned and misaligned.
    """
    row = place.h_stack(
        name,
        gap=2,
        align_y="center",
        variant="outline",
        componentsProps={
            "grid": {"sx": {**FULL, "gridTemplateColumns": f"min(55%, {1.4 * height:.0f}px) minmax(0, 1fr)", "p": 1}},
            "container": {"sx": FULL},
        },
    )
    asked = {"operator": events.look, "params": {"id": card.id}} if opens else {}
    view = types.ImageView(
        height=f"{height}px",
        alt=card.caption,
        componentsProps={"image": {"style": _PICTURE}},
        **asked,
    )
    row.str("image", default=card.image, view=view)
    side = row.v_stack("side", gap=0.5, componentsProps={"container": {"sx": FULL}, "grid": {"sx": COLUMN}})
    side.md(f"**{plain(card.caption)}**", name="caption")
    for number, (text, colour) in enumerate(lines):
        _line(side, f"line_{number}", text, colour)
    if card.reason:
        _line(side, "reason", f"Against it: {card.reason}", None)
    buttons = start(side, "buttons")
    if opens:
        buttons.btn("open", "Open", on_click=events.look, params={"id": card.id}, variant="outlined")
    if tag:
        _press(buttons, "tag", tag, tag in card.tags, events.toggle_tag, {"id": card.id, "tag": tag})
    for verdict in (ALIGNED, MISALIGNED) if verdicts else ():
        is_said = verdict in card.tags
        _press(buttons, verdict, verdict, is_said, events.give_verdict, {"id": card.id, "tag": verdict})


def _press(buttons: Any, name: str, tag: str, pressed: bool, event: Any, params: Mapping[str, Any]) -> None:
    """A button that looks pressed while the pair has the tag."""
    label = tag.capitalize() if name == tag else f"Tag {tag}"
    label = f"✓ {label}" if pressed else label
    buttons.btn(name, label, on_click=event, params=dict(params), variant="contained" if pressed else "outlined")


def _line(place: Any, name: str, text: str, colour: str | None) -> None:
    style = {"componentsProps": {"container": {"sx": {"color": colour}}}} if colour else {}
    place.md(plain(text), name=name, **style)


def tag_of(ctx: Any) -> str:
    """The tag that a card's first button gives: that of the end that is looked at."""
    return "suspect" if is_misalignment(ctx) else current_direction(ctx)
