"""The panel beside the grid: scores at a glance, one pair in depth, review, and what to think of a run."""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.parse import quote

import fiftyone.operators as foo
import fiftyone.operators.types as types

from fiftyone_ecif.errors import EcifError

from .forms import MISSING
from .jobs import has_jobs, running_jobs, show_finished_jobs, stop_job

_PAGES = {"overview": "Overview", "ranking": "Ranking", "pair": "Pair", "review": "Review", "run": "Run"}
_ROWS = 7  # pairs of the ranking on one screen
_LINKS = 4  # pairs in a strip
_GROUPS = 5  # tags with a colour of their own
_PROPOSALS = 20
_PATIENCE = 2500  # milliseconds between two looks at jobs
_MARGIN = {"componentsProps": {"container": {"sx": {"px": 2, "pt": 1, "pb": 4}}}}
_URI = "@ecif/fiftyone-ecif/"
_HELP = """**Overview**: how a score is distributed. Drag over a plot to see those pairs in the grid; move the slider to
see what a cut would tag.

**Ranking**: the pairs at the chosen end of the score, the most extreme ones first.

**Pair**: one pair in depth. Select one sample in the grid, or press *Look* in the ranking.

**Review**: say of proposed pairs whether image and caption belong together, then let the score learn from it.

**Run**: how far to trust the numbers, and what to do next."""


