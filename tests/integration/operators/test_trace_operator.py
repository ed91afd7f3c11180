"""Mistakes beside the training pairs behind them, and a model without chosen pairs, by the operators."""

from pathlib import Path

import fiftyone as fo
import open_clip
import pytest
from fiftyone.operators.delegated import DelegatedOperationService
from fiftyone.operators.executor import ExecutionContext, Executor
from operator_driver import operator, resolve, run_in_the_app, shown_ids

from fiftyone_ecif import EcifError, edit_model, trace
from fiftyone_ecif.api.tracing import Culprit, Trace, mark_traces
from fiftyone_ecif.demo import training
from fiftyone_ecif.runs.sidebar import HARMFUL, HELPFUL
from fiftyone_ecif.store.tables import Store


@pytest.fixture(scope="module")
def run(made):
    """A dataset with a fitted run."""
    from fiftyone_ecif import compute_influence

    dataset = made[0].clone()
    options = {"model": training.MODEL, "pretrained": made[1], "num_workers": 0, "batch_size": 24, "fit": True}
    results = compute_influence(dataset.match_tags("train"), target=dataset.match_tags("val"), **options)
    yield dataset, results
    dataset.delete()


@pytest.fixture
def scored(dataset, score):
    """A dataset of its own with a fitted run."""
    return dataset, score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True)


def in_the_app(dataset, params, **request):
    """What tracing returns and tells the App to do."""
    ctx = ExecutionContext(
        request_params={"dataset_name": dataset.name, "params": params, **request}, executor=Executor()
    )
    result = operator("trace_predictions").execute(ctx)
    return result, {request["operator_uri"]: request["params"] for request in ctx.executor.to_json()["requests"]}


def said(dataset, field="ecif_trace"):
    """What stands on samples."""
    return dict(zip(*dataset.exists(field).values(["id", field]), strict=True))


def test_culprits_stand_beside_the_mistakes(run):
    dataset, results = run
    outcome = operator("trace_predictions")(dataset.match_tags("val"), count=3, limit=2)
    traces = trace(results, count=3, limit=2)
    first, second = traces
    sides = [[pair.id for pair in (*one.culprits, *one.helpers)] for one in traces]
    assert all(len(side) == 6 for side in sides)
    order = list(dict.fromkeys([first.id, *sides[0], second.id, *sides[1]]))
    assert shown_ids(dataset, outcome) == order
    texts = said(dataset)
    assert set(texts) == set(order)
    assert texts[first.id] == f"mistake 1, loss {first.loss:.2f}"
    assert texts[second.id] == f"mistake 2, loss {second.loss:.2f}"
    once = [pair.id for pair in first.culprits if pair.id not in sides[1]]
    assert once
    assert {texts[pair] for pair in once} == {"harms mistake 1"}

    rows = outcome.result["pairs"]
    assert [row["id"] for row in rows] == [first.id, *sides[0], second.id, *sides[1]]
    assert [row["effect"] for row in rows[:7]] == [f"mistake, loss {first.loss:.2f}", *["harms"] * 3, *["helps"] * 3]
    assert [row["query"] for row in rows] == [1] * 7 + [2] * 7
    assert rows[1]["relative_influence"] == f"{first.culprits[0].relative_influence:.2e}"
    assert rows[1]["caption"] == dataset[first.culprits[0].id].caption


def test_harms_and_helps_are_not_both_in_the_colour_of_one_of_them(run):
    dataset, _ = run
    told = dict(in_the_app(dataset, {"brain_key": "ecif", "count": 2, "limit": 1})[1])
    colours = {entry["path"]: entry["fieldColor"] for entry in told["set_color_scheme"]["fields"]}
    assert colours["ecif_trace"] not in (HARMFUL, HELPFUL)


