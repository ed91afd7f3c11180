"""The page of what was traced: each mistake, the training pairs that harm it, and those that help."""

from __future__ import annotations

from typing import Any

from ..memory import last_trace
from .cards import TOWARDS, cards_of, draw_card, leaf, start
from .state import get, run_id


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
    cards = cards_of(ctx, ids)
    if one["id"] in cards:
        draw_card(events, page, "mistake", cards[one["id"]])
    else:
        page.md("It is in another dataset.", name="elsewhere")
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