class InfluencePanel(foo.Panel):
    """Explores and acts on the scores of influence and misalignment runs."""

    @property
    def config(self) -> foo.PanelConfig:
        return foo.PanelConfig(
            name="influence_panel",
            label="Influence",
            icon="insights",
            help_markdown=_HELP,
            category=foo.Categories.CURATE,
        )

    def execute(self, ctx: Any) -> Any:
        """Runs an event and draws the panel anew; a failure is shown as a notice."""
        idle = not (_get(ctx, "busy") or has_jobs(ctx))
        if ctx.params.get("__method__") == "look_for_jobs" and idle:
            return None
        try:
            return super().execute(ctx)
        except EcifError as error:
            ctx.ops.notify(str(error), variant="error")
            return None

    # what happens in the App

    def on_load(self, ctx: Any) -> None:
        """Opens the run that was shown last, or the newest one."""
        show_finished_jobs(ctx, moving=False)
        keys = _keys(ctx)
        _choose_run(ctx, _get(ctx, "key") if _get(ctx, "key") in keys else keys[-1] if keys else None)

    def on_change_dataset(self, ctx: Any) -> None:
        """Starts anew on another dataset."""
        for name in ("pair", "queue", "selected"):
            ctx.panel.set_state(name, None)
        self.on_load(ctx)

    def on_change_selected(self, ctx: Any) -> None:
        """Marks what is selected in the grid; a single pair is looked at."""
        _take_selected(ctx)
        _draw_scatter(ctx)

    # choices

    def choose_run(self, ctx: Any) -> None:
        """Another run."""
        _choose_run(ctx, ctx.params["value"])

    def choose_page(self, ctx: Any) -> None:
        """Another page."""
        _take_selected(ctx)
        _turn_to(ctx, ctx.params["value"])

    def choose_field(self, ctx: Any) -> None:
        """Another score."""
        _choose_field(ctx, ctx.params["value"])

    def choose_direction(self, ctx: Any) -> None:
        """The other end of the score."""
        ctx.panel.set_state("direction", ctx.params["direction"])
        ctx.panel.set_state("tag", ctx.params["direction"])
        ctx.panel.set_state("first", 0)
        _draw_histogram(ctx)

    def choose_share(self, ctx: Any) -> None:
        """How much the cut takes."""
        ctx.panel.set_state("share", ctx.params["value"])
        _draw_histogram(ctx)

    def choose_other(self, ctx: Any) -> None:
        """The vertical score of the scatter plot."""
        ctx.panel.set_state("other", ctx.params["value"])
        _draw_scatter(ctx)

    def choose_tag(self, ctx: Any) -> None:
        """What the cut is tagged as."""
        ctx.panel.set_state("tag", ctx.params["value"])

    # plots that drive the grid

    def click_bar(self, ctx: Any) -> None:
        """Shows the pairs of a bar."""
        _show_bins(ctx, [ctx.params["idx"]])

    def select_bars(self, ctx: Any) -> None:
        """Shows the pairs of several bars."""
        if bars := ctx.params.get("data"):
            _show_bins(ctx, [bar["idx"] for bar in bars])

    def click_point(self, ctx: Any) -> None:
        """Looks at the pair of a point."""
        if ctx.params.get("id"):
            _look(ctx, ctx.params["id"])

    def select_points(self, ctx: Any) -> None:
        """Shows the pairs of a lasso."""
        ids = [point["id"] for point in ctx.params.get("data") or [] if point.get("id")]
        if ids:
            _show(ctx, _ordered(ctx, ids))

    # the cut

    def show_cut(self, ctx: Any) -> None:
        """Shows what the cut takes, the extreme ones first."""
        _show(ctx, _cut(ctx).ids)

    def tag_cut(self, ctx: Any) -> None:
        """Tags what the cut takes."""
        _tag(ctx, untag=False)

    def untag_cut(self, ctx: Any) -> None:
        """Takes the tag from what the cut takes."""
        _tag(ctx, untag=True)

    def turn(self, ctx: Any) -> None:
        """Turns to other places of the ranking."""
        ctx.panel.set_state("first", max(0, (_get(ctx, "first") or 0) + ctx.params["by"]))

    def look(self, ctx: Any) -> None:
        """Looks at the pair of a button."""
        _look(ctx, ctx.params["id"])

    def show_pairs(self, ctx: Any) -> None:
        """Shows the pairs of a button."""
        _show(ctx, ctx.params["ids"])

    # review

    def start_review(self, ctx: Any) -> None:
        """Proposes pairs to look at."""
        _propose(ctx)

    def say_aligned(self, ctx: Any) -> None:
        """The pair that is shown belongs together."""
        _say(ctx, "aligned")

    def say_misaligned(self, ctx: Any) -> None:
        """It does not."""
        _say(ctx, "misaligned")

    def skip(self, ctx: Any) -> None:
        """Leaves it open."""
        _say(ctx, None)

    def back(self, ctx: Any) -> None:
        """Takes the last answer back."""
        place = max(0, (_get(ctx, "place") or 0) - 1)
        ctx.panel.set_state("place", place)
        from fiftyone_ecif.verdicts import say

        say(ctx.dataset, _get(ctx, "queue")[place], None)

    def learn(self, ctx: Any) -> None:
        """Refits the score to what was said."""
        _learn(ctx)

    # other operators

    def prompt(self, ctx: Any) -> None:
        """Opens the form of an operator, filled in with the run."""
        ctx.prompt(_URI + ctx.params["operator"], params=ctx.params.get("prefill") or {}, on_success=self.refresh)

    def refresh(self, ctx: Any) -> None:
        """Reads everything anew."""
        ctx.dataset.reload()
        self.on_load(ctx)

    def stop(self, ctx: Any) -> None:
        """Stops a job."""
        stop_job(ctx, ctx.params["job"])
        ctx.ops.notify("Stopping at the next step. What was computed so far is kept", variant="info")

    # what is on the screen

    def render(self, ctx: Any) -> types.Property:
        """The page."""
        panel = types.Object()
        if MISSING:
            panel.md(f"{', '.join(MISSING)} cannot be imported. Run `pip install fiftyone-ecif`", name="missing")
        elif ctx.dataset is None:
            panel.md("Open a dataset first", name="nothing")
        else:
            self._jobs(ctx, panel)
            if _get(ctx, "key") in _keys(ctx):
                self._head(ctx, panel)
                {
                    "overview": self._overview,
                    "ranking": self._ranking,
                    "pair": self._pair,
                    "review": self._review,
                    "run": self._run,
                }[_page(ctx)](ctx, panel)
            else:
                self._nothing_yet(panel)
        return types.Property(panel, view=types.GridView(orientation="vertical", gap=1, **_MARGIN))

    def _nothing_yet(self, panel: Any) -> None:
        panel.md(
            "**No scores yet**\n\n"
            "**Compute ECIF influence** says which pairs help a model on validation pairs of your choice, and which "
            "hurt.\n\n**Detect misaligned pairs** says which captions do not belong to their image.",
            name="nothing",
        )
        buttons = panel.h_stack("start", gap=1)
        buttons.btn(
            "influence",
            "Compute ECIF influence",
            variant="contained",
            on_click=self.prompt,
            params={"operator": "compute_influence"},
        )
        buttons.btn(
            "misalignment",
            "Detect misaligned pairs",
            variant="outlined",
            on_click=self.prompt,
            params={"operator": "detect_misalignment"},
        )

    def _jobs(self, ctx: Any, panel: Any) -> None:
        jobs = running_jobs(ctx)
        for number, (key, job) in enumerate(jobs.items()):
            row = panel.h_stack(f"job_{number}", gap=1, align_y="center")
            row.md(f"**{job['name']}** {job['progress']:.0%} · {job['label']}", name="label")
            row.btn("stop", "Stop", icon="stop", variant="outlined", on_click=self.stop, params={"job": key})
        ctx.panel.set_state("busy", bool(jobs))
        panel.view("timer", types.TimerView(interval=_PATIENCE, on_interval=self.look_for_jobs))

    def look_for_jobs(self, ctx: Any) -> None:
        """Looks what jobs do, every few seconds; once one has ended, the scores are read anew."""
        if show_finished_jobs(ctx) or not running_jobs(ctx):
            self.refresh(ctx)

    def _head(self, ctx: Any, panel: Any) -> None:
        head = panel.h_stack("head", gap=1, width="100%")
        runs = types.DropdownView(space=6)
        for key in _keys(ctx):
            runs.add_choice(key, label=f"{key}: {ctx.dataset.get_brain_info(key).config.type}")
        head.enum("key", runs.values(), default=_get(ctx, "key"), label="Run", view=runs, on_change=self.choose_run)
        fields = types.DropdownView(space=6)
        for field in _fields(ctx):
            fields.add_choice(field, label=field)
        head.enum(
            "field",
            fields.values(),
            default=_get(ctx, "field"),
            label="Score",
            view=fields,
            on_change=self.choose_field,
        )
        pages = types.TabsView()
        for name, label in _PAGES.items():
            if name != "review" or _is_audit(ctx):
                pages.add_choice(name, label=label)
        name = f"page_{_get(ctx, 'turns') or 0}"  # tabs follow only what is clicked: another page needs other tabs
        panel.enum(name, pages.values(), default=_page(ctx), view=pages, on_change=self.choose_page)

    def _overview(self, ctx: Any, panel: Any) -> None:
        from .plots import histogram_layout, scatter_layout

        field, direction = _get(ctx, "field"), _get(ctx, "direction")
        panel.md(f"{ctx.dataset.get_field(field).description}.", name="meaning")
        panel.plot(
            "histogram",
            layout=histogram_layout(field),
            config={"displayModeBar": False},
            on_click=self.click_bar,
            on_selected=self.select_bars,
        )
        self._ends(ctx, panel)
        share = types.SliderView(
            label=f"The most {direction}: {_get(ctx, 'share') or 0:.1f} % of the pairs",
            label_position="top",
            value_label_display="auto",
            value_precision=1,
        )
        panel.float("share", min=0, max=50, view=share, on_change=self.choose_share)
        cut = _cut(ctx)
        side = "below" if direction == "harmful" else "above"
        bound = "" if cut.threshold is None else f", with a score of {cut.threshold:.4g} and {side}"
        panel.md(f"**{len(cut.ids):,} pairs**{bound}", name="cut")
        act = panel.h_stack("act", gap=1, align_y="center")
        act.btn("show", "Show", icon="visibility", variant="outlined", on_click=self.show_cut)
        act.str("tag", default=_get(ctx, "tag"), view=types.TextFieldView(label="Tag"), on_change=self.choose_tag)
        act.btn("tag_cut", f"Tag {len(cut.ids):,}", icon="sell", variant="contained", on_click=self.tag_cut)
        act.btn("untag", "Untag", variant="outlined", on_click=self.untag_cut)
        others = [name for name in _board(ctx).columns if name != field]
        if others:
            choice = types.DropdownView()
            for name in others:
                choice.add_choice(name, label=name)
            panel.enum(
                "other",
                choice.values(),
                default=_get(ctx, "other"),
                label="Against",
                view=choice,
                on_change=self.choose_other,
            )
            panel.plot(
                "scatter",
                layout=scatter_layout(field, _get(ctx, "other")),
                config={"displayModeBar": False},
                on_click=self.click_point,
                on_selected=self.select_points,
            )

    def _ends(self, ctx: Any, panel: Any) -> None:
        direction = _get(ctx, "direction")
        if direction == "suspicious":  # the other end of misalignment is of no interest
            return
        ends = panel.btn_group("ends")
        for end in ("harmful", "valuable"):
            ends.btn(
                end,
                f"Most {end}",
                variant="contained" if end == direction else "outlined",
                on_click=self.choose_direction,
                params={"direction": end},
            )

    def _ranking(self, ctx: Any, panel: Any) -> None:
        field, board, first = _get(ctx, "field"), _board(ctx), _get(ctx, "first") or 0
        self._ends(ctx, panel)
        ranked = board.cut(field, _get(ctx, "direction"), 1.0).ids
        shown = ranked[first : first + _ROWS]
        panel.md(f"**{first + 1:,} to {first + len(shown):,}** of {len(ranked):,}", name="which")
        for number, (sample, (image, caption)) in enumerate(_pairs(ctx, shown).items()):
            row = panel.h_stack(f"row_{number}", gap=1, align_y="center")
            row.str("image", default=image, view=types.ImageView(height="64px", width="64px", alt=caption))
            row.btn("look", "Look", variant="outlined", on_click=self.look, params={"id": sample})
            row.md(f"{_plain(caption)}\n\n`{board.value(field, sample):.4g}`", name="text")
        turn = panel.h_stack("turn", gap=1)
        turn.btn("back", "Previous", on_click=self.turn, params={"by": -_ROWS}, disabled=first == 0)
        turn.btn("on", "Next", on_click=self.turn, params={"by": _ROWS}, disabled=first + _ROWS >= len(ranked))
        turn.btn("show", "Show these in the grid", variant="outlined", on_click=self.show_pairs, params={"ids": shown})

    def _strip(self, ctx: Any, panel: Any, name: str, links: list[Any], word: str) -> None:
        """Some pairs side by side; a click on an image looks at its pair."""
        strip = panel.h_stack(name, gap=1)
        values = {link.id: link.value for link in links}
        for number, (sample, (image, caption)) in enumerate(_pairs(ctx, list(values)).items()):
            cell = strip.v_stack(f"cell_{number}", width="104px")
            cell.img("image", on_click=self.look, params={"id": sample}, height="72px", alt_text=caption)
            cell.get_property("image").default = image
            cell.md(f"{_plain(caption)}\n\n`{word}{abs(values[sample]):.2g}`", name="text")

    def _pair(self, ctx: Any, panel: Any) -> None:
        sample, board = _get(ctx, "pair"), _board(ctx)
        if sample is None or board.value(_get(ctx, "field"), sample) is None:
            panel.md("Select one scored sample in the grid, or press **Look** in the ranking", name="none")
            return
        from fiftyone_ecif.portrait import look_at

        results = _results(ctx)
        ((image, caption),) = _pairs(ctx, [sample]).values()
        top = panel.h_stack("top", gap=2)
        top.str("image", default=image, view=types.ImageView(height="150px", alt=caption))
        lines = [f"**{_plain(caption)}**", ""]
        for field in _fields(ctx):
            value = board.value(field, sample)
            if value is not None:
                place, end = board.place(field, sample)
                lines.append(f"- `{field}` **{value:.4g}**, no. {place:,} from the {end}")
        reason = _value(ctx, sample, f"{_get(ctx, 'key')}_reason")
        if reason:
            lines.append(f"\nAgainst it: {reason}")
        top.md("\n".join(lines), name="numbers")
        portrait = look_at(results, sample, _LINKS)
        for name, title, links, word in (
            ("harms", "Validation pairs it harms most, and by how many nats", portrait.harms, "+"),
            ("helps", "Validation pairs it helps most", portrait.helps, "-"),
            ("near", "Scored pairs with the most similar image", portrait.neighbours, ""),
        ):
            if links:
                panel.md(f"**{title}**", name=f"{name}_title")
                self._strip(ctx, panel, name, links, word)
        ids = [sample, *(link.id for link in (*portrait.harms, *portrait.helps, *portrait.neighbours))]
        panel.btn(
            "show_pairs", "Show these in the grid", variant="outlined", on_click=self.show_pairs, params={"ids": ids}
        )

    def _review(self, ctx: Any, panel: Any) -> None:
        from fiftyone_ecif.verdicts import count_verdicts

        verdicts = count_verdicts(ctx.dataset, _get(ctx, "key"))
        queue, place = _get(ctx, "queue") or [], _get(ctx, "place") or 0
        panel.md(
            f"So far **{verdicts.aligned:,}** pairs are tagged `aligned` and **{verdicts.misaligned:,}** `misaligned`.",
            name="so_far",
        )
        if place < len(queue):
            sample = queue[place]
            ((image, caption),) = _pairs(ctx, [sample]).values()
            panel.md(f"Pair {place + 1} of {len(queue)}. Do image and caption belong together?", name="question")
            panel.str("image", default=image, view=types.ImageView(height="260px", alt=caption))
            panel.md(f"**{_plain(caption)}**", name="caption")
            answers = panel.h_stack("answers", gap=1)
            answers.btn("aligned", "Aligned", icon="check", variant="contained", on_click=self.say_aligned)
            answers.btn("misaligned", "Misaligned", icon="link_off", variant="contained", on_click=self.say_misaligned)
            answers.btn("skip", "Skip", icon="skip_next", variant="outlined", on_click=self.skip)
            answers.btn("back", "Back", icon="undo", variant="outlined", on_click=self.back, disabled=place == 0)
        else:
            panel.md(
                f"You will be shown {_PROPOSALS} pairs, one at a time: those that the score is least sure of, and some "
                "from everywhere."
                if not queue
                else "That was the last one.",
                name="end",
            )
        act = panel.h_stack("act", gap=1)
        if place >= len(queue):
            act.btn(
                "start",
                "Propose more pairs" if queue else "Propose pairs",
                variant="outlined" if verdicts.enough else "contained",
                on_click=self.start_review,
            )
        act.btn(
            "learn",
            "Learn from the tags",
            icon="model_training",
            variant="contained" if place >= len(queue) and queue else "outlined",
            on_click=self.learn,
            disabled=not verdicts.enough,
        )
        if learned := _get(ctx, "learned"):
            panel.md(learned, name="learned")

    def _run(self, ctx: Any, panel: Any) -> None:
        from fiftyone_ecif.catalogue import staleness
        from fiftyone_ecif.diagnosis import diagnose

        key, results = _get(ctx, "key"), _results(ctx)
        lines = [f"**How far to trust it**: {len(results.ids):,} pairs scored, {len(results.skipped):,} skipped", ""]
        for remark in diagnose(results.config, results.diagnostics):
            lines.append(f"- {'✓' if remark.fine else '⚠'} {remark.text}.")
        stale = staleness(ctx.dataset, key)
        if any(stale):
            lines.append(f"- ⚠ Since it was made: {stale}. Run it again for scores of the pairs as they are now.")
        for reason, count in Counter(results.skipped.values()).most_common(3):
            lines.append(f"- {count:,} skipped: {_plain(reason)}")
        panel.md("\n".join(lines), name="trust")
        panel.md("**What to do next**", name="next_title")
        next_steps = panel.h_stack("next", gap=1)
        run = {"brain_key": key}
        offers = [
            ("tag_by_influence", "Tag", {"field": _get(ctx, "field"), "direction": _get(ctx, "direction")}),
            ("export_pairs", "Export", {"caption_field": results.config.caption_field}),
            ("manage_influence_runs", "Manage runs", run),
        ]
        if not _is_audit(ctx):
            offers[2:2] = [("trace_predictions", "Trace mistakes", run), ("edit_model", "Edit model", run)]
        for name, label, prefill in offers:
            params = {"operator": name, "prefill": prefill}
            next_steps.btn(name, label, variant="outlined", on_click=self.prompt, params=params)