def test_the_app_is_told_what_to_show(run):
    dataset, results = run
    _, told = in_the_app(dataset, {"brain_key": "ecif", "count": 4, "limit": 3})
    assert told["set_active_fields"]["fields"] == ["caption", "ecif_trace"]
    harm, help_ = (
        {pair.id for one in trace(results, limit=3, count=4) for pair in getattr(one, side)}
        for side in ("culprits", "helpers")
    )
    assert told["notify"]["message"].startswith(
        f"Traced 3 validation pairs: {len(harm)} training pairs harm them, {len(help_)} help. "
    )
    assert "reload_dataset" in told


def test_selected_samples_are_traced_also_those_the_model_gets_right(run):
    dataset, results = run
    everything = trace(results, dataset.match_tags("val"), count=2)
    right = next(one for one in everything if not one.mistake)
    wrong = everything[0]
    result, told = in_the_app(dataset, {"brain_key": "ecif", "count": 2}, selected=[right.id, wrong.id])
    ids = fo.DatasetView._build(dataset, told["set_view"]["view"]).values("id")
    assert ids[0] == wrong.id
    texts = said(dataset)
    assert texts[right.id] == f"query 2, loss {right.loss:.2f}, no mistake"
    assert any("harms query 2" in texts[pair.id] for pair in right.culprits)
    assert [row["id"] for row in result["pairs"] if "loss" in row["effect"]] == [wrong.id, right.id]
    (same,) = [operator("trace_predictions")(dataset, queries=[right.id, wrong.id], count=2).result]
    assert same == result
    _, told = in_the_app(dataset, {"brain_key": "ecif", "queries": "mistakes", "limit": 1}, selected=[right.id])
    assert fo.DatasetView._build(dataset, told["set_view"]["view"]).first().id == wrong.id


def test_a_pair_of_several_mistakes_stands_once_and_names_all(run):
    dataset, results = run
    one, two, three = dataset.match_tags("val").limit(3).values("id")
    a, b, c, d = results.ids[:4]

    def pairs(*ids):
        return [Culprit(pair, 0.0, 0.0) for pair in ids]

    view = mark_traces(
        results,
        [
            Trace(one, 3.0, True, pairs(a, b, two), pairs(c), [], []),
            Trace(two, 2.0, True, pairs(d, a, c), pairs(b), [], []),
            Trace(one, 1.5, True, pairs(a), pairs(), [], []),  # of another slice of the target
            Trace(three, 0.1, False, pairs(a), pairs(c), [], []),
        ],
    )
    assert view.values("id") == [one, a, b, c, two, d, three]
    assert view.values("ecif_trace") == [
        "mistake 1, loss 3.00",
        "harms mistake 1, 2; harms query 3",
        "harms mistake 1; helps mistake 2",
        "helps mistake 1; harms mistake 2; helps query 3",
        "mistake 2, loss 2.00; harms mistake 1",
        "harms mistake 2",
        "query 3, loss 0.10, no mistake",
    ]


def test_what_was_traced_before_is_cleared(run):
    dataset, _ = run
    before = shown_ids(dataset, operator("trace_predictions")(dataset, limit=5))
    after = shown_ids(dataset, operator("trace_predictions")(dataset, limit=1, count=1))
    assert len(after) < len(before)
    assert set(said(dataset)) == set(after)


def test_the_field_belongs_to_the_run(scored):
    dataset, _ = scored
    operator("trace_predictions")(dataset)
    dataset.rename_brain_run("ecif", "mine")
    assert not dataset.has_sample_field("ecif_trace")
    operator("trace_predictions")(dataset, brain_key="mine", limit=1)
    assert "mistake 1" in " ".join(said(dataset, "mine_trace").values())
    dataset.delete_brain_run("mine")
    assert not dataset.has_sample_field("mine_trace")


def test_scoring_anew_takes_old_traces_away(scored, score):
    dataset, _ = scored
    operator("trace_predictions")(dataset)
    score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True, overwrite=True)
    assert not dataset.has_sample_field("ecif_trace")


