"""What the pages of the Influence panel look like. Their buttons fire the panel's events."""

from __future__ import annotations

from collections import Counter
from typing import Any

import fiftyone.operators.types as types

from fiftyone_ecif.samples.selection import SIGNS, whole_pairs

from ..jobs import running_jobs
from ..wording import in_words
from .state import (
    PAGES,
    current_cut,
    current_field,
    current_page,
    get,
    is_misalignment,
    pairs_of,
    plain,
    run_fields,
    run_keys,
    run_results,
    score_table,
    value_of,
)

PROPOSALS = 20  # pairs to review at a time
_ROWS = 6  # pairs of the ranking on one screen
_LINKS = 4  # pairs in a strip
_PATIENCE = 2500  # milliseconds between two looks at jobs


def nothing_yet(events: Any, page: Any, waiting: bool) -> None:
    """The page where there are no scores: what can be computed."""
    if waiting:
        page.md("The scores appear here once they are there.", name="waiting")
        return
    page.md(
        "**No scores yet**\n\n"
        "**Compute ECIF influence** says which pairs help a model on validation pairs of your choice, and which "
        "hurt.\n\n**Detect misaligned pairs** says which captions do not belong to their image.",
        name="nothing",
    )
    buttons = page.h_stack("start", gap=1)
    buttons.btn(
        "influence",
        "Compute ECIF influence",
        variant="contained",
        on_click=events.prompt,
        params={"operator": "compute_influence"},
    )
    buttons.btn(
        "misalignment",
        "Detect misaligned pairs",
        variant="outlined",
        on_click=events.prompt,
        params={"operator": "detect_misalignment"},
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
    """Jobs that run, each with how far it is and a button to stop it."""
    jobs = running_jobs(ctx)
    for number, (key, job) in enumerate(jobs.items()):
        row = page.h_stack(f"job_{number}", gap=1, align_y="center")
        row.md(f"**{job['name']}** {job['progress']:.0%} · {job['label']}", name="label")
        row.btn("stop", "Stop", icon="stop", variant="outlined", on_click=events.stop, params={"job": key})
    ctx.panel.set_state("busy", bool(jobs))
    page.view("timer", types.TimerView(interval=_PATIENCE, on_interval=events.look_for_jobs))


def head(events: Any, ctx: Any, page: Any) -> None:
    """Which run, which score and which page is shown."""
    head = page.h_stack("head", gap=1, width="100%")
    runs = types.DropdownView(space=6)
    for key in run_keys(ctx):
        runs.add_choice(key, label=f"{key}: {ctx.dataset.get_brain_info(key).config.type}")
    head.enum("key", runs.values(), label="Run", view=runs, on_change=events.choose_run)
    fields = types.DropdownView(space=6)
    for field in run_fields(ctx):
        fields.add_choice(field, label=field)
    head.enum("field", fields.values(), label="Score", view=fields, on_change=events.choose_field)
    pages = types.TabsView()
    for name, label in PAGES.items():
        if name != "review" or is_misalignment(ctx):
            pages.add_choice(name, label=label)
    name = f"page_{get(ctx, 'turns') or 0}"  # tabs follow only what is clicked: another page needs other tabs
    page.enum(name, pages.values(), default=current_page(ctx), view=pages, on_change=events.choose_page)


def overview(events: Any, ctx: Any, page: Any) -> None:
    """How a score is distributed, what a cut takes, and the score against another one."""
    from .plots import histogram_layout, scatter_layout

    field, direction = current_field(ctx), get(ctx, "direction")
    page.md(f"{ctx.dataset.get_field(field).description}.", name="meaning")
    page.plot(
        "histogram",
        layout=histogram_layout(score_table(ctx), field),
        config={"displayModeBar": False},
        on_click=events.click_bar,
        on_selected=events.select_bars,
    )
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
            config={"displayModeBar": False},
            on_click=events.click_point,
            on_selected=events.select_points,
        )


def _ends(events: Any, ctx: Any, page: Any) -> None:
    direction = get(ctx, "direction")
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
    _ends(events, ctx, page)
    ranked = board.cut(field, get(ctx, "direction"), 1.0).ids
    shown = ranked[first : first + _ROWS]
    page.md(f"**{first + 1:,} to {first + len(shown):,}** of {len(ranked):,}", name="which")
    for number, (sample, (image, caption)) in enumerate(pairs_of(ctx, shown).items()):
        row = page.h_stack(f"row_{number}", gap=1, align_y="center")
        row.str("image", default=image, view=types.ImageView(height="56px", width="56px", alt=caption))
        row.btn("look", "Look", variant="outlined", on_click=events.look, params={"id": sample})
        row.md(f"{plain(caption)}\n\n`{board.value(field, sample):.4g}`", name="text")
    turn = page.h_stack("turn", gap=1)
    turn.btn("back", "Previous", on_click=events.turn, params={"by": -_ROWS}, disabled=first == 0)
    turn.btn("on", "Next", on_click=events.turn, params={"by": _ROWS}, disabled=first + _ROWS >= len(ranked))
    turn.btn("show", "Show these in the grid", variant="outlined", on_click=events.show_pairs, params={"ids": shown})


def _strip(events: Any, ctx: Any, page: Any, name: str, links: list[Any], word: str) -> None:
    """Some pairs side by side; a click on an image looks at its pair."""
    strip = page.h_stack(name, gap=1)
    values = {link.id: link.value for link in links}
    for number, (sample, (image, caption)) in enumerate(pairs_of(ctx, list(values)).items()):
        cell = strip.v_stack(f"cell_{number}", width="104px")
        cell.img("image", on_click=events.look, params={"id": sample}, height="72px", alt_text=caption)
        cell.get_property("image").default = image
        cell.md(f"{plain(caption)}\n\n`{word}{abs(values[sample]):.2g}`", name="text")