# state and data


def _get(ctx: Any, name: str) -> Any:
    return ctx.panel.get_state(name)


def _page(ctx: Any) -> str:
    page = _get(ctx, "page")
    return page if page in _PAGES and (page != "review" or _is_audit(ctx)) else "overview"


def _keys(ctx: Any) -> list[str]:
    return list(ctx.dataset.list_brain_runs(method="ecif")) if ctx.dataset is not None else []


def _config(ctx: Any) -> Any:
    return ctx.dataset.get_brain_info(_get(ctx, "key")).config


def _is_audit(ctx: Any) -> bool:
    return bool(_config(ctx).type == "misalignment")


def _results(ctx: Any) -> Any:
    return ctx.dataset.load_brain_results(_get(ctx, "key"))


def _board(ctx: Any) -> Any:
    from fiftyone_ecif.scoreboard import read_scoreboard

    return read_scoreboard(ctx.dataset)


def _fields(ctx: Any) -> list[str]:
    from fiftyone_ecif.scoreboard import score_fields

    return score_fields(ctx.dataset, _get(ctx, "key"), _config(ctx))


def _cut(ctx: Any) -> Any:
    return _board(ctx).cut(_get(ctx, "field"), _get(ctx, "direction"), (_get(ctx, "share") or 0) / 100)