def test_a_field_of_the_users_own_is_left_alone(scored):
    dataset, results = scored
    dataset.set_values("ecif_trace", ["mine"] * len(dataset))
    with pytest.raises(EcifError, match="There is a field 'ecif_trace' already, which no run wrote"):
        mark_traces(results, trace(results))
    assert set(said(dataset).values()) == {"mine"}
    assert not dataset.get_brain_info("ecif").config.traced


def test_the_form_of_tracing(run):
    dataset, results = run
    mistakes = len(trace(results))
    form = resolve(dataset, "trace_predictions", {})
    assert form["brain_key"]["default"] == "ecif"
    expected = f"The worst of the {mistakes} mistakes on 24 validation pairs will be traced. Select"
    assert form["mistakes"]["view"]["label"].startswith(expected)
    assert (form["limit"]["default"], form["count"]["default"]) == (5, 5)
    assert not {"queries", "elsewhere"} & set(form)
    chosen = dataset.match_tags("val").limit(2).values("id")
    form = resolve(dataset, "trace_predictions", {}, selected=chosen)
    assert form["queries"]["view"]["choices"][0]["label"] == "The 2 selected samples"
    assert not form["queries"].get("invalid")
    assert "limit" not in form
    assert "limit" in resolve(dataset, "trace_predictions", {"queries": "mistakes"}, selected=chosen)


def test_samples_outside_the_target_are_refused_before_tracing(run):
    dataset, results = run
    selected = [dataset.match_tags("val").first().id, results.ids[3]]
    form = resolve(dataset, "trace_predictions", {}, selected=selected)
    message = f"1 of the 2 samples are not validation pairs of run 'ecif'; the first is {results.ids[3]}. Deselect them"
    assert form["queries"]["error_message"].startswith(message)
    assert not resolve(dataset, "trace_predictions", {"queries": "mistakes"}, selected=selected)["queries"]["invalid"]
    with pytest.raises(EcifError, match=message):
        operator("trace_predictions")(dataset, queries=dataset.select(selected))
    with pytest.raises(EcifError, match="No validation pairs were given"):
        operator("trace_predictions")(dataset, queries=[])


@pytest.mark.parametrize("name", ["count", "limit"])
def test_less_than_one_is_refused(run, name):
    assert resolve(run[0], "trace_predictions", {name: 0})[name]["error_message"] == "Must be at least 1"


def test_there_is_nothing_to_trace_with(dataset, score):
    blocked = resolve(dataset, "trace_predictions", {})["no_run"]["error_message"]
    assert blocked == "Nothing to trace with yet: run Compute ECIF influence first"
    score(dataset.match_tags("train"), dataset.match_tags("val"), keep_gradients=False, brain_key="bare")
    blocked = resolve(dataset, "trace_predictions", {})["no_run"]["error_message"]
    assert blocked.startswith("Run 'bare' kept no gradients: run Compute ECIF influence with scope 'heads'")
    results = score(dataset.match_tags("train"), dataset.match_tags("val"), brain_key="kept")
    form = resolve(dataset, "trace_predictions", {})
    assert form["brain_key"]["type"]["values"] == ["kept"]
    Store(*results.config.store).delete()
    refused = resolve(dataset, "trace_predictions", {})["brain_key"]["error_message"]
    assert refused == "The store of run 'kept' is gone. Run Compute ECIF influence again with 'Replace the run' ticked"


def test_a_model_without_mistakes_is_said(run, monkeypatch):
    monkeypatch.setattr("fiftyone_ecif.api.tracing.count_mistakes", lambda *_: 0)
    assert "makes no mistakes" in resolve(run[0], "trace_predictions", {})["mistakes"]["error_message"]


def test_a_target_elsewhere_is_said(dataset, score):
    other = dataset.match_tags("val").clone()
    dataset.delete_samples(dataset.match_tags("val"))
    results = score(dataset, other, fit=True)
    form = resolve(dataset, "trace_predictions", {})
    assert form["elsewhere"]["view"]["label"].startswith(f"The validation pairs are in dataset {other.name!r}")
    outcome = operator("trace_predictions")(dataset, limit=1, count=2)
    (one,) = trace(results, limit=1, count=2)
    assert shown_ids(dataset, outcome) == [pair.id for pair in (*one.culprits, *one.helpers)]
    assert set(said(dataset).values()) == {"harms mistake 1", "helps mistake 1"}
    other.delete()


