"""The panel beside the grid: scores at a glance, one pair in depth, review, and what to think of a run."""

from __future__ import annotations

from typing import Any

import fiftyone.operators as foo
import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import every_sample

from ..forms import MISSING
from ..jobs import has_jobs, running_jobs, show_finished_jobs, stop_job
from ..memory import dismiss_outcome, has_wish, last_outcome, take_wish
from ..wording import in_words
from .cards import COLUMN, FULL
from .drawing import draw_histogram, draw_plots, draw_scatter
from .grid import bring, show_bins, show_ids, show_scores, towards_end
from .pages import DRAW, head, jobs_bar, nothing_left, nothing_yet
from .reviewing import answer, learn_from_tags, propose
from .state import (
    current_cut,
    current_field,
    current_page,
    get,
    run_keys,
    score_table,
    tabs_name,
    written_fields,
)
from .tagging import tag_the_cut, toggle
from .turning import follow_runs, follow_wish, look_at, open_field, open_run, take_selected, turn_to

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
        open_run(ctx, get(ctx, "key") if get(ctx, "key") in keys else keys[-1] if keys else None)

    def on_change_dataset(self, ctx: Any) -> None:
        """Starts anew on another dataset."""
        for name in ("pair", "queue", "selected"):
            ctx.panel.set_state(name, None)
        self.on_load(ctx)

    def on_change_selected(self, ctx: Any) -> None:
        """Marks what is selected in the grid; a single pair is looked at."""
        take_selected(ctx)
        draw_scatter(ctx)

    # choices

    def choose_run(self, ctx: Any) -> None:
        """Another run."""
        open_run(ctx, ctx.params["value"])

    def choose_page(self, ctx: Any) -> None:
        """Another page."""
        take_selected(ctx)
        turn_to(ctx, ctx.params["value"])

    def choose_field(self, ctx: Any) -> None:
        """Another score."""
        open_field(ctx, ctx.params["value"])

    def choose_direction(self, ctx: Any) -> None:
        """The other end of the score."""
        ctx.panel.set_state("direction", ctx.params["direction"])
        ctx.panel.set_state("act.tag", ctx.params["direction"])
        ctx.panel.set_state("first", 0)
        draw_histogram(ctx)

    def choose_share(self, ctx: Any) -> None:
        """How much the cut takes."""
        draw_histogram(ctx)

    def choose_other(self, ctx: Any) -> None:
        """The vertical score of the scatter plot."""
        draw_scatter(ctx)

    # plots that drive the grid

    def click_bar(self, ctx: Any) -> None:
        """Shows the pairs of a bar."""
        show_bins(ctx, [ctx.params["idx"]])

    def select_bars(self, ctx: Any) -> None:
        """Shows the pairs of several bars."""
        if bars := ctx.params.get("data"):
            show_bins(ctx, [bar["idx"] for bar in bars])

    def click_point(self, ctx: Any) -> None:
        """Looks at the pair of a point."""
        if ctx.params.get("id"):
            look_at(ctx, ctx.params["id"])

    def select_points(self, ctx: Any) -> None:
        """Shows the pairs of a lasso, which stay marked."""
        ids = [point["id"] for point in ctx.params.get("data") or [] if point.get("id")]
        if ids:
            draw_scatter(ctx, ids)
            show_ids(ctx, score_table(ctx).ordered(current_field(ctx), ids)[:: towards_end(ctx)])

    # the cut

    def show_cut(self, ctx: Any) -> None:
        """Shows what the cut takes, the extreme ones first."""
        cut, field = current_cut(ctx), current_field(ctx)
        if cut.threshold is None:
            return
        low, high = sorted((cut.threshold, score_table(ctx).value(field, cut.ids[0])))
        if len(score_table(ctx).between(field, low, high)) == len(cut.ids):
            show_scores(ctx, low, high)
        else:  # the cut takes some of many equal scores
            show_ids(ctx, cut.ids)

    def tag_cut(self, ctx: Any) -> None:
        """Tags what the cut takes."""
        tag_the_cut(ctx, untag=False)

    def untag_cut(self, ctx: Any) -> None:
        """Takes the tag from what the cut takes."""
        tag_the_cut(ctx, untag=True)

    def turn(self, ctx: Any) -> None:
        """Turns to other places of the ranking."""
        ctx.panel.set_state("first", max(0, (get(ctx, "first") or 0) + ctx.params["by"]))

    def look(self, ctx: Any) -> None:
        """Looks at the pair of a button."""
        look_at(ctx, ctx.params["id"])

    def show_ranked(self, ctx: Any) -> None:
        """Shows all scored pairs, those at the chosen end first."""
        field = current_field(ctx)
        bring(ctx, every_sample(ctx.dataset).exists(field).sort_by(field, reverse=towards_end(ctx) < 0))

    def show_all(self, ctx: Any) -> None:
        """Shows every sample of the dataset."""
        bring(ctx, every_sample(ctx.dataset).view())

    def show_pairs(self, ctx: Any) -> None:
        """Shows the pairs of a button."""
        show_ids(ctx, ctx.params["ids"])

    # review

    def start_review(self, ctx: Any) -> None:
        """Proposes pairs to look at."""
        propose(ctx)

    def say_aligned(self, ctx: Any) -> None:
        """The pair that is shown belongs together."""
        answer(ctx, "aligned")

    def say_misaligned(self, ctx: Any) -> None:
        """It does not."""
        answer(ctx, "misaligned")

    def skip(self, ctx: Any) -> None:
        """Leaves it open."""
        answer(ctx, None)

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
        learn_from_tags(ctx)

    # cards

    def toggle_tag(self, ctx: Any) -> None:
        """Gives the pair of a card a tag, or takes it away."""
        toggle(ctx, ctx.params["id"], ctx.params["tag"])

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
        before, now = follow_runs(ctx), run_keys(ctx)
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
            follow_wish(ctx, wish)
        else:
            draw_plots(ctx)

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


def _is_of_itself(ctx: Any) -> bool:
    """Whether tabs fire because they were drawn, or were drawn before others took their place."""
    tabs = ctx.params.get("path")
    return tabs is not None and (tabs != tabs_name(ctx) or ctx.params["value"] == current_page(ctx))


def _is_idle(ctx: Any) -> bool:
    """Whether no job runs or has ended, and no run has come or gone."""
    return not (get(ctx, "busy") or has_jobs(ctx)) and (get(ctx, "runs") or []) == run_keys(ctx)


def _what_to_draw(ctx: Any) -> list[Any]:
    """All that decides what is on the page but the sliders and plots, which follow by themselves."""
    known = ("key", "page", "field", "direction", "first", "pair", "place", "traced", "details", "asks", "learning")
    outcome = None if ctx.dataset is None else last_outcome(ctx)
    return [*(get(ctx, name) for name in known), outcome and outcome["when"]]