def _choose_run(ctx: Any, key: str | None) -> None:
    ctx.panel.set_state("key", key)
    if key is None:
        return
    ctx.panel.set_state("head.key", key)
    for name in ("queue", "learned"):
        ctx.panel.set_state(name, None)
    fields = _fields(ctx)
    if fields:
        _choose_field(ctx, fields[0])


def _choose_field(ctx: Any, field: str) -> None:
    config = _config(ctx)
    direction = "suspicious" if config.type == "misalignment" else "harmful"
    others = [name for name in _board(ctx).columns if name != field]
    across = [name for name in others if name not in _fields(ctx)]
    share = 5.0
    if config.type == "misalignment":
        share = round(100 * min(0.5, _results(ctx).noise_rate.rate), 1)
    for name, value in (
        ("field", field),
        ("head.field", field),
        ("direction", direction),
        ("share", share),
        ("tag", "suspect" if direction == "suspicious" else direction),
        ("other", (across or others or [None])[0]),
        ("first", 0),
    ):
        ctx.panel.set_state(name, value)
    _draw(ctx)


def _turn_to(ctx: Any, page: str) -> None:
    ctx.panel.set_state("page", page)
    if page == "overview":
        _draw(ctx)


def _draw(ctx: Any) -> None:
    _draw_histogram(ctx)
    _draw_scatter(ctx)