def test_an_edited_model_is_written_and_told_of(scored, tmp_path):
    dataset, results = scored
    out = dataset.sort_by("ecif_rank").exists("ecif_rank").limit(4)
    out.tag_samples("out")
    dataset.match_tags("val").limit(2).tag_samples("out")  # not scored, so left out
    path = tmp_path / "edited.pt"
    outcome = operator("edit_model")(dataset, brain_key="ecif", remove="tag: out", path=path)
    direct = edit_model(results, out, str(tmp_path / "direct.pt"))
    kept = dataset.load_brain_results("ecif", cache=False).diagnostics["edit"]
    for name, value in direct._asdict().items():
        if name not in ("seconds", "checkpoint"):
            assert kept[name] == pytest.approx(value), name
    model, same = (open_clip.create_model("ecif-digits", pretrained=str(at)) for at in (path, tmp_path / "direct.pt"))
    assert all((a == b).all() for a, b in zip(model.parameters(), same.parameters(), strict=True))
    (told,) = [r["params"] for r in outcome.executor.to_json()["requests"] if r["operator_uri"] == "notify"]
    figures = (
        f"Target loss {direct.target_loss_before:.4f} before, {direct.target_loss_predicted:.4f} predicted, "
        f"{direct.target_loss_after:.4f} measured after. Mistakes {direct.mistakes_before:.1%} before, "
        f"{direct.mistakes_after:.1%} after. Written to {path}"
    )
    assert told["variant"] == "success"
    assert told["message"].startswith("Removed 4 pairs in ")
    assert figures in told["message"]
    assert f"changed the parameters by {direct.relative_change:.1%}" in told["message"]


def test_the_app_sees_an_edit_on_its_way_and_its_figures_last(scored, tmp_path):
    dataset, results = scored
    params = {"brain_key": "ecif", "remove": "selection", "path": str(tmp_path / "edited.safetensors")}
    messages = run_in_the_app(dataset, params, "edit_model", selected=results.ids[:3])
    progress = [params for name, params in messages if name == "set_progress"]
    assert len(progress) > 4
    assert progress[-1]["progress"] == 1
    assert progress[-1]["label"] == dict(messages)["notify"]["message"]
    assert progress[-1]["label"].startswith("Removed 3 pairs")
    assert (tmp_path / "edited.safetensors").is_file()


def test_a_delegated_edit(scored, tmp_path):
    dataset, _ = scored
    dataset.save_view("out", dataset.match_tags("train").limit(3))
    operator("edit_model")(dataset, remove="saved view: out", path=tmp_path / "edited.pt", delegate=True)
    service = DelegatedOperationService()
    service.execute_queued_operations(dataset_name=dataset.name, log=False)
    (done,) = service.list_operations(dataset_name=dataset.name)
    assert (done.run_state, done.label) == ("completed", "Model edit, run 'ecif'"), done.result and done.result.error
    assert done.status.label.startswith("Removed 3 pairs")
    assert (tmp_path / "edited.pt").is_file()


def test_a_failed_edit_reaches_the_user(scored, tmp_path):
    dataset, results = scored
    sample = dataset.match_tags("train").first()
    sample.caption = "a green nine above a red one"
    sample.save()
    params = {"brain_key": "ecif", "remove": "selection", "path": str(tmp_path / "edited.pt")}
    messages = dict(run_in_the_app(dataset, params, "edit_model", selected=results.ids[:3]))
    assert messages["notify"]["variant"] == "error"
    assert "changed since" in messages["notify"]["message"]
    assert "edit" not in dataset.load_brain_results("ecif", cache=False).diagnostics


