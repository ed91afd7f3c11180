"""What the pages of the Influence panel look like. Their buttons fire the panel's events."""

from __future__ import annotations

from collections import Counter
from typing import Any

import fiftyone.operators.types as types

from fiftyone_ecif.runs.sidebar import HARMFUL, HELPFUL, SUSPICIOUS
from fiftyone_ecif.samples.review_tags import ALIGNED, LEAST, MISALIGNED
from fiftyone_ecif.samples.selection import SIGNS, whole_pairs

from ..jobs import running_jobs
from ..memory import last_outcome
from ..wording import in_words
from .cards import COLUMN, TOWARDS, cards_of, draw_card, leaf, say_scores, start, tag_of
from .state import (
    current_cut,
    current_direction,
    current_field,
    current_page,
    get,
    is_misalignment,
    pages_of,
    plain,
    run_fields,
    run_keys,
    run_results,
    score_table,
    tabs_name,
)
from .trace_page import draw_trace

PROPOSALS = 20  # pairs to review at a time
_ROWS = 6  # pairs of the ranking on one screen
_LINKS = 4  # pairs in a strip
_PATIENCE = 2500  # milliseconds between two looks at jobs
_SOON = 100  # milliseconds in which the page says that it learns, before it does
_VERDICTS = {"trust": HELPFUL, "care": SUSPICIOUS, "do not": HARMFUL}


def nothing_yet(events: Any, page: Any, waiting: bool) -> None:
    """The page where there are no scores: what can be computed."""
    if waiting:
        page.md("The scores appear here once they are there.", name="waiting")
        return
    page.md("**No scores yet**", name="nothing")
    offer_runs(events, page)


def offer_runs(events: Any, page: Any) -> None:
    """What there is to compute, with a button each."""
    for operator, title, about in (
        (
            "compute_influence",
            "Compute ECIF influence",
            "Which pairs help a model on validation pairs of your choice, and which hurt.",
        ),
        ("detect_misalignment", "Detect misaligned pairs", "Which captions do not belong to their image."),
    ):
        page.md(about, name=f"about_{operator}")
        page.btn(
            operator,
            title,
            icon="add",
            variant="contained",
            on_click=events.prompt,
            params={"operator": operator},
        )


def nothing_left(events: Any, ctx: Any, page: Any) -> None:
    """The page of a run whose fields are gone."""
    key = get(ctx, "key")
    page.md(f"The fields of run `{key}` are no longer there. Make it again, or delete it.", name="nothing")
    page.btn(
        "manage",
        "Manage runs",
        variant="outlined",
        on_click=events.prompt,
        params={"operator": "manage_influence_runs", "prefill": {"brain_key": key}},
    )


def jobs_bar(events: Any, ctx: Any, page: Any) -> None:
    """Jobs that run, each with how far it is and a button to stop it; and how the last one ended."""
    jobs = running_jobs(ctx)
    for number, (key, job) in enumerate(jobs.items()):
        row = page.h_stack(f"job_{number}", gap=1, align_y="center")
        row.md(f"**{job['name']}** {job['progress']:.0%} · {job['label']}", name="label")
        row.btn("stop", "Stop", icon="stop", variant="outlined", on_click=events.stop, params={"job": key})
    ctx.panel.set_state("busy", bool(jobs))
    page.view("timer", types.TimerView(interval=_PATIENCE, on_interval=events.look_for_jobs))
    if outcome := last_outcome(ctx):
        _say_outcome(events, page, outcome)


def _say_outcome(events: Any, page: Any, outcome: dict[str, Any]) -> None:
    """How the last job ended, until someone takes note of it."""
    failed = outcome["failed"]
    colour = HARMFUL if failed else HELPFUL
    row = page.v_stack("outcome", gap=1, variant="outline", componentsProps={"grid": {"sx": {**COLUMN, "p": 1}}})
    ended = "came to nothing" if failed else "is done"
    row.md(
        f"**{plain(outcome['name'])} {ended}**",
        name="name",
        componentsProps={"container": {"sx": {"color": colour}}},
    )
    row.md(plain(outcome["text"]), name="text")
    buttons = start(row, "buttons")
    if failed:
        again = {"operator": outcome["operator"], "prefill": outcome["entered"]}
        buttons.btn("again", "Open the form again", variant="contained", on_click=events.prompt, params=again)
    buttons.btn("dismiss", "Dismiss", variant="outlined", on_click=events.dismiss)