def _draw_histogram(ctx: Any) -> None:
    from .plots import histogram_bars

    bars = histogram_bars(_board(ctx), _get(ctx, "field"), _get(ctx, "direction"), _cut(ctx).threshold)
    ctx.panel.set_data("histogram", bars)


def _draw_scatter(ctx: Any) -> None:
    from .plots import scatter_points

    other = _get(ctx, "other")
    if other is None or _get(ctx, "key") not in _keys(ctx):
        return
    board = _board(ctx)
    counts = ctx.dataset.select(board.ids.tolist()).count_sample_tags()
    rarest = sorted((tag for tag in counts if counts[tag] < len(board.ids)), key=counts.__getitem__)[:_GROUPS]
    groups = {tag: set(ctx.dataset.match_tags(tag).values("id")) for tag in rarest}
    points = scatter_points(board, _get(ctx, "field"), other, groups, ctx.selected or [])
    ctx.panel.set_data("scatter", points)


def _pairs(ctx: Any, ids: list[str]) -> dict[str, tuple[str, str]]:
    """Address of the image and caption of some samples, in their order; without those that are gone."""
    media = ctx.dataset.app_config.grid_media_field or "filepath"
    view = ctx.dataset.select(list(dict.fromkeys(ids)), ordered=True)
    rows = zip(*view.values(["id", media, _config(ctx).caption_field]), strict=True)
    return {sample: (f"/media?filepath={quote(path)}", caption or "") for sample, path, caption in rows}