def test_the_form_of_an_edit_counts_what_is_removed(run):
    dataset, results = run
    chosen = [*results.ids[:2], dataset.match_tags("val").first().id]
    form = resolve(dataset, "edit_model", {"remove": "selection"}, selected=chosen)
    assert form["remove"]["type"]["values"] == ["selection", "tag: train", "tag: val"]
    assert form["remove"]["view"]["choices"][0]["label"] == "The 3 selected samples"
    expected = "2 of the 72 pairs of run 'ecif' will be removed; the other 1 were not scored by it"
    assert form["counts"]["view"]["label"] == expected
    assert "not_fitted" not in form
    form = resolve(dataset, "edit_model", {"remove": "selection"}, selected=results.ids[:5])
    assert form["counts"]["view"]["label"] == "5 of the 72 pairs of run 'ecif' will be removed"
    assert "selection" not in resolve(dataset, "edit_model", {})["remove"]["type"]["values"]


def test_an_edit_of_all_or_nothing_is_refused(run, tmp_path):
    dataset, results = run
    nothing = resolve(dataset, "edit_model", {"remove": "tag: val"})["remove"]["error_message"]
    assert nothing == "None of these 24 samples was scored by run 'ecif'"
    everything = resolve(dataset, "edit_model", {"remove": "tag: train"})["remove"]["error_message"]
    assert everything == "Removing 72 of 72 pairs leaves no pairs to learn from"
    form = resolve(dataset, "edit_model", {"remove": "selection"}, selected=results.ids[1:])
    assert "Removing 71 of 72" in form["remove"]["error_message"]
    assert not resolve(dataset, "edit_model", {"remove": "selection"}, selected=results.ids[2:])["remove"]["invalid"]
    with pytest.raises(EcifError, match="leaves no pairs"):
        operator("edit_model")(dataset, remove="tag: train", path=tmp_path / "edited.pt")


def test_the_form_of_an_edit_protects_files(run, tmp_path):
    dataset, _ = run
    taken = tmp_path / "taken.pt"
    taken.write_text("mine")

    def path(value, **params):
        return resolve(dataset, "edit_model", {"path": str(value), **params})["path"]

    assert f"There is a file {taken} already" in path(taken)["error_message"]
    assert not path(taken, overwrite=True)["invalid"]
    (tick,) = [name for name in resolve(dataset, "edit_model", {"path": str(taken)}) if name.startswith("replace_")]
    assert not path(taken, **{tick: True})["invalid"]
    other = tmp_path / "other.pt"
    other.write_text("mine too")
    assert path(other, **{tick: True})["invalid"]  # a tick is for one file
    assert path(tmp_path / "no" / "x.pt")["error_message"].startswith(f"There is no folder {tmp_path / 'no'}.")
    assert "is a folder" in path(tmp_path)["error_message"]
    assert not path(tmp_path / "new.pt")["invalid"]


def test_an_edit_never_writes_over_the_weights_of_its_run(scored, made, tmp_path):
    dataset, results = scored
    source = dataset.get_brain_info("ecif").config.pretrained
    before = Path(source).read_bytes()
    link = tmp_path / "link.pt"
    link.symlink_to(source)
    for path in (source, link):
        form = resolve(dataset, "edit_model", {"path": str(path), "overwrite": True})
        assert "is the checkpoint that the run was made from" in form["path"]["error_message"]
        with pytest.raises(EcifError, match="is the checkpoint that the model was loaded from"):
            edit_model(results, results.ids[:3], str(path), overwrite=True)
    assert Path(source).read_bytes() == before


def test_an_edit_of_a_model_that_was_not_fitted_is_warned_of(dataset, score):
    assert "run Compute ECIF influence first" in resolve(dataset, "edit_model", {})["no_run"]["error_message"]
    score(dataset.match_tags("train"), dataset.match_tags("val"), fit=False)
    assert "rougher estimate" in resolve(dataset, "edit_model", {})["not_fitted"]["view"]["label"]
