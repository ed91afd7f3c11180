"""The panel beside the grid: scores at a glance, one pair in depth, review, and what to think of a run."""

from __future__ import annotations

from typing import Any

import fiftyone.operators as foo
import fiftyone.operators.types as types
from fiftyone import ViewField
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import every_sample, pairs_now

from ..forms import MISSING
from ..jobs import has_jobs, running_jobs, set_thumbnails, show_finished_jobs, stop_job, thumbnail_fields
from ..memory import dismiss_outcome, has_wish, last_outcome, take_wish
from ..view_fields import follow_fields
from ..wording import in_words
from .cards import COLUMN, FULL
from .pages import DRAW, PROPOSALS, head, jobs_bar, nothing_left, nothing_yet
from .state import (
    current_cut,
    current_direction,
    current_field,
    current_page,
    get,
    is_misalignment,
    run_config,
    run_fields,
    run_keys,
    run_results,
    score_table,
    tabs_name,
    written_fields,
)

_GROUPS = 5  # tags with a colour of their own
_MEANINGS = ("harmful", "valuable", "suspect", "misaligned", "aligned")  # tags that come before the others
_MARGIN = {"componentsProps": {"container": {"sx": {**FULL, "px": 2, "pt": 1, "pb": 4}}, "grid": {"sx": COLUMN}}}
_WITHOUT_RUN = {"on_load", "on_change_dataset", "refresh", "prompt", "stop", "look_for_jobs", "dismiss"}
_SET_HERE = {"choose_run": "key", "choose_field": "field"}
_URI = "@ecif/fiftyone-ecif/"
_HELP = """**Overview**: how a score is distributed. Drag over a plot to see those pairs in the grid; move the slider to
see what a cut would tag.

**Ranking**: the pairs at the chosen end of the score, the most extreme ones first.

**Pair**: one pair in depth. Select one sample in the grid, or open a card.

**Trace**: from mistakes of the model back to the training pairs that harm and help.

**Review**: say of proposed pairs whether image and caption belong together, then let the score learn from it.

**Run**: how far to trust the numbers, and what to do next."""