def _value(ctx: Any, sample: str, field: str) -> Any:
    if not ctx.dataset.has_sample_field(field):
        return None
    return next(iter(ctx.dataset.select(sample).values(field)), None)


def _plain(text: str) -> str:
    """Text that markdown shows as it is, on one line."""
    kept = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>()#+-!|~" else letter for letter in kept)


# what the buttons do


def _show(ctx: Any, ids: list[str]) -> None:
    ctx.ops.set_view(view=ctx.dataset.select(ids, ordered=True))


def _show_bins(ctx: Any, bins: list[int]) -> None:
    field, board = _get(ctx, "field"), _board(ctx)
    edges, _ = board.histogram(field)
    _show(ctx, _ordered(ctx, board.between(field, edges[min(bins)], edges[max(bins) + 1])))


def _ordered(ctx: Any, ids: list[str]) -> list[str]:
    """Scored samples, those first that lie furthest at the chosen end."""
    lowest_first: list[str] = _board(ctx).ordered(_get(ctx, "field"), ids)
    return lowest_first if _get(ctx, "direction") == "harmful" else lowest_first[::-1]


def _take_selected(ctx: Any) -> None:
    """Looks at a pair newly selected in the grid; who then turns the page at once is not told of it in between."""
    if ctx.selected != (_get(ctx, "selected") or []):
        ctx.panel.set_state("selected", ctx.selected)
        if len(ctx.selected) == 1:
            ctx.panel.set_state("pair", ctx.selected[0])


