"""The panel without a browser: what its buttons do, and what it says. The App itself is in test_app.py."""

import json
import os
import socket
from datetime import datetime, timezone

import fiftyone as fo
import fiftyone.operators as foo
import numpy as np
import pytest
from fiftyone.operators.store import ExecutionStore
from panel_driver import Panel

from fiftyone_ecif import EcifError, compute_misalignment, group_influence, tag_by_influence, trace
from fiftyone_ecif.api.tracing import mark_traces
from fiftyone_ecif.demo.training import MODEL
from fiftyone_ecif.runs.describe import describe_run
from fiftyone_ecif.runs.score_table import ScoreTable
from operators.panel.plots import histogram_layout
from operators.target_input import target_view


@pytest.fixture(scope="module")
def original(score, made):
    """A dataset with a run of influence and one of misalignment."""
    dataset = made[0].clone()
    train = dataset.match_tags("train")
    score(train, dataset.match_tags("val"), fit=True)
    compute_misalignment(train, model=MODEL, pretrained=made[1], num_workers=0, batch_size=24)
    yield dataset
    dataset.delete()


@pytest.fixture
def both(original):
    """A copy of it, deleted afterwards."""
    copy = original.clone()
    for key, run in copy._doc.brain_methods.items():
        run.timestamp = original._doc.brain_methods[key].timestamp  # to a clone all are of the moment when it was made
        run.save()
    yield copy
    copy.delete()


def test_without_scores_it_offers_to_compute_them(dataset):
    panel = Panel(dataset)
    assert "No scores yet" in panel.text
    panel.send("prompt", operator="compute_influence")
    prompts = [params for uri, params in panel.asked if uri == "prompt_user_for_operation"]
    assert [params["operator_uri"] for params in prompts] == ["@ecif/fiftyone-ecif/compute_influence"]


def test_the_overview(both):
    panel = Panel(both)
    panel.send("choose_run", value="ecif")
    assert "positive = valuable, negative = harmful" in panel.text
    train = len(both.match_tags("train"))
    (bars,) = panel.data("histogram")
    assert sum(bars["y"]) == train
    traces = panel.data("scatter")
    assert sum(len(trace["x"]) for trace in traces) == train
    assert panel.state["other"] == "audit_misalignment"
    panel.send("choose_run", value="audit")
    assert panel.state["direction"] == "suspicious"
    assert panel.state["act"]["tag"] == "suspect"
    assert "Review" in panel.text


def test_what_the_panel_enters_itself_it_does_not_enter_again(both):
    panel = Panel(both).send("choose_run", value="ecif").enter("share", 12.5)
    before = json.dumps(panel.state, sort_keys=True)
    for event, path in (("run", "key"), ("field", "field"), ("share", "share"), ("other", "other")):
        panel.send(f"choose_{event}", value=panel.state[path])  # the App tells the panel of what it was told by it
        written = [params["state"] for uri, params in panel.asked if uri == "patch_panel_state"]
        assert not [state for state in written if {"head", "act", "share", "other"} & set(state)], event
    assert json.dumps(panel.state, sort_keys=True) == before


def test_what_an_older_answer_drew_over_is_drawn_again(both):
    """Of two quick clicks the answer to the first may arrive last, drawn without the second."""
    panel = Panel(both).send("choose_run", value="audit").send("choose_page", value="review").send("start_review")
    queue = panel.state["queue"]
    assert panel.send("look_for_jobs").text == ""
    late = json.loads(json.dumps(panel.state))
    panel.send("choose_page", value="run")
    panel.state["drawn"] = late["drawn"]  # as the older answer leaves it
    assert "Show the numbers" in panel.send("look_for_jobs").text
    assert panel.send("look_for_jobs").text == ""
    assert panel.state["queue"] == queue
    assert panel.send("choose_run", value="audit").text == ""  # what the panel has set is not drawn again


def test_a_run_that_is_seen_before_its_job_ends_is_opened_at_the_end(both, made):
    panel = Panel(both).send("choose_run", value="ecif")
    store = foo.ExecutionStore.create("fiftyone_ecif_jobs", both._doc.id)
    job = {"name": "Detect", "label": "Writing", "progress": 0.9, "host": socket.gethostname(), "process": os.getpid()}
    store.set("job", job)
    compute_misalignment(
        both.match_tags("train"), model=MODEL, pretrained=made[1], num_workers=0, batch_size=24, brain_key="second"
    )
    assert panel.send("look_for_jobs").state["key"] == "ecif"
    store.delete("job")
    assert panel.send("look_for_jobs").state["key"] == "second"