class InfluencePanel(foo.Panel):
    """Explores and acts on the scores of influence and misalignment runs."""

    @override
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
        method = ctx.params.get("__method__", "on_load")
        key = ctx.params["value"] if method == "choose_run" else get(ctx, "key")
        if method not in _WITHOUT_RUN and key not in run_keys(ctx):
            return None  # the run is gone meanwhile; the next look for jobs draws what is left
        if method in _SET_HERE and ctx.params["value"] == get(ctx, _SET_HERE[method]):
            return None  # the App fires these when the panel itself has set an input, too
        if (
            method == "look_for_jobs"
            and _is_idle(ctx)
            and not has_wish(ctx)
            and get(ctx, "drawn") == _what_to_draw(ctx)
        ):
            return None
        if method == "choose_page" and _is_of_itself(ctx):
            return None
        try:
            return super().execute(ctx)
        except EcifError as error:
            ctx.ops.notify(in_words(error), variant="error")
            return None

    # what happens in the App

    def on_load(self, ctx: Any) -> None:
        """Opens the run that was shown last, or the newest one."""
        show_finished_jobs(ctx, moving=False)
        keys = run_keys(ctx)
        ctx.panel.set_state("runs", keys)
        ctx.panel.set_state("written", written_fields(ctx))
        _choose_run(ctx, get(ctx, "key") if get(ctx, "key") in keys else keys[-1] if keys else None)

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
        ctx.panel.set_state("act.tag", ctx.params["direction"])
        ctx.panel.set_state("first", 0)
        _draw_histogram(ctx)

    def choose_share(self, ctx: Any) -> None:
        """How much the cut takes."""
        _draw_histogram(ctx)

    def choose_other(self, ctx: Any) -> None:
        """The vertical score of the scatter plot."""
        _draw_scatter(ctx)

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
        """Shows the pairs of a lasso, which stay marked."""
        ids = [point["id"] for point in ctx.params.get("data") or [] if point.get("id")]
        if ids:
            _draw_scatter(ctx, ids)
            _show(ctx, score_table(ctx).ordered(current_field(ctx), ids)[:: _towards_end(ctx)])

    # the cut

    def show_cut(self, ctx: Any) -> None:
        """Shows what the cut takes, the extreme ones first."""
        cut, field = current_cut(ctx), current_field(ctx)
        if cut.threshold is None:
            return
        low, high = sorted((cut.threshold, score_table(ctx).value(field, cut.ids[0])))
        if len(score_table(ctx).between(field, low, high)) == len(cut.ids):
            _show_scores(ctx, low, high)
        else:  # the cut takes some of many equal scores
            _show(ctx, cut.ids)

    def tag_cut(self, ctx: Any) -> None:
        """Tags what the cut takes."""
        _tag(ctx, untag=False)

    def untag_cut(self, ctx: Any) -> None:
        """Takes the tag from what the cut takes."""
        _tag(ctx, untag=True)

    def turn(self, ctx: Any) -> None:
        """Turns to other places of the ranking."""
        ctx.panel.set_state("first", max(0, (get(ctx, "first") or 0) + ctx.params["by"]))

    def look(self, ctx: Any) -> None:
        """Looks at the pair of a button."""
        _look(ctx, ctx.params["id"])

    def show_ranked(self, ctx: Any) -> None:
        """Shows all scored pairs, those at the chosen end first."""
        field = current_field(ctx)
        _bring(ctx, every_sample(ctx.dataset).exists(field).sort_by(field, reverse=_towards_end(ctx) < 0))

    def show_all(self, ctx: Any) -> None:
        """Shows every sample of the dataset."""
        _bring(ctx, every_sample(ctx.dataset).view())

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
        place = max(0, (get(ctx, "place") or 0) - 1)
        ctx.panel.set_state("place", place)
        from fiftyone_ecif.samples.review_tags import set_review_tag

        set_review_tag(ctx.dataset, get(ctx, "queue")[place], None)

    def learn(self, ctx: Any) -> None:
        """Says that the score is refitted to what was said; the page then asks for it."""
        ctx.panel.set_state("learning", True)

    def learn_now(self, ctx: Any) -> None:
        """Refits the score to what was said."""
        ctx.panel.set_state("learning", False)
        _learn(ctx)

    # cards

    def toggle_tag(self, ctx: Any) -> None:
        """Gives the pair of a card a tag, or takes it away."""
        _toggle(ctx, ctx.params["id"], ctx.params["tag"])

    def give_verdict(self, ctx: Any) -> None:
        """Says of the pair of a card that it is aligned or misaligned; said again, it is taken back."""
        from fiftyone_ecif.samples.review_tags import set_review_tag

        sample, tag = ctx.params["id"], ctx.params["tag"]
        is_said = tag in every_sample(ctx.dataset)[sample].tags
        set_review_tag(ctx.dataset, sample, None if is_said else tag)
        ctx.ops.reload_samples()

    def turn_trace(self, ctx: Any) -> None:
        """Turns to another of the mistakes that were traced."""
        ctx.panel.set_state("traced", max(0, (get(ctx, "traced") or 0) + ctx.params["by"]))

    def fold(self, ctx: Any) -> None:
        """Shows or hides the numbers of a run."""
        ctx.panel.set_state("details", not get(ctx, "details"))

    def ask_for_run(self, ctx: Any) -> None:
        """Offers what there is to compute, or not any more."""
        ctx.panel.set_state("asks", not get(ctx, "asks"))

    def dismiss(self, ctx: Any) -> None:
        """Takes note of how the last job ended."""
        dismiss_outcome(ctx)

    # other operators

    def prompt(self, ctx: Any) -> None:
        """Opens the form of an operator, filled in with the run."""
        ctx.panel.set_state("asks", False)
        ctx.prompt(_URI + ctx.params["operator"], params=ctx.params.get("prefill") or {}, on_success=self.refresh)

    def refresh(self, ctx: Any) -> None:
        """Reads everything anew; a run that is new is opened."""
        ctx.dataset.reload()
        before, now = _follow_runs(ctx), run_keys(ctx)
        if now[-1:] != before[-1:] and not set(now) < set(before):
            ctx.panel.set_state("key", now[-1])
        self.on_load(ctx)

    def stop(self, ctx: Any) -> None:
        """Stops a job."""
        stop_job(ctx, ctx.params["job"])
        ctx.ops.notify("Stopping at the next step. What was computed so far is kept", variant="info")

    def look_for_jobs(self, ctx: Any) -> None:
        """Looks what jobs do, every few seconds; once one has ended, the scores are read anew.

        It also draws anew what was overtaken: of two quick clicks the answer to the first may arrive last.
        """
        if not _is_idle(ctx):
            if show_finished_jobs(ctx) or not running_jobs(ctx):
                self.refresh(ctx)
        elif wish := take_wish(ctx):  # after what jobs wanted done, which draws the panel anew
            _follow_wish(ctx, wish)
        else:
            _draw(ctx)

    def render(self, ctx: Any) -> types.Property:
        """The page."""
        ctx.panel.set_state("drawn", _what_to_draw(ctx))
        panel = types.Object()
        if MISSING:
            panel.md(f"{', '.join(MISSING)} cannot be imported. Run `pip install fiftyone-ecif`", name="missing")
        elif ctx.dataset is None:
            panel.md("Open a dataset first", name="nothing")
        else:
            jobs_bar(self, ctx, panel)
            if get(ctx, "key") not in run_keys(ctx):
                nothing_yet(self, panel, waiting=bool(get(ctx, "busy") or run_keys(ctx)))
            elif not current_field(ctx):
                nothing_left(self, ctx, panel)
            else:
                head(self, ctx, panel)
                DRAW[current_page(ctx)](self, ctx, panel)
        return types.Property(panel, view=types.GridView(orientation="vertical", gap=1, **_MARGIN))