def pair(events: Any, ctx: Any, page: Any) -> None:
    """One pair in depth: its scores, whom it harms and helps, and what resembles it."""
    sample, board = get(ctx, "pair"), score_table(ctx)
    shown = pairs_of(ctx, [sample]) if sample else {}
    if not shown:
        page.md("Select one sample in the grid, or press **Look** in the ranking", name="none")
        return
    from fiftyone_ecif.api.inspection import inspect_pair

    results = run_results(ctx)
    image, caption = shown[sample]
    top = page.h_stack("top", gap=2)
    top.str("image", default=image, view=types.ImageView(height="150px", alt=caption))
    lines = [f"**{plain(caption)}**", ""]
    for field in run_fields(ctx):
        value = board.value(field, sample)
        if value is not None:
            place, end = board.place(field, sample)
            lines.append(f"- `{field}` **{value:.4g}**, no. {place:,} from the {end}")
    if len(lines) == 2:
        lines.append(f"No score: it is not among the pairs of run `{get(ctx, 'key')}`, but perhaps one of its targets")
    reason = value_of(ctx, sample, f"{get(ctx, 'key')}_reason")
    if reason:
        lines.append(f"\nAgainst it: {reason}")
    top.md("\n".join(lines), name="numbers")
    inspection = inspect_pair(results, sample, _LINKS)
    for name, title, links, word in (
        ("harms", "Validation pairs it harms most: its influence on each is negative", inspection.harms, "-"),
        ("helps", "Validation pairs it helps most: its influence on each is positive", inspection.helps, "+"),
        ("near", "Scored pairs with the most similar image", inspection.neighbours, ""),
    ):
        if links:
            page.md(f"**{title}**", name=f"{name}_title")
            _strip(events, ctx, page, name, links, word)
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
    if place < len(queue):
        shown = pairs_of(ctx, [queue[place]])
        asked = "Do image and caption belong together?" if shown else "It was deleted meanwhile."
        page.md(f"Pair {place + 1} of {len(queue)}. {asked}", name="question")
        for image, caption in shown.values():
            page.str("image", default=image, view=types.ImageView(height="260px", alt=caption))
            page.md(f"**{plain(caption)}**", name="caption")
        answers = page.h_stack("answers", gap=1)
        if shown:
            answers.btn("aligned", "Aligned", icon="check", variant="contained", on_click=events.say_aligned)
            answers.btn(
                "misaligned", "Misaligned", icon="link_off", variant="contained", on_click=events.say_misaligned
            )
        answers.btn("skip", "Skip", icon="skip_next", variant="outlined", on_click=events.skip)
        answers.btn("back", "Back", icon="undo", variant="outlined", on_click=events.back, disabled=place == 0)
    else:
        page.md(
            f"You will be shown {PROPOSALS} pairs, one at a time: those that the score is least sure of, and some "
            "from everywhere."
            if not queue
            else "That was the last one.",
            name="end",
        )
    act = page.h_stack("act", gap=1)
    if place >= len(queue):
        act.btn(
            "start",
            "Propose more pairs" if queue else "Propose pairs",
            variant="outlined" if tags.enough else "contained",
            on_click=events.start_review,
        )
    act.btn(
        "learn",
        "Learn from the tags",
        icon="model_training",
        variant="contained" if place >= len(queue) and queue else "outlined",
        on_click=events.learn,
        disabled=not tags.enough,
    )
    if learned := get(ctx, "learned"):
        page.md(learned, name="learned")


def run(events: Any, ctx: Any, page: Any) -> None:
    """How far to trust the run, and what to do next."""
    from fiftyone_ecif.api.editing import Edit
    from fiftyone_ecif.runs.diagnostics import diagnose
    from fiftyone_ecif.runs.manage import staleness

    key, results = get(ctx, "key"), run_results(ctx)
    lines = [f"**How far to trust it**: {len(results.ids):,} pairs scored, {len(results.skipped):,} skipped", ""]
    for remark in diagnose(results.config, results.diagnostics):
        lines.append(f"- {'✓' if remark.fine else '⚠'} {in_words(remark.text)}.")
    stale = staleness(ctx.dataset, key)
    if any(stale):
        lines.append(f"- ⚠ Since it was made: {stale}. Run it again for scores of the pairs as they are now.")
    for reason, count in Counter(results.skipped.values()).most_common(3):
        lines.append(f"- {count:,} skipped: {plain(reason)}")
    page.md("\n".join(lines), name="trust")
    if edit := results.diagnostics.get("edit"):
        page.md(f"**Last edit of the model**\n\n{plain(str(Edit(**edit)))}", name="edit")
    page.md("**What to do next**", name="next_title")
    next_steps = page.h_stack("next", gap=1)
    run = {"brain_key": key}
    offers = [
        ("tag_by_influence", "Tag", {"field": current_field(ctx), "direction": get(ctx, "direction")}),
        ("export_pairs", "Export", {"caption_field": results.config.caption_field}),
        ("manage_influence_runs", "Manage runs", run),
    ]
    if not is_misalignment(ctx):
        offers[2:2] = [("trace_predictions", "Trace mistakes", run), ("edit_model", "Edit model", run)]
    for name, label, prefill in offers:
        params = {"operator": name, "prefill": prefill}
        next_steps.btn(name, label, variant="outlined", on_click=events.prompt, params=params)


#: What draws each page.
DRAW = {"overview": overview, "ranking": ranking, "pair": pair, "review": review, "run": run}