def head(events: Any, ctx: Any, page: Any) -> None:
    """Which run, which score and which page is shown, and the way to another run."""
    head = start(page, "head")
    runs = types.DropdownView(space=6)
    for key in run_keys(ctx):
        runs.add_choice(key, label=f"{key}: {ctx.dataset.get_brain_info(key).config.type}")
    head.enum("key", runs.values(), label="Run", view=runs, on_change=events.choose_run)
    fields = types.DropdownView(space=6)
    for field in run_fields(ctx):
        fields.add_choice(field, label=field)
    head.enum("field", fields.values(), label="Score", view=fields, on_change=events.choose_field)
    asks = bool(get(ctx, "asks"))
    head.btn(
        "new",
        "Close" if asks else "New run",
        icon="close" if asks else "add",
        variant="contained" if asks else "outlined",
        on_click=events.ask_for_run,
    )
    if asks:
        offer_runs(
            events,
            page.v_stack("offer", gap=1, variant="outline", componentsProps={"grid": {"sx": {**COLUMN, "p": 1}}}),
        )
    pages = types.TabsView()
    for name, label in pages_of(ctx).items():
        pages.add_choice(name, label=label)
    page.enum(tabs_name(ctx), pages.values(), default=current_page(ctx), view=pages, on_change=events.choose_page)


def overview(events: Any, ctx: Any, page: Any) -> None:
    """How a score is distributed, what a cut takes, and the score against another one."""
    from .plots import histogram_layout, scatter_layout

    field, direction = current_field(ctx), current_direction(ctx)
    page.md(f"{ctx.dataset.get_field(field).description}.", name="meaning")
    page.plot(
        "histogram",
        layout=histogram_layout(score_table(ctx), field),
        config={"displayModeBar": False, "scrollZoom": False},
        on_click=events.click_bar,
        on_selected=events.select_bars,
    )
    back = start(page, "back")
    back.btn("ranked", "Back to the ranking", variant="outlined", on_click=events.show_ranked)
    back.btn("all", "Show all", variant="outlined", on_click=events.show_all)
    _ends(events, ctx, page)
    share = types.SliderView(
        label=f"The most {direction}: {get(ctx, 'share') or 0:.1f} % of the pairs",
        label_position="top",
        value_label_display="auto",
        value_precision=1,
    )
    page.float("share", min=0, max=50, view=share, on_change=events.choose_share)
    cut, scored = current_cut(ctx), len(score_table(ctx).scored(field))
    side = "below" if direction == "harmful" else "above"
    bound = "" if cut.threshold is None else f", with a score of {cut.threshold:.4g} and {side}"
    limit = (
        f", all that are {direction}"
        if direction in SIGNS and len(cut.ids) < whole_pairs((get(ctx, "share") or 0) / 100, scored)
        else ""
    )
    page.md(f"**{len(cut.ids):,} pairs**{bound}{limit}", name="cut")
    act = page.h_stack("act", gap=1, align_y="center")
    act.btn("show", "Show", icon="visibility", variant="outlined", on_click=events.show_cut)
    act.str("tag", view=types.TextFieldView(label="Tag"))
    act.btn("tag_cut", f"Tag {len(cut.ids):,}", icon="sell", variant="contained", on_click=events.tag_cut)
    act.btn("untag", "Untag", variant="outlined", on_click=events.untag_cut)
    others = [name for name in score_table(ctx).columns if name != field]
    if others:
        choice = types.DropdownView()
        for name in others:
            choice.add_choice(name, label=name)
        page.enum("other", choice.values(), label="Against", view=choice, on_change=events.choose_other)
        if get(ctx, "other") not in others:
            return
        page.md(
            "Each point is a pair. Hover over it for its caption, draw around some to see them in the grid.",
            name="point",
        )
        page.plot(
            "scatter",
            layout=scatter_layout(field, get(ctx, "other")),
            config={"displayModeBar": False, "scrollZoom": False},
            on_click=events.click_point,
            on_selected=events.select_points,
        )


def _ends(events: Any, ctx: Any, page: Any) -> None:
    direction = current_direction(ctx)
    if direction == "suspicious":  # the other end of misalignment is of no interest
        return
    ends = page.btn_group("ends")
    for end in ("harmful", "valuable"):
        ends.btn(
            end,
            f"Most {end}",
            variant="contained" if end == direction else "outlined",
            on_click=events.choose_direction,
            params={"direction": end},
        )