def _follow_runs(ctx: Any) -> list[str]:
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


def _is_of_itself(ctx: Any) -> bool:
    """Whether tabs fire because they were drawn, or were drawn before others took their place."""
    tabs = ctx.params.get("path")
    return tabs is not None and (tabs != tabs_name(ctx) or ctx.params["value"] == current_page(ctx))


def _follow_wish(ctx: Any, wish: dict[str, str]) -> None:
    """Turns to the run and page where an operator left something to see."""
    ctx.dataset.reload()
    if wish["key"] not in run_keys(ctx):
        return
    ctx.panel.set_state("traced", 0)
    if wish["key"] != get(ctx, "key"):
        _choose_run(ctx, wish["key"])
    if wish["page"] != current_page(ctx):
        ctx.panel.set_state("turns", (get(ctx, "turns") or 0) + 1)
        _turn_to(ctx, wish["page"])


def _is_idle(ctx: Any) -> bool:
    """Whether no job runs or has ended, and no run has come or gone."""
    return not (get(ctx, "busy") or has_jobs(ctx)) and (get(ctx, "runs") or []) == run_keys(ctx)


def _what_to_draw(ctx: Any) -> list[Any]:
    """All that decides what is on the page but the sliders and plots, which follow by themselves."""
    known = ("key", "page", "field", "direction", "first", "pair", "place", "traced", "details", "asks", "learning")
    outcome = None if ctx.dataset is None else last_outcome(ctx)
    return [*(get(ctx, name) for name in known), outcome and outcome["when"]]


def _choose_run(ctx: Any, key: str | None) -> None:
    ctx.panel.set_state({"key": key, "head.key": key, "queue": None, "learned": None})
    fields = [] if key is None else run_fields(ctx)
    if fields:
        _choose_field(ctx, fields[0])


def _share(ctx: Any) -> float:
    """What the slider starts at, in percent: the estimated noise rate, where it can be told."""
    rate = run_results(ctx).noise_rate if is_misalignment(ctx) else None
    return round(100 * min(0.5, rate.rate), 1) if rate is not None and rate.told else 5.0


def _choose_field(ctx: Any, field: str) -> None:
    config = run_config(ctx)
    direction = "suspicious" if config.type == "misalignment" else "harmful"
    others = [name for name in score_table(ctx).columns if name != field]
    across = [name for name in others if name not in run_fields(ctx)]
    ctx.panel.set_state(
        {
            "field": field,
            "head.field": field,
            "direction": direction,
            "share": _share(ctx),
            "act.tag": "suspect" if direction == "suspicious" else direction,
            "other": (across or [None])[0],  # a part of the same score says nothing new
            "first": 0,
        }
    )
    _draw(ctx)


def _turn_to(ctx: Any, page: str) -> None:
    ctx.panel.set_state("page", page)
    if page == "overview":
        _draw(ctx)


def _draw(ctx: Any) -> None:
    _draw_histogram(ctx)
    _draw_scatter(ctx)


def _has_scores(ctx: Any) -> bool:
    return get(ctx, "key") in run_keys(ctx) and current_field(ctx) != ""


def _draw_histogram(ctx: Any) -> None:
    from .plots import histogram_bars

    if not _has_scores(ctx):
        return
    bars = histogram_bars(score_table(ctx), current_field(ctx), current_direction(ctx), current_cut(ctx).threshold)
    ctx.panel.set_data("histogram", bars)