def test_a_new_run_is_opened(both, made):
    panel = Panel(both).send("choose_run", value="ecif")
    train = both.match_tags("train")
    compute_misalignment(
        train, model=MODEL, pretrained=made[1], num_workers=0, batch_size=24, brain_key="second", fit=False
    )
    assert panel.send("look_for_jobs").state["key"] == "second"
    both.delete_brain_run("audit")
    assert panel.send("choose_run", value="ecif").send("look_for_jobs").state["key"] == "ecif"
    both.delete_brain_run("second")
    assert panel.send("look_for_jobs").state["key"] == "ecif"


def test_scores_may_go_while_they_are_shown(both):
    """Another run is opened, and a run's fields go before the run itself."""
    panel = Panel(both).send("choose_run", value="audit")
    panel.state["key"] = "ecif"  # the App passes on what it was told piece by piece
    assert "positive = valuable, negative = harmful" in panel.send("choose_page", value="overview").text
    panel.send("choose_run", value="audit")
    both.delete_sample_field("ecif_influence")
    both.delete_sample_field("audit_misalignment")
    events = {
        "choose_direction": {"direction": "harmful"},
        "choose_share": {"value": 5},
        "choose_other": {"value": "ecif_influence"},
        "choose_page": {"value": "ranking"},
        "on_change_selected": {},
        "on_load": {},
    }
    for event, params in events.items():
        assert "The fields of run `audit` are no longer there" in panel.send(event, **params).text
        assert panel.notices() == []
    assert "ecif_influence" not in panel.send("choose_run", value="ecif").text


def test_the_axis_fits_the_counts():
    steep, flat = np.random.default_rng(0).normal(size=5000), np.linspace(0, 1, 5000)
    board = ScoreTable([str(number) for number in range(5000)], {"steep": steep, "flat": flat})
    assert [histogram_layout(board, name)["yaxis"]["type"] for name in board.columns] == ["log", "linear"]