def ranking(events: Any, ctx: Any, page: Any) -> None:
    """The pairs at the chosen end of the score, some at a time."""
    field, board, first = current_field(ctx), score_table(ctx), get(ctx, "first") or 0
    direction = current_direction(ctx)
    _ends(events, ctx, page)
    ranked = board.cut(field, direction, 1.0).ids
    shown = ranked[first : first + _ROWS]
    of = f"{direction} pairs" if direction in SIGNS else f"pairs, the most {direction} first"
    page.md(f"**{first + 1:,} to {first + len(shown):,}** of {len(ranked):,} {of}", name="which")
    turn = start(page, "turn")
    leaf(turn, events.turn, _ROWS, first == 0, first + _ROWS >= len(ranked))
    turn.btn("show", "Show these in the grid", variant="outlined", on_click=events.show_pairs, params={"ids": shown})
    for number, card in enumerate(cards_of(ctx, shown).values()):
        draw_card(events, page, f"row_{number}", card, say_scores(ctx, card.id), tag_of(ctx))


def _strip(events: Any, ctx: Any, page: Any, name: str, links: list[Any], sign: int) -> None:
    """Some pairs below each other, each with a number in the colour of what it says."""
    values = {link.id: link.value for link in links}
    for number, card in enumerate(cards_of(ctx, values).values()):
        value = abs(values[card.id]) * (sign or 1)
        text = f"influence on it {value:+.2g}" if sign else f"similarity of the images {value:.2f}"
        draw_card(events, page, f"{name}_{number}", card, [(text, TOWARDS.get(sign))], height=64)


def pair(events: Any, ctx: Any, page: Any) -> None:
    """One pair in depth: its scores, whom it harms and helps, and what resembles it."""
    sample = get(ctx, "pair")
    cards = cards_of(ctx, [sample]) if sample else {}
    if not cards:
        page.md("Select one sample in the grid, or open a pair of the ranking", name="none")
        return
    from fiftyone_ecif.api.inspection import inspect_pair

    lines = say_scores(ctx, sample, run_fields(ctx))
    if not lines:
        said = f"No score: it is not among the pairs of run {get(ctx, 'key')!r}, but perhaps one of its targets"
        lines = [(said, None)]
    draw_card(events, page, "top", cards[sample], lines, tag_of(ctx), height=180, opens=False)
    inspection = inspect_pair(run_results(ctx), sample, _LINKS)
    for name, title, links, sign in (
        ("harms", "Validation pairs it harms most: its influence on each is negative", inspection.harms, -1),
        ("helps", "Validation pairs it helps most: its influence on each is positive", inspection.helps, 1),
        ("near", "Scored pairs with the most similar image", inspection.neighbours, 0),
    ):
        if links:
            page.md(f"**{title}**", name=f"{name}_title")
            _strip(events, ctx, page, name, links, sign)
    ids = [sample, *(link.id for link in (*inspection.harms, *inspection.helps, *inspection.neighbours))]
    page.btn(
        "show_pairs", "Show these in the grid", variant="outlined", on_click=events.show_pairs, params={"ids": ids}
    )