def _draw_scatter(ctx: Any, lassoed: list[str] | None = None) -> None:
    from .plots import Group, scatter_points, tag_colours

    if not _has_scores(ctx):
        return
    board, other = score_table(ctx), get(ctx, "other")
    if other not in board.columns:
        return
    field = current_field(ctx)
    scored = every_sample(ctx.dataset).exists(field)
    counts = scored.count_sample_tags()
    some = [tag for tag in counts if counts[tag] < len(board.scored(field))]
    shown = sorted(some, key=lambda tag: (tag not in _MEANINGS, counts[tag], tag))[:_GROUPS]
    colours = tag_colours(shown, get(ctx, "colours") or {})
    ctx.panel.set_state("colours", colours)
    groups = {tag: Group(set(scored.match_tags(tag).values("id")), colours[tag]) for tag in shown}
    ids = board.ids[board.points(field, other)].tolist()
    captions = {
        sample: text for sample, (_, text) in pairs_now(ctx.dataset, run_config(ctx).caption_field, ids).items()
    }
    points = scatter_points(board, field, other, groups, ctx.selected or [], captions, lassoed)
    ctx.panel.set_data("scatter", points)


def _bring(ctx: Any, view: Any) -> None:
    """Brings a view to the grid, with what the run says on the thumbnails."""
    key, config = get(ctx, "key"), run_config(ctx)
    set_thumbnails(ctx, config.caption_field, *thumbnail_fields(key, config))
    ctx.ops.set_view(view=view)


def _show(ctx: Any, ids: list[str]) -> None:
    _bring(ctx, every_sample(ctx.dataset).select(ids, ordered=True))


def _toggle(ctx: Any, sample: str, tag: str) -> None:
    view = every_sample(ctx.dataset).select(sample)
    if tag in view.first().tags:
        view.untag_samples(tag)
    else:
        view.tag_samples(tag)
    ctx.ops.reload_samples()
    _draw_scatter(ctx)


def _show_scores(ctx: Any, low: float, high: float) -> None:
    """Shows the samples with a score in ``[low, high]``, which is quick however many they are."""
    field = current_field(ctx)
    score = ViewField(field)
    found = every_sample(ctx.dataset).match((score >= low) & (score <= high))
    _bring(ctx, found.sort_by(field, reverse=_towards_end(ctx) < 0))


def _show_bins(ctx: Any, bins: list[int]) -> None:
    edges, _ = score_table(ctx).histogram(current_field(ctx))
    _show_scores(ctx, float(edges[min(bins)]), float(edges[max(bins) + 1]))


def _towards_end(ctx: Any) -> int:
    """1 if ascending scores begin with those furthest at the chosen end, -1 if descending ones do."""
    return 1 if current_direction(ctx) == "harmful" else -1


def _take_selected(ctx: Any) -> None:
    """Looks at a pair newly selected in the grid; who then turns the page at once is not told of it in between."""
    if ctx.selected != (get(ctx, "selected") or []):
        ctx.panel.set_state("selected", ctx.selected)
        if len(ctx.selected) == 1:
            ctx.panel.set_state("pair", ctx.selected[0])


def _look(ctx: Any, sample: str) -> None:
    ctx.panel.set_state("pair", sample)
    ctx.panel.set_state("turns", (get(ctx, "turns") or 0) + 1)
    _turn_to(ctx, "pair")


def _tag(ctx: Any, untag: bool) -> None:
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
    _draw_scatter(ctx)


def _propose(ctx: Any) -> None:
    from fiftyone_ecif.api.review import propose_pairs

    ctx.panel.set_state("queue", propose_pairs(run_results(ctx), PROPOSALS, seed=len(get(ctx, "queue") or [])))
    ctx.panel.set_state("place", 0)


def _say(ctx: Any, tag: str | None) -> None:
    from fiftyone_ecif.samples.review_tags import set_review_tag

    queue, place = get(ctx, "queue"), get(ctx, "place") or 0
    if tag:
        set_review_tag(ctx.dataset, queue[place], tag)
    ctx.panel.set_state("place", place + 1)


def _learn(ctx: Any) -> None:
    from fiftyone_ecif.api.review import review_misalignment

    review = review_misalignment(run_results(ctx), PROPOSALS)
    ctx.panel.set_state(
        "learned",
        f"Learned from {review.aligned} aligned and {review.misaligned} misaligned pairs. About "
        f"**{review.expected:,.0f}** pairs are misaligned. AUROC **{review.auroc:.2f}** ({review.auroc_low:.2f} to "
        f"{review.auroc_high:.2f}): how often a misaligned pair comes before an aligned one, each judged "
        "by the others.",
    )
    ctx.panel.set_state({"queue": review.proposals, "place": 0, "share": _share(ctx)})
    dismiss_outcome(ctx)  # which may say otherwise
    field = f"{get(ctx, 'key')}_misalignment"
    ctx.ops.reload_dataset()
    _bring(ctx, every_sample(ctx.dataset).exists(field).sort_by(field, reverse=True))