def test_the_cut_is_counted_shown_tagged_and_untagged(both):
    panel = Panel(both).send("choose_run", value="ecif")
    panel.enter("share", 25)
    lowest = both.exists("ecif_influence").sort_by("ecif_influence").values("id")
    count = -(-len(lowest) // 4)
    assert f"**{count} pairs**" in panel.text
    assert panel.send("show_cut").shown() == lowest[:count]
    panel.send("tag_cut")
    assert set(both.match_tags("harmful").values("id")) == set(lowest[:count])
    assert panel.notices() == [f"Tagged {count} pairs 'harmful'"]
    assert any(trace["name"] == f"harmful ({count})" for trace in panel.data("scatter"))
    panel.send("untag_cut")
    assert len(both.match_tags("harmful")) == 0
    panel.send("choose_direction", direction="valuable")
    assert panel.send("show_cut").shown() == lowest[::-1][:count]


def test_a_verdict_is_no_tag_for_a_cut(both):
    panel = Panel(both).send("choose_run", value="audit")
    panel.state["act"]["tag"] = "misaligned"
    panel.send("tag_cut")
    assert "reserved for what a person says" in panel.notices()[0]
    assert len(both.match_tags("misaligned")) == 0


def test_plots_drive_the_grid(both):
    panel = Panel(both).send("choose_run", value="ecif")
    (bars,) = panel.enter("share", 0).data("histogram")
    first = next(place for place, count in enumerate(bars["y"]) if count)
    panel.send("click_bar", idx=first)
    lowest = both.exists("ecif_influence").sort_by("ecif_influence").values("id")
    assert panel.shown() == lowest[: bars["y"][first]]
    panel.send("select_bars", data=[{"idx": 0}, {"idx": len(bars["y"]) - 1}])
    assert panel.shown() == lowest
    panel.send("select_points", data=[{"id": lowest[4]}, {"id": lowest[2]}, {"id": lowest[4]}])
    assert panel.shown() == [lowest[2], lowest[4]]
    marked = [trace["ids"][place] for trace in panel.data("scatter") for place in trace["selectedpoints"]]
    assert sorted(marked) == sorted([lowest[2], lowest[4]])
    panel.send("select_points", data=[])
    assert "set_view" not in [uri for uri, _ in panel.asked]


def test_the_ranking_is_turned(both):
    panel = Panel(both).send("choose_run", value="ecif").send("choose_page", value="ranking")
    captions = both.exists("ecif_influence").sort_by("ecif_influence").values("caption")
    assert all(caption in panel.text for caption in captions[:6])
    panel.send("turn", by=6)
    assert "**7 to 12**" in panel.text
    assert all(caption in panel.text for caption in captions[6:12])


def test_a_selected_pair_is_looked_at(both):
    panel = Panel(both).send("choose_run", value="ecif")
    worst = both.exists("ecif_influence").sort_by("ecif_influence").first()
    panel.send("on_change_selected", selected=[worst.id])
    assert panel.data("scatter")[-1]["ids"] == [worst.id]
    panel.send("choose_page", value="pair")
    assert worst.caption in panel.text
    assert "no. 1 from the lowest" in panel.text
    assert "Validation pairs it harms most" in panel.text
    val = both.match_tags("val").first()
    panel.send("on_change_selected", selected=[val.id])
    assert val.caption in panel.text
    assert "No score: it is not among the pairs of run 'ecif'" in panel.text


def test_a_pair_whose_thumbnail_or_caption_is_gone_is_drawn(both):
    both.add_sample_field("thumbnail_path", fo.StringField)
    both.app_config.media_fields = ["filepath", "thumbnail_path"]
    both.app_config.grid_media_field = "thumbnail_path"
    both.rename_sample_field("caption", "text")
    both.save()
    worst = both.exists("ecif_influence").sort_by("ecif_influence").first()
    panel = Panel(both).send("choose_run", value="ecif")
    assert worst.filepath in panel.send("choose_page", value="ranking").text
    assert worst.filepath in panel.send("look", id=worst.id).text
    assert "1 to 6" in panel.send("choose_page", value="ranking").text.replace("**", "")


def test_a_run_that_is_not_written_to_its_end_is_not_offered(both):
    document = both._doc.brain_methods["audit"]
    results, document.results = document.results, None
    document.save()
    panel = Panel(both)
    assert panel.state["runs"] == ["ecif"]
    assert "audit" not in panel.text
    document.results = results
    document.save()
    assert Panel(both).state["runs"] == ["ecif", "audit"]


def test_what_is_pressed_of_a_run_that_is_gone_does_nothing(both):
    panel = Panel(both).send("choose_run", value="audit")
    both.delete_brain_run("audit")
    for event, params in (
        ("choose_field", {"value": "ecif_influence"}),
        ("choose_page", {"value": "review"}),
        ("choose_share", {}),
        ("show_cut", {}),
        ("start_review", {}),
        ("on_change_selected", {"selected": [both.first().id]}),
        ("choose_run", {"value": "audit"}),
    ):
        assert panel.send(event, **params).asked == []
    assert "ecif: influence" in panel.send("look_for_jobs").text


def test_while_another_run_is_left_it_never_says_that_there_are_no_scores(both):
    panel = Panel(both).send("choose_run", value="audit")
    both.delete_brain_run("audit")
    assert "No scores yet" not in panel.send("dismiss").text  # before it has looked what is left
    both.delete_brain_run("ecif")
    assert "No scores yet" in panel.send("dismiss").text


def test_a_pair_that_is_deleted_while_it_is_reviewed_is_skipped(both):
    panel = Panel(both).send("choose_run", value="audit").send("choose_page", value="review").send("start_review")
    queue = panel.state["queue"]
    both.delete_samples(queue[0])
    panel.send("choose_page", value="review")
    assert "It was deleted meanwhile" in panel.text
    assert "Misaligned" not in panel.text
    assert both[queue[1]].caption in panel.send("skip").text


def test_review(both):
    panel = Panel(both).send("choose_run", value="audit").send("choose_page", value="review")
    assert "So far **0** pairs" in panel.text
    panel.send("start_review")
    queue = panel.state["queue"]
    assert "Pair 1 of 20" in panel.text
    assert both[queue[0]].caption in panel.text
    panel.send("say_aligned").send("say_misaligned")
    assert both[queue[0]].tags == ["train", "aligned"]
    assert both[queue[1]].tags == ["train", "misaligned"]
    panel.send("back")
    assert both[queue[1]].tags == ["train"]
    panel.send("skip").send("say_misaligned").send("say_misaligned").send("say_aligned")
    assert "So far **2** pairs are tagged `aligned` and **2** `misaligned`" in panel.text
    outcome = {"operator": "detect_misalignment", "name": "Misalignment", "text": "About 18 % are wrong"}
    memory = ExecutionStore.create("fiftyone_ecif_memory", both._doc.id)
    memory.set("outcome", outcome | {"failed": False, "when": 1.0, "entered": {}})
    assert "Learning from 4 tags" in panel.send("learn").text
    assert "About 18 % are wrong" in panel.text
    panel.send("learn_now")
    assert "About 18 % are wrong" not in panel.text  # which is not true any more
    learned, asked = (panel.text.index(said) for said in ("Learned from 2 aligned and 2 misaligned pairs", "Pair 1 of"))
    assert learned < asked
    assert f"- Reviewed: {datetime.now(timezone.utc):%Y-%m-%d} " in describe_run(both, "audit")
    both.reload()
    assert both[queue[2]]["audit_misalignment"] == 1.0
    assert not set(panel.state["queue"]) & {queue[0], *queue[2:5]}
    scores = both.select(panel.shown(), ordered=True).values("audit_misalignment")
    assert scores == sorted(scores, reverse=True)


def test_the_ranking_calls_only_those_harmful_that_are(both):
    panel = Panel(both).send("choose_run", value="audit").send("choose_page", value="ranking")
    assert "**1 to 6** of 72 pairs, the most suspicious first" in panel.text
    harmful = (np.array(both.exists("ecif_influence").values("ecif_influence")) < 0).sum()
    panel.send("choose_run", value="ecif").send("choose_page", value="ranking")
    assert f"**1 to 6** of {harmful} harmful pairs" in panel.text


def test_the_run_in_plain_words(both):
    panel = Panel(both).send("choose_run", value="ecif").send("choose_page", value="run")
    assert "### Trust it\\n\\nNothing speaks against these numbers" in panel.text
    assert MODEL in plain_text(panel)
    assert "minimum" not in panel.text
    panel.send("fold")
    assert "✓ The model is at a minimum of these pairs' loss" in panel.text
    assert "validation pairs that were kept apart" in panel.text
    assert "Since it was made" not in panel.text
    sample = both.match_tags("train").first()
    sample["caption"] = "another one"
    sample.save()
    assert "⚠ Since it was made: 1 changed" in panel.send("choose_page", value="run").text
    assert "Trust it with care" in panel.text
    both.match_tags("train").set_field("caption", "the same").save("caption")
    assert "Do not trust it any more" in panel.send("choose_page", value="run").text
    panel.send("choose_run", value="audit")
    assert "How many captions are wrong cannot be told" in panel.text  # by a model that was trained on them


def test_a_run_that_is_gone_is_not_shown(both):
    panel = Panel(both).send("choose_run", value="ecif")
    both.delete_brain_run("ecif")
    panel.send("on_load")
    assert panel.state["key"] == "audit"
    both.delete_brain_run("audit")
    panel.send("on_load")
    assert "No scores yet" in panel.text


def test_a_renamed_run_is_followed_and_so_is_the_view_that_names_it(both):
    panel = Panel(both).send("choose_run", value="ecif").enter("share", 10).send("show_cut")
    shown = panel.shown()
    both.rename_brain_run("ecif", "better")
    panel.send("look_for_jobs")
    assert panel.state["key"] == "better"
    assert panel.shown() == shown
    assert "ecif_influence" not in json.dumps(panel.view)
    both.delete_brain_run("better")
    panel.send("look_for_jobs")
    assert panel.state["key"] == "audit"
    assert panel.view == []  # nothing that it said is left
    panel.view = fo.DatasetView(both).match_tags("val").sort_by("audit_misalignment")._serialize()
    both.delete_brain_run("audit")
    assert panel.send("look_for_jobs").shown() == both.match_tags("val").values("id")


def test_the_legend_counts_tags_and_their_colours_stay(both):
    scored = both.exists("ecif_influence").sort_by("ecif_influence")
    scored.limit(7).tag_samples(["harmful", "mine"])
    panel = Panel(both).send("choose_run", value="ecif")

    def legend():
        return {trace["name"]: trace["marker"]["color"] for trace in panel.data("scatter")}

    before = legend()
    assert list(before) == [f"other pairs ({len(scored) - 7})", "harmful (7)", "mine (7)"]
    assert before["harmful (7)"] == "#d9534f"
    scored.limit(4).tag_samples("another")
    scored.skip(2).limit(9).tag_samples("valuable")
    panel.send("on_change_selected")
    after = legend()
    assert {name: after[name] for name in ("harmful (7)", "mine (7)")} == {
        name: before[name] for name in ("harmful (7)", "mine (7)")
    }
    assert after["valuable (9)"] == "#3fa66a"
    assert len(set(after.values())) == len(after)


def test_a_point_says_its_caption_and_a_part_of_the_same_score_is_not_drawn_against_it(both):
    panel = Panel(both).send("choose_run", value="ecif")
    traces = panel.data("scatter")
    sample, (caption, values) = both[traces[0]["ids"][3]], traces[0]["text"][3].split("<br>")
    assert caption == sample.caption
    assert values == f"{sample.ecif_influence:.3g}, {sample.audit_misalignment:.3g}"
    both.delete_brain_run("audit")
    panel = Panel(both)
    assert panel.state["other"] is None
    assert "Against" in panel.text
    assert "scatter" not in panel.text
    assert "scatter" in panel.enter("other", "ecif_positive").text


def test_no_cut_takes_pairs_that_help_for_harmful_ones(both):
    panel = Panel(both).send("choose_run", value="ecif").enter("share", 50).send("tag_cut")
    tagged = both.match_tags("harmful").values("ecif_influence")
    assert max(tagged) < 0
    assert len(tagged) == sum(value < 0 for value in both.exists("ecif_influence").values("ecif_influence")) < 36
    assert "all that are harmful" in panel.text


def test_a_card_is_opened_tagged_and_judged(both):
    panel = Panel(both).send("choose_run", value="ecif").send("choose_page", value="ranking")
    worst = both.exists("ecif_influence").sort_by("ecif_influence").first()
    assert f"no. 1 from the lowest · influence {worst.ecif_influence:.4g}" in plain_text(panel)
    for text in ("Tag harmful", "Aligned", "Misaligned", "Open"):
        assert text in panel.text
    assert "✓" not in panel.text
    panel.send("toggle_tag", id=worst.id, tag="harmful")
    assert "✓ Tag harmful" in panel.text
    assert both[worst.id].tags == ["train", "harmful"]
    panel.send("give_verdict", id=worst.id, tag="misaligned")
    assert "✓ Misaligned" in panel.text
    panel.send("give_verdict", id=worst.id, tag="aligned")
    assert "✓ Misaligned" not in panel.text
    assert both[worst.id].tags == ["train", "harmful", "aligned"]
    panel.send("give_verdict", id=worst.id, tag="aligned").send("toggle_tag", id=worst.id, tag="harmful")
    assert both[worst.id].tags == ["train"]
    panel.send("look", id=worst.id)
    assert panel.state["page"] == "pair"
    assert "no. 1 from the lowest" in panel.text


def plain_text(panel):
    """What the panel says, without markdown's escapes."""
    return panel.text.replace("\\", "")


def test_a_number_that_harms_is_red_and_negative_and_one_that_helps_green_and_positive(both):
    panel = Panel(both).send("choose_run", value="ecif")
    panel.send("look", id=both.exists("ecif_influence").sort_by("ecif_influence").first().id)
    lines = [found for found in objects(panel) if "influence on it" in str(found.get("default"))]
    assert lines
    for line in lines:
        colour = line["view"]["componentsProps"]["container"]["sx"]["color"]
        assert colour == ("#d9534f" if "it \\-" in line["default"] else "#3fa66a")
    assert {line["view"]["componentsProps"]["container"]["sx"]["color"] for line in lines} == {"#d9534f", "#3fa66a"}


def objects(panel):
    """All that the panel draws, as the App is told."""
    (drawn,) = [params for uri, params in panel.asked if uri == "show_panel_output"]
    left, found = [drawn["output"]], []
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found.append(one)
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found


def test_what_was_traced_can_be_looked_at_again(both):
    panel = Panel(both).send("choose_run", value="ecif").send("choose_page", value="trace")
    assert "Trace mistakes" in panel.text
    foo.get_operator("@ecif/fiftyone-ecif/trace_predictions")(both, limit=2, count=2)
    traces = trace(both.load_brain_results("ecif"), limit=2, count=2, progress=False)
    panel.send("choose_page", value="overview").send("look_for_jobs")  # it turns to the trace by itself
    assert panel.state["page"] == "trace"
    assert f"**1 of 2**, loss {traces[0].loss:.2f}" in panel.text
    for one in (traces[0], *traces[0].culprits, *traces[0].helpers):
        assert both[one.id].filepath in panel.text
        assert both[one.id].caption in panel.text
    for match in traces[0].retrieved:
        assert both[match.found].filepath in panel.text
        assert both[match.found].caption in panel.text
        assert f"similarity {match.similarity:.3f}, the right one {match.right_similarity:.3f}" in panel.text
    assert traces[1].id not in panel.text
    panel.send("turn_trace", by=1)
    assert f"**2 of 2**, loss {traces[1].loss:.2f}" in panel.text
    both.rename_brain_run("ecif", "better")
    again = Panel(both).send("choose_run", value="better").send("choose_page", value="trace")
    assert "**1 of 2**" in again.text


def keep_trace(dataset, **changes):
    """As a trace of one validation pair is remembered."""
    pair = dataset.match_tags("val").first()
    store = ExecutionStore.create("fiftyone_ecif_memory", dataset._doc.id)
    one = {"id": pair.id, "loss": 1.0, "mistake": True, "culprits": [], "helpers": []}
    store.set(f"trace {dataset._doc.brain_methods['ecif'].id}", [one | changes])
    return Panel(dataset).send("choose_run", value="ecif").send("choose_page", value="trace")


def test_a_trace_of_before_opens_and_says_how_to_get_what_it_lacks(both):
    panel = keep_trace(both)
    assert "Mistake **1 of 1**" in panel.text
    assert "What it retrieved instead was not kept" in panel.text
    assert "not kept" not in keep_trace(both, mistake=False).text


def test_the_class_that_was_taken_for_another_is_said(both):
    match = {"kind": "class", "found": "seal", "similarity": 0.5, "right": "walrus", "right_similarity": 0.25}
    said = "the class 'seal' · similarity 0.500, the right class 'walrus' 0.250"
    assert said in keep_trace(both, retrieved=[match]).text


def test_a_pair_that_is_gone_leaves_what_was_said_of_it(both):
    gone = both.match_tags("val").last().id
    match = {"kind": "caption", "found": gone, "similarity": 0.5, "right": gone, "right_similarity": 0.25}
    both.delete_samples([gone])
    said = "its caption, for the image above · similarity 0.500, the right one 0.250"
    assert said in keep_trace(both, retrieved=[match]).text.replace("\\\\", "")


def test_tabs_that_fire_as_they_are_drawn_turn_no_page(both):
    panel = (
        Panel(both).send("choose_run", value="audit").send("choose_page", value="review", path="page_0_misalignment")
    )
    assert panel.state["page"] == "review"
    assert panel.send("choose_page", value="review", path="page_0_misalignment").asked == []  # drawn anew
    panel.send("choose_run", value="ecif")  # which has no such page
    assert "page_0_influence" in panel.text
    assert panel.send("choose_page", value="ranking", path="page_0_misalignment").asked == []  # tabs that are gone
    assert panel.send("choose_page", value="run", path="page_0_influence").state["page"] == "run"


def test_showing_sets_what_the_thumbnails_say_and_a_drag_is_undone(both):
    panel = Panel(both).send("choose_run", value="ecif")
    scored = both.exists("ecif_influence").sort_by("ecif_influence").values("id")
    panel.send("click_bar", idx=0)
    for event, shown in (("show_ranked", scored), ("show_all", both.values("id")), ("show_cut", scored[:4])):
        panel.send(event)
        assert panel.shown() == shown
        (fields,) = [params["fields"] for uri, params in panel.asked if uri == "set_active_fields"]
        assert fields == ["caption", "ecif_rank"]


def test_another_run_can_always_be_started(both):
    panel = Panel(both).send("choose_run", value="ecif")
    assert "New run" in panel.text
    assert "Detect misaligned pairs" not in panel.text
    assert "Detect misaligned pairs" in panel.send("ask_for_run").text
    assert "Detect misaligned pairs" not in panel.send("prompt", operator="detect_misalignment").text


def test_the_end_of_a_job_stays_until_it_is_dismissed(both, made):
    params = {"model": MODEL, "pretrained": made[1], "batch_size": 24, "target": "tag: val"}
    with pytest.raises(EcifError):
        foo.get_operator("@ecif/fiftyone-ecif/compute_influence")(
            both.limit(30), brain_key="new", scope="lora:4:99", **params
        )
    panel = Panel(both)
    assert "run 'new' came to nothing" in plain_text(panel)
    panel.send("on_load").send("choose_page", value="ranking")
    assert "Open the form again" in panel.text
    (again,) = [found for found in objects(panel) if found.get("label") == "Open the form again"]
    assert again["params"]["prefill"]["scope"] == "lora:4:99"
    foo.get_operator("@ecif/fiftyone-ecif/compute_influence")(both.match_tags("train"), brain_key="new", **params)
    panel.send("look_for_jobs")
    assert panel.state["key"] == "new"
    assert "run 'new' is done" in plain_text(panel)
    assert "Scored 72 pairs" in panel.text
    assert "is done" not in panel.send("dismiss").text
    assert "is done" not in Panel(both).text


def test_a_review_says_what_is_missing_before_it_can_learn(both):
    panel = Panel(both).send("choose_run", value="audit").send("choose_page", value="review")
    assert "Learn once there are 2 more aligned and 2 more misaligned" in panel.text
    assert "Propose pairs (Enter)" in panel.text
    panel.send("start_review").send("say_aligned").send("say_aligned").send("say_misaligned")
    assert "Learn once there are 1 more misaligned" in panel.text
    for key in ("(A)", "(M)", "(→)", "(←)"):
        assert key in panel.text
    assert "Learn from the 4 tags" in panel.send("say_misaligned").text


def test_captions_cannot_write_markdown(both):
    sample = both.exists("ecif_influence").sort_by("ecif_influence").first()
    sample["caption"] = "![x](http://evil) **bold**\n# title <b>"
    sample.save()
    panel = Panel(both).send("choose_run", value="ecif").send("choose_page", value="ranking")
    escaped = r"\!\[x\]\(http://evil\) \*\*bold\*\* \# title \<b\>"
    assert escaped in json.loads(json.dumps(panel.text)).replace("\\\\", "\\")


def test_a_slice_of_groups(made, score):
    grouped = fo.Dataset()
    grouped.add_group_field("group", default="text")
    samples = []
    for sample in made[0]:
        group = fo.Group()
        element = {"tags": sample.tags, "caption": sample.caption}
        samples.append(fo.Sample(sample.filepath, group=group.element("image"), **element))
        samples.append(fo.Sample("/none.pcd", group=group.element("text"), **element))
    grouped.add_samples(samples, progress=False)
    images = grouped.select_group_slices("image")
    score(images.match_tags("train"), images.match_tags("val"))
    panel = Panel(grouped)
    worst = images.exists("ecif_influence").sort_by("ecif_influence")
    panel.enter("share", 10)
    assert panel.send("show_cut").shown() == worst.limit(-(-len(worst) // 10)).values("id")
    panel.send("tag_cut")
    assert len(images.match_tags("harmful")) == -(-len(worst) // 10)
    assert worst.first().caption in panel.send("choose_page", value="ranking").text
    assert len(tag_by_influence(images, tag="few", count=5)) == len(images.match_tags("few")) == 5
    results = grouped.load_brain_results("ecif")
    gone = images.match_tags("few").values("id")
    assert group_influence(results, gone).influence < 0
    traces = trace(results, limit=1)
    assert mark_traces(results, traces).values("id")[0] == traces[0].id
    assert target_view(grouped, "tag: val").values("id") == images.match_tags("val").values("id")
    grouped.delete()