def review(events: Any, ctx: Any, page: Any) -> None:
    """Proposed pairs, one at a time, and what was learned from the answers."""
    from fiftyone_ecif.samples.review_tags import count_review_tags

    tags = count_review_tags(ctx.dataset, get(ctx, "key"))
    queue, place = get(ctx, "queue") or [], get(ctx, "place") or 0
    page.md(
        f"So far **{tags.aligned:,}** pairs are tagged `aligned` and **{tags.misaligned:,}** `misaligned`.",
        name="so_far",
    )
    if get(ctx, "learning"):
        page.md(f"**Learning from {tags.aligned + tags.misaligned:,} tags …**", name="learns")
        page.view("learn_now", types.TimerView(timeout=_SOON, on_timeout=events.learn_now))
        return
    if learned := get(ctx, "learned"):
        page.md(learned, name="learned")
    asking = place < len(queue)
    if asking:
        cards = cards_of(ctx, [queue[place]])
        asked = "Do image and caption belong together?" if cards else "It was deleted meanwhile."
        page.md(f"Pair {place + 1} of {len(queue)}. {asked}", name="question")
        for card in cards.values():
            draw_card(events, page, "card", card, say_scores(ctx, card.id), height=240, verdicts=False)
        answers = start(page, "answers")
        if cards:
            answers.btn("aligned", "Aligned (A)", icon="check", variant="contained", on_click=events.say_aligned)
            answers.btn(
                "misaligned", "Misaligned (M)", icon="link_off", variant="contained", on_click=events.say_misaligned
            )
        answers.btn("skip", "Skip (→)", icon="skip_next", variant="outlined", on_click=events.skip)
        answers.btn("back", "Back (←)", icon="undo", variant="outlined", on_click=events.back, disabled=place == 0)
    else:
        page.md(
            f"You will be shown {PROPOSALS} pairs, one at a time: those that the score is least sure of, and some "
            "from everywhere."
            if not queue
            else "That was the last one.",
            name="end",
        )
    act = start(page, "act")
    learns = tags.enough and (asking or bool(queue))
    if not asking:
        act.btn(
            "start",
            ("Propose more pairs" if queue else "Propose pairs") + " (Enter)" * (not learns),
            variant="outlined" if learns else "contained",
            on_click=events.start_review,
        )
    missing = [
        f"{LEAST - count} more {tag}"
        for tag, count in ((ALIGNED, tags.aligned), (MISALIGNED, tags.misaligned))
        if count < LEAST
    ]
    act.btn(
        "learn",
        f"Learn once there are {' and '.join(missing)}"
        if missing
        else f"Learn from the {tags.aligned + tags.misaligned:,} tags" + " (Enter)" * learns,
        icon="model_training",
        variant="contained" if learns and not asking else "outlined",
        on_click=events.learn,
        disabled=bool(missing),
    )


def run(events: Any, ctx: Any, page: Any) -> None:
    """How far to trust the run, what it is, and what to do next."""
    from fiftyone_ecif.runs.describe import describe_run
    from fiftyone_ecif.runs.diagnostics import diagnose, judge
    from fiftyone_ecif.runs.manage import staleness

    key, results = get(ctx, "key"), run_results(ctx)
    if edit := results.diagnostics.get("edit"):
        from fiftyone_ecif.api.editing import Edit

        page.md(f"**Last edit of the model**\n\n{plain(str(Edit(**edit)))}", name="edit")
    stale = staleness(ctx.dataset, key)
    remarks = diagnose(results.config, results.diagnostics)
    verdict = judge(remarks, results.diagnostics, len(results.ids), stale)
    page.md(
        f"### {verdict.title}\n\n{in_words(verdict.why)}",
        name="verdict",
        componentsProps={"container": {"sx": {"color": _VERDICTS[verdict.trust]}}},
    )
    info, config = ctx.dataset.get_brain_info(key), results.config
    weights = f" with {config.pretrained}" if config.pretrained else ""
    page.md(
        plain(
            f"{config.model}{weights}, {info.timestamp:%Y-%m-%d %H:%M} UTC. {len(results.ids):,} pairs scored, "
            f"{len(results.skipped):,} skipped, captions in {config.caption_field!r}"
        ),
        name="what",
    )
    page.md("**What to do next**", name="next_title")
    next_steps = start(page, "next")
    run = {"brain_key": key}
    offers = [
        ("tag_by_influence", "Tag", {"field": current_field(ctx), "direction": current_direction(ctx)}),
        ("export_pairs", "Export", {"caption_field": results.config.caption_field}),
        ("manage_influence_runs", "Manage runs", run),
    ]
    if not is_misalignment(ctx):
        offers[2:2] = [("trace_predictions", "Trace mistakes", run), ("edit_model", "Edit model", run)]
    for name, label, prefill in offers:
        params = {"operator": name, "prefill": prefill}
        next_steps.btn(name, label, variant="outlined", on_click=events.prompt, params=params)
    details = bool(get(ctx, "details"))
    page.btn("details", "Hide the numbers" if details else "Show the numbers", variant="outlined", on_click=events.fold)
    if not details:
        return
    lines = [f"- {'✓' if remark.fine else '⚠'} {in_words(remark.text)}." for remark in remarks]
    if any(stale):
        lines.append(f"- ⚠ Since it was made: {stale}. Run it again for scores of the pairs as they are now.")
    for reason, count in Counter(results.skipped.values()).most_common(3):
        lines.append(f"- {count:,} skipped: {plain(reason)}")
    page.md("\n".join(lines), name="trust")
    page.md(in_words(describe_run(ctx.dataset, key)), name=f"about_{key}")


#: What draws each page.
DRAW = {"overview": overview, "ranking": ranking, "pair": pair, "trace": draw_trace, "review": review, "run": run}