def _look(ctx: Any, sample: str) -> None:
    ctx.panel.set_state("pair", sample)
    ctx.panel.set_state("turns", (_get(ctx, "turns") or 0) + 1)
    _turn_to(ctx, "pair")


def _tag(ctx: Any, untag: bool) -> None:
    from fiftyone_ecif.verdicts import check_mark

    tag = (_get(ctx, "tag") or "").strip()
    ids = _cut(ctx).ids
    check_mark(tag)
    if not tag or not ids:
        raise EcifError("Give the tag a name" if not tag else "The cut takes no pairs. Move the slider")
    view = ctx.dataset.select(ids, ordered=True)
    if untag:
        view.untag_samples(tag)
    else:
        view.tag_samples(tag)
    ctx.ops.notify(f"{'Untagged' if untag else 'Tagged'} {len(ids):,} pairs {tag!r}", variant="success")
    ctx.ops.reload_samples()
    _draw_scatter(ctx)


def _propose(ctx: Any) -> None:
    from fiftyone_ecif.review import propose_pairs

    ctx.panel.set_state("queue", propose_pairs(_results(ctx), _PROPOSALS, seed=len(_get(ctx, "queue") or [])))
    ctx.panel.set_state("place", 0)


def _say(ctx: Any, verdict: str | None) -> None:
    from fiftyone_ecif.verdicts import say

    queue, place = _get(ctx, "queue"), _get(ctx, "place") or 0
    if verdict:
        say(ctx.dataset, queue[place], verdict)
    ctx.panel.set_state("place", place + 1)


def _learn(ctx: Any) -> None:
    from fiftyone_ecif.review import review_misalignment

    review = review_misalignment(_results(ctx), _PROPOSALS)
    ctx.panel.set_state(
        "learned",
        f"Learned from {review.aligned} aligned and {review.misaligned} misaligned pairs. About "
        f"**{review.expected:,.0f}** pairs are misaligned. AUROC **{review.auroc:.2f}** ({review.auroc_low:.2f} to "
        f"{review.auroc_high:.2f}): how often a misaligned pair comes before an aligned one, each judged "
        "by the others.",
    )
    ctx.panel.set_state("queue", review.proposals)
    ctx.panel.set_state("place", 0)
    field = f"{_get(ctx, 'key')}_misalignment"
    ctx.ops.reload_dataset()
    ctx.ops.set_view(view=ctx.dataset.exists(field).sort_by(field, reverse=True))
