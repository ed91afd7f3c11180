"""The page of what was traced: each mistake, what it retrieved instead, what harms it, and what helps."""

from __future__ import annotations

from typing import Any

from ..memory import last_trace
from .cards import TOWARDS, Card, cards_of, draw_card, leaf, start
from .state import get, plain, run_id

#: What is said of a match, by its kind.
_SAID = {
    "caption": "its caption, for the image above · similarity {similarity:.3f}, the right one {right_similarity:.3f}",
    "image": "its image, for the caption above · similarity {similarity:.3f}, the right one {right_similarity:.3f}",
    "class": "the class {found!r} · similarity {similarity:.3f}, the right class {right!r} {right_similarity:.3f}",
}


def draw_trace(events: Any, ctx: Any, page: Any) -> None:
    """Draws one of the mistakes that were traced last, and offers to trace."""
    traced = last_trace(ctx, run_id(ctx))
    prompt = {"operator": "trace_predictions", "prefill": {"brain_key": get(ctx, "key")}}
    if not traced:
        page.md(
            "A trace goes from a mistake of the model back to the training pairs behind it. Select validation pairs "
            "in the grid, or none for the worst mistakes.",
            name="nothing",
        )
        page.btn("trace", "Trace mistakes", variant="contained", on_click=events.prompt, params=prompt)
        return
    place = min(get(ctx, "traced") or 0, len(traced) - 1)
    one = traced[place]
    noun = "Mistake" if one["mistake"] else "Validation pair"
    page.md(f"{noun} **{place + 1} of {len(traced)}**, loss {one['loss']:.2f}", name="which")
    turn = start(page, "turn")
    leaf(turn, events.turn_trace, 1, place == 0, place == len(traced) - 1)
    turn.btn("trace", "Trace others", variant="outlined", on_click=events.prompt, params=prompt)
    ids = [one["id"], *(pair["id"] for side in ("culprits", "helpers") for pair in one[side])]
    turn.btn("show", "Show in the grid", variant="outlined", on_click=events.show_pairs, params={"ids": ids})
    wrong = [match["found"] for match in one["retrieved"] if match["kind"] != "class"]
    cards = cards_of(ctx, dict.fromkeys([*ids, *wrong]))
    if one["id"] in cards:
        draw_card(events, page, "mistake", cards[one["id"]])
    else:
        page.md("It is in another dataset.", name="elsewhere")
    if one["mistake"]:
        _draw_retrieved(events, page, one["retrieved"], cards)
    for side, title, sign, tag in (
        ("culprits", "These training pairs harm it, the worst first", -1, "harmful"),
        ("helpers", "These training pairs help against it, the best first", 1, "valuable"),
    ):
        colour = TOWARDS[sign]
        page.md(f"**{title}**", name=f"{side}_title", componentsProps={"container": {"sx": {"color": colour}}})
        for number, pair in enumerate(one[side], start=1):
            if pair["id"] in cards:
                line = f"no. {number} · relative influence {pair['relative_influence']:.2g}"
                draw_card(events, page, f"{side}_{number}", cards[pair["id"]], [(line, colour)], tag)


def _draw_retrieved(events: Any, page: Any, retrieved: list[dict[str, Any]], cards: dict[str, Card]) -> None:
    """What a mistake retrieved in place of what is right: a pair's caption or image, on its card, or a class."""
    if not retrieved:
        page.md(
            "What it retrieved instead was not kept. Run *Compute ECIF influence* again with *Replace the run* ticked, "
            "and trace.",
            name="unknown",
        )
        return
    page.md("**It retrieved instead**", name="retrieved_title")
    said: dict[str, list[str]] = {}
    for match in retrieved:
        said.setdefault(match["found"], []).append(_SAID[match["kind"]].format(**match))
    for number, (found, lines) in enumerate(said.items(), start=1):
        if found in cards:
            draw_card(events, page, f"retrieved_{number}", cards[found], [(line, None) for line in lines])
        else:
            page.md(plain(" ".join(lines)), name=f"retrieved_{number}")
