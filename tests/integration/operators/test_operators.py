"""The operators through FiftyOne's own registry and executor, and the plugin as it is installed."""

import asyncio
import functools
import http.server
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import fiftyone as fo
import fiftyone.operators as foo
import pytest
import yaml
from fiftyone.operators.delegated import DelegatedOperationService
from fiftyone.operators.executor import ExecutionContext, Executor

from fiftyone_ecif import EcifError, compute_misalignment, propose_pairs
from fiftyone_ecif.demo import training
from fiftyone_ecif.influence.solvers import SOLVERS, Solver
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, TargetLoss
from fiftyone_ecif.misalignment import judgement
from fiftyone_ecif.misalignment.detectors import DETECTORS, Detector
from fiftyone_ecif.misalignment.evidence import KINDS
from fiftyone_ecif.runs import manage as managing
from fiftyone_ecif.runs.cache import cache_size, size_text
from fiftyone_ecif.runs.diagnostics import diagnose
from fiftyone_ecif.store.tables import Store

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = "@ecif/fiftyone-ecif"
LISTED = yaml.safe_load((ROOT / "fiftyone.yml").read_text())


def operator(name):
    return foo.get_operator(f"{PLUGIN}/{name}")


@pytest.fixture
def options(made):
    return {"target": "tag: val", "model": training.MODEL, "pretrained": made[1], "fit": True, "batch_size": 24}


@pytest.fixture
def audit_options(made):
    return {"model": training.MODEL, "pretrained": made[1], "batch_size": 24}


@pytest.fixture
def detect(dataset, audit_options):
    """``detect_misalignment`` on the training pairs, from Python."""
    return lambda **options: operator("detect_misalignment")(dataset.match_tags("train"), **(audit_options | options))


def tag_by_truth(dataset, ids):
    """Tags pairs as a person would who knows which captions were spoiled."""
    for tag, spoiled in (("aligned", False), ("misaligned", True)):
        dataset.select(ids).exists("spoiled", spoiled).tag_samples(tag)


def shown_ids(dataset, result):
    """The samples of the view that an operator brings to the grid."""
    (view,) = [r["params"]["view"] for r in result.executor.to_json()["requests"] if r["operator_uri"] == "set_view"]
    return fo.DatasetView._build(dataset, view).values("id")


def what_it_means(results):
    """The notice below the numbers that a review shows."""
    ctx = ExecutionContext(request_params={"params": {"brain_key": "audit"}, "results": results}, executor=Executor())
    outputs = operator("review_misalignment").resolve_output(ctx).to_json()["type"]["properties"]
    assert set(outputs) == {*results, "means"}
    return outputs["means"]["view"]["label"]


def resolve(dataset, name, params, view=None, **request):
    """The form of an operator, as JSON, with what the user has entered."""
    ctx = ExecutionContext(
        request_params={"dataset_name": dataset.name, "view": view or [], "params": params, **request},
        executor=Executor(),
    )
    return operator(name).resolve_input(ctx).to_json()["type"]["properties"]


def run_in_the_app(dataset, params, name="compute_influence", **request):
    """Executes a job as the App does and returns what it is told to do."""
    ctx = ExecutionContext(
        request_params={"dataset_name": dataset.name, "params": params, **request}, executor=Executor()
    )
    requests = [message.body.to_json() for message in operator(name).execute(ctx)]
    return [(request["operator_uri"], request["params"]) for request in requests]


def test_yml_lists_what_is_registered():
    listed = LISTED["operators"] + LISTED["panels"]
    registered = [op.name for op in foo.list_operators(builtin=False) if op.plugin_name == PLUGIN]
    assert sorted(listed) == sorted(registered)
    assert all(operator(name).config.icon for name in listed)


def test_compute_tag_and_export(dataset, options, tmp_path):
    train = dataset.match_tags("train")
    operator("compute_influence")(train, **options)
    assert train.count("ecif_influence") == len(train)
    assert dataset.match_tags("val").count("ecif_influence") == 0
    result = operator("tag_by_influence")(dataset, count=5, tag="check").result
    assert result == {"tag": "check", "count": 5}
    assert set(dataset.match_tags("check").values("ecif_rank")) == {1, 2, 3, 4, 5}
    path = tmp_path / "check.csv"
    result = operator("export_pairs")(dataset.match_tags("check"), path).result
    assert result == {"path": str(path), "count": 5}
    assert len(path.read_text().splitlines()) == 6


def test_what_was_tagged_shows_the_rank_and_is_what_an_edit_would_take_out(dataset, options):
    operator("compute_influence")(dataset.match_tags("train"), **options)
    told = operator("tag_by_influence")(dataset, count=5).executor.to_json()["requests"]
    (shown,) = [request["params"]["fields"] for request in told if request["operator_uri"] == "set_active_fields"]
    assert shown == ["caption", "ecif_rank"]
    assert resolve(dataset, "edit_model", {})["remove"]["default"] == "tag: harmful"


def test_the_function_and_the_operator_give_the_same_numbers(dataset, options, score):
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    operator("compute_influence")(train, **options)
    score(train, val, fit=True, brain_key="direct")
    assert train.values("ecif_influence") == train.values("direct_influence")


def test_the_app_sees_progress_then_the_sorted_view(dataset, options):
    messages = run_in_the_app(dataset, {**options, "caption_field": "caption"})
    progress = [params for name, params in messages if name == "set_progress"]
    assert len(progress) > 5
    shares = [params["progress"] for params in progress]
    assert shares == sorted(shares)
    assert progress[-1] == {"label": "Scored 72 pairs, skipped 0", "progress": 1.0}
    rest = dict(messages)
    assert rest["set_active_fields"]["fields"] == ["caption", "ecif_rank"]
    assert [stage["_cls"].rsplit(".")[-1] for stage in rest["set_view"]["view"]] == ["MatchTags", "Exists", "SortBy"]
    assert rest["notify"]["variant"] == "success"
    assert "reload_dataset" in rest
    assert messages[0][0] == "open_panel"
    assert {"path": "ecif_influence", "fieldColor": "#19b5fe"} in rest["set_color_scheme"]["fields"]


def test_thumbnails_show_one_run_and_what_the_user_chose(dataset, options, audit_options):
    operator("compute_influence")(dataset.match_tags("train"), **options)
    shown = ["spoiled", "ecif_influence", "ecif_rank"]
    params = {**audit_options, "caption_field": "caption"}
    told = dict(run_in_the_app(dataset, params, "detect_misalignment", active_fields=shown))
    assert told["set_active_fields"]["fields"] == ["spoiled", "caption", "audit_misalignment", "audit_reason"]


def test_a_failure_reaches_the_user(dataset, options):
    dataset.add_sample_field("ecif_influence", fo.FloatField)
    messages = dict(run_in_the_app(dataset, options))
    assert messages["notify"]["variant"] == "error"
    assert "which no run wrote" in messages["notify"]["message"]
    assert messages["set_progress"]["label"].startswith("Failed: ")


def test_a_failure_reaches_python(dataset, options):
    with pytest.raises(EcifError, match="neither a file nor a tag"):
        operator("compute_influence")(dataset.match_tags("train"), **options | {"pretrained": "no_such_tag"})


def test_an_empty_selection_is_said(dataset, options):
    messages = dict(run_in_the_app(dataset, options, view_target="SELECTED_SAMPLES", selected=[]))
    assert messages["notify"] == {"message": "No samples are selected", "variant": "error"}


def test_delegated_execution(dataset, options):
    train = dataset.match_tags("train")
    queued = operator("compute_influence")(train, delegate=True, **options)
    assert queued.delegated
    service = DelegatedOperationService()
    service.execute_queued_operations(dataset_name=dataset.name, log=False)
    (done,) = service.list_operations(dataset_name=dataset.name)
    assert done.run_state == "completed", done.result and done.result.error
    assert done.status.progress == 1
    assert done.label == "ECIF influence, run 'ecif'"
    dataset.reload()
    assert train.count("ecif_influence") == len(train)

    params = {"field": "ecif_influence", "direction": "harmful", "limit": "count", "count": 4, "tag": "later"}
    foo.execute_operator(f"{PLUGIN}/tag_by_influence", {"dataset": dataset}, params=params, request_delegation=True)
    service.execute_queued_operations(dataset_name=dataset.name, log=False)
    assert {op.run_state for op in service.list_operations(dataset_name=dataset.name)} == {"completed"}
    assert len(dataset.match_tags("later")) == 4


def test_the_form_offers_what_fits(dataset):
    form = resolve(dataset, "compute_influence", {"caption_field": "caption", "target": "tag: val"})
    assert sorted(form["caption_field"]["type"]["values"]) == ["caption", "spoiled"]
    assert form["target"]["type"]["values"] == ["tag: train", "tag: val", "hold out"]
    assert form["counts"]["view"]["label"] == "72 pairs will be scored towards 24 validation pairs"
    assert form["leave_out"]["view"]["label"] == "Leave out the 24 of these that are validation pairs"
    kept = {"caption_field": "caption", "target": "tag: val", "leave_out": False}
    said = resolve(dataset, "compute_influence", kept)["counts"]["view"]["label"]
    assert said == "96 pairs will be scored towards 24 validation pairs"
    assert not form["brain_key"]["invalid"]
    assert "seed" not in form
    assert "seed" in resolve(dataset, "compute_influence", {"advanced": True})


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"model": "ViT-B-23"}, "model", "no model 'ViT-B-23'. Did you mean ViT-B-32"),
        ({"pretrained": "gone/model.pt"}, "pretrained", "Give its whole path"),
        (
            {"model": "ViT-B-32", "pretrained": "laion3b"},
            "pretrained",
            "'laion3b' is neither a file nor a tag of ViT-B-32. Give one of openai",
        ),
        ({"brain_key": "a key"}, "brain_key", "is not a name"),
        ({"target": "tag: lonely"}, "target", "at least 2 pairs"),
        ({"advanced": True, "batch_size": 1}, "batch_size", "at least 2"),
        ({"advanced": True, "proximal": -1}, "proximal", "positive"),
        ({"advanced": True, "scope": "lora:x"}, "scope", "not known"),
    ],
)
def test_the_form_says_what_is_wrong(dataset, params, field, message):
    dataset.limit(1).tag_samples("lonely")
    form = resolve(dataset, "compute_influence", params)
    assert form[field]["invalid"]
    assert message in form[field]["error_message"]


def test_what_a_form_refuses_is_an_error_of_ours_in_python(dataset, options):
    with pytest.raises(EcifError, match="open_clip has no model 'ViT-B-23'"):
        operator("compute_influence")(dataset.match_tags("train"), **options | {"model": "ViT-B-23"})
    with pytest.raises(EcifError, match="Required property"):
        operator("compute_influence")(dataset.match_tags("train"), target=None)


def test_a_taken_key_can_be_replaced(dataset, detect):
    detect(fit=False)
    form = resolve(dataset, "detect_misalignment", {"brain_key": "audit"})
    assert form["brain_key"]["error_message"] == "There is a run 'audit' already. Replace it, or choose another key"
    (tick,) = [name for name in form if name.startswith("replace_")]
    for ticked in (tick, "overwrite"):  # the latter from Python
        replaced = resolve(dataset, "detect_misalignment", {"brain_key": "audit", ticked: True})
        assert not replaced["brain_key"]["invalid"]
    detect(fit=False, brain_key="other")
    assert resolve(dataset, "detect_misalignment", {"brain_key": "other", tick: True})["brain_key"]["invalid"]
    other = resolve(dataset, "compute_influence", {"brain_key": "audit", "overwrite": True})
    assert "another kind of run" in other["brain_key"]["error_message"]
    assert not [name for name in other if name.startswith("replace_")]


def test_classes_are_forgotten_with_the_loss_that_asks_for_them(dataset, options):
    entered = {**options, "label_field": "spoiled", "target_loss": "contrastive"}
    with pytest.raises(EcifError, match="belong together"):
        operator("compute_influence")(dataset.match_tags("train"), **entered)
    assert dict(run_in_the_app(dataset, {**entered, "advanced": False}))["notify"]["variant"] == "success"


def test_every_target_loss_and_detector_is_offered(dataset):
    form = resolve(dataset, "compute_influence", {})
    assert sorted(form["target_loss"]["type"]["values"]) == sorted(TARGET_LOSSES)
    form = resolve(dataset, "detect_misalignment", {"advanced": True})
    assert sorted(form["detector"]["type"]["values"]) == sorted(DETECTORS)


def test_detection_tags_and_says_why(dataset, detect):
    result = detect(tag="suspect", share=0.25)
    train = dataset.match_tags("train")
    assert train.count("audit_misalignment") == len(train)
    assert dataset.match_tags("val").count("audit_misalignment") == 0
    suspects = train.sort_by("audit_misalignment", reverse=True).limit(18).values("id")
    assert sorted(suspects) == sorted(dataset.match_tags("suspect").values("id"))
    (said,) = [r["params"] for r in result.executor.to_json()["requests"] if r["operator_uri"] == "notify"]
    assert said["variant"] == "success"
    assert "Tagged 18 pairs 'suspect'" in said["message"]
    assert "Influence" not in said["message"]


def test_detection_and_the_function_give_the_same_numbers(dataset, detect, made):
    detect(seed=3, trained=True)
    train = dataset.match_tags("train")
    compute_misalignment(
        train,
        model=training.MODEL,
        pretrained=made[1],
        batch_size=24,
        seed=3,
        trained=True,
        brain_key="direct",
        num_workers=0,
    )
    assert train.values("audit_misalignment") == train.values("direct_misalignment")
    assert train.values("audit_reason") == train.values("direct_reason")


def test_the_app_sees_detection_then_the_most_suspicious(dataset, audit_options):
    entered = {"advanced": True, "tagging": "threshold", "tag": "suspect", "threshold": 0.5, "share": 7.0}
    entered |= {"detector": "calibrated", "target": "tag: val"}  # left over from another choice, as the share is
    messages = run_in_the_app(dataset, {**audit_options, **entered, "fit": False}, "detect_misalignment")
    shares = [params["progress"] for name, params in messages if name == "set_progress"]
    assert len(shares) > 5
    assert shares == sorted(shares)
    rest = dict(messages)
    assert rest["set_progress"] == {"label": "Scored 96 pairs, skipped 0", "progress": 1.0}
    assert rest["set_active_fields"]["fields"] == ["caption", "audit_misalignment", "audit_reason"]
    view = fo.DatasetView._build(dataset, rest["set_view"]["view"])
    scores = view.values("audit_misalignment")
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 96
    above = sum(score > 0.5 for score in scores)
    said = rest["notify"]["message"]
    assert str(dataset.load_brain_results("audit").noise_rate) in said
    assert f"Tagged {above} pairs 'suspect'" in said
    assert len(dataset.match_tags("suspect")) == above


def test_as_many_are_tagged_as_are_estimated_to_be_wrong(dataset, audit_options):
    entered = {"advanced": False, "tagging": "estimated", "tag": "suspect", "trained": True}
    run_in_the_app(dataset, audit_options | entered, "detect_misalignment")
    rate = dataset.load_brain_results("audit").noise_rate
    assert len(dataset.match_tags("suspect")) == (math.ceil(rate.rate * 72) if rate.told else 0)


def test_pairs_that_a_model_was_hardly_trained_on_are_left_out_where_it_knows_the_others(dataset, audit_options):
    asked = {"trained": True}
    form = resolve(dataset, "detect_misalignment", asked)
    assert form["leave_out"]["type"]["name"] == "Boolean"
    assert form["leave_out"]["view"]["label"] == "Leave out the 24 that are tagged 'val'"
    assert form["counts"]["view"]["label"] == "72 pairs will be scored"
    unticked = resolve(dataset, "detect_misalignment", asked | {"leave_out": False})
    assert unticked["counts"]["view"]["label"] == "96 pairs will be scored"
    assert "leave_out" not in resolve(dataset, "detect_misalignment", {})
    dataset.untag_samples("train")
    dataset.tag_samples("test")
    assert "leave_out" not in resolve(dataset, "detect_misalignment", asked)  # as nothing would be left
    dataset.untag_samples("test")

    entered = audit_options | {"advanced": False, "tagging": "none", "trained": True}
    run_in_the_app(dataset, entered | {"leave_out": False}, "detect_misalignment")
    assert dataset.count("audit_misalignment") == 96
    run_in_the_app(dataset, entered | {"overwrite": True}, "detect_misalignment")
    assert dataset.exists("audit_misalignment").count_sample_tags() == {}
    assert dataset.count("audit_misalignment") == 72


def test_nothing_is_tagged_unless_it_is_asked_for(dataset, audit_options):
    entered = {"advanced": False, "tagging": "none", "tag": "suspect", "share": 0.5, "fit": False}
    messages = dict(run_in_the_app(dataset, audit_options | entered, "detect_misalignment"))
    assert messages["notify"]["variant"] == "success"
    assert len(dataset.match_tags("suspect")) == 0


@pytest.mark.parametrize("power", [0.6, 0.9])
def test_a_run_that_finds_little_says_so(dataset, detect, monkeypatch, power):
    original = judgement.judge
    weak = lambda *given, **named: replace(original(*given, **named), power=dict.fromkeys(KINDS, power))  # noqa: E731
    monkeypatch.setattr(judgement, "judge", weak)
    said = [r["params"] for r in detect().executor.to_json()["requests"] if r["operator_uri"] == "notify"]
    assert ("hardly found" in said[0]["message"]) == (power < 0.7)
    results = dataset.load_brain_results("audit")
    remarks = [remark for remark in diagnose(results.config, results.diagnostics) if not remark.fine]
    assert any(f"found at AUROC {power:.2f}" in remark.text for remark in remarks) == (power < 0.7)


def test_detection_towards_validation_pairs(dataset, detect):
    detect(detector="global_influence", target="tag: val")
    assert dataset.get_brain_info("audit").config.detector == "global_influence"
    with pytest.raises(EcifError, match="belong together"):
        detect(target="tag: val", brain_key="other")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"tag": "misaligned"}, "reserved for what a person says"),
        ({"share": 0.1}, "give tag too"),
        ({"tag": "suspect", "share": 0.1, "threshold": 0.5}, "not both"),
        ({"detector": "self_influence", "fit": False}, "Tick 'Fit the model to these pairs first'"),
        ({"detector": "astrology"}, "not available"),
        ({"pretrained": "no_such_tag"}, "neither a file nor a tag"),
    ],
)
def test_bad_input_to_detection_is_an_error_in_python_and_the_app(dataset, detect, audit_options, params, message):
    with pytest.raises(EcifError, match=message):
        detect(**params)
    messages = dict(run_in_the_app(dataset, audit_options | params, "detect_misalignment"))
    assert messages["notify"]["variant"] == "error"
    assert message in messages["notify"]["message"]
    assert messages["set_progress"]["label"].startswith("Failed: ")
    assert not dataset.has_brain_run("audit")


def test_delegated_detection(dataset, audit_options):
    train = dataset.match_tags("train")
    operator("detect_misalignment")(train, delegate=True, fit=False, **audit_options)
    service = DelegatedOperationService()
    service.execute_queued_operations(dataset_name=dataset.name, log=False)
    (done,) = service.list_operations(dataset_name=dataset.name)
    assert (done.run_state, done.label) == ("completed", "Misalignment, run 'audit'"), done.result and done.result.error
    dataset.reload()
    assert train.count("audit_misalignment") == len(train)


def test_the_form_of_detection(dataset):
    form = resolve(dataset, "detect_misalignment", {"caption_field": "caption"})
    assert form["counts"]["view"]["label"] == "96 pairs will be scored"
    assert form["brain_key"]["default"] == "audit"
    assert form["trained"]["default"] is False
    assert not {"fit", "tag", "share", "threshold", "detector", "target"} & set(form)
    form = resolve(dataset, "detect_misalignment", {"advanced": True})
    assert form["fit"]["default"] is True
    form = resolve(dataset, "detect_misalignment", {"tagging": "estimated"})
    assert form["tag"]["default"] == "suspect"
    assert not {"share", "threshold"} & set(form)
    form = resolve(dataset, "detect_misalignment", {"advanced": True, "detector": "global_influence"})
    assert form["target"]["type"]["values"] == ["tag: train", "tag: val"]
    dataset.untag_samples(["train", "val"])
    form = resolve(dataset, "detect_misalignment", {"advanced": True})
    assert "global_influence" not in form["detector"]["type"]["values"]


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"tagging": "estimated", "tag": "aligned"}, "tag", "reserved"),
        ({"tagging": "share", "percent": 150}, "percent", "at most 100"),
        ({"tagging": "threshold", "threshold": -0.5}, "threshold", "from 0 to 1"),
        ({"advanced": True, "fit": False, "detector": "loo_loss"}, "detector", "trained on the pairs"),
        ({"brain_key": "a key"}, "brain_key", "is not a name"),
    ],
)
def test_the_form_of_detection_says_what_is_wrong(dataset, params, field, message):
    form = resolve(dataset, "detect_misalignment", params)
    assert form[field]["invalid"]
    assert message in form[field]["error_message"]


def test_a_review_first_proposes_then_learns(dataset, detect):
    detect(fit=False)
    review = operator("review_misalignment")
    first = review(dataset, count=8)
    assert first.result == {"aligned": 0, "misaligned": 0, "proposed": 8}
    assert "run this again" in what_it_means(first.result)
    proposed = shown_ids(dataset, first)
    assert proposed == propose_pairs(dataset.load_brain_results("audit"), 8)

    tag_by_truth(dataset, proposed[:1])
    again = review(dataset, count=8)
    assert again.result["proposed"] == 8
    assert proposed[0] not in shown_ids(dataset, again)

    tag_by_truth(dataset, dataset.match_tags("train").values("id")[:40])
    learned = review(dataset.match_tags("val"), count=5)  # a view stands for its dataset
    counts = dataset.count_sample_tags()
    assert (learned.result["aligned"], learned.result["misaligned"]) == (counts["aligned"], counts["misaligned"])
    kept = dataset.load_brain_results("audit", cache=False).diagnostics["review"]
    assert learned.result["auroc"] == f"{kept['auroc']:.2f} ({kept['auroc_low']:.2f} to {kept['auroc_high']:.2f})"
    assert learned.result["expected"] == f"{kept['expected']:,.0f} of 72"
    assert "is now the probability" in what_it_means(learned.result)
    assert len(shown_ids(dataset, learned)) == learned.result["proposed"] == 5
    assert not set(shown_ids(dataset, learned)) & set(dataset.match_tags(["aligned", "misaligned"]).values("id"))
    assert set(dataset.match_tags("misaligned").values("audit_misalignment")) == {1.0}


def test_a_review_of_everything_shows_the_scores(dataset, detect):
    detect(fit=False)
    tag_by_truth(dataset, dataset.match_tags("train").values("id"))
    result = operator("review_misalignment")(dataset)
    assert result.result["proposed"] == 0
    scores = dataset.select(shown_ids(dataset, result), ordered=True).values("audit_misalignment")
    assert len(scores) == 72
    assert scores == sorted(scores, reverse=True)


def test_the_form_of_a_review_counts_tags(dataset, detect):
    detect(fit=False)
    dataset.match_tags("val").tag_samples("aligned")  # not of the run, so they do not count
    entered = {"brain_key": "audit"}
    form = resolve(dataset, "review_misalignment", {"brain_key": "audit", "count": 0})
    assert form["brain_key"]["default"] == "audit"
    assert form["count"]["invalid"]
    said = form["tags"]["view"]["label"]
    assert said.startswith("So far 0 pairs are tagged 'aligned' and 0 'misaligned'. It takes 2 of each to learn.")
    ids = dataset.match_tags("train").values("id")
    dataset.select(ids[:3]).tag_samples("aligned")
    dataset.select(ids[2:4]).tag_samples("misaligned")
    form = resolve(dataset, "review_misalignment", entered)
    assert form["tags"]["view"]["label"].startswith("So far 3 pairs are tagged 'aligned' and 2 'misaligned'. The score")
    assert form["both"]["view"]["label"].startswith("1 pairs have both tags")


def test_a_review_without_a_run_is_refused(dataset):
    with pytest.raises(EcifError, match="run Detect misaligned pairs first"):
        operator("review_misalignment")(dataset)


@pytest.fixture
def manage(dataset):
    """``manage_influence_runs`` from Python, what it says to the App, and its form."""
    module = sys.modules[type(operator("manage_influence_runs")).__module__]
    module._stale.cache_clear()

    def run(**params):
        done = operator("manage_influence_runs")(dataset, **params)
        dataset.reload()
        return done.result, [(r["operator_uri"], r["params"]) for r in done.executor.to_json()["requests"]]

    def form(**params):
        module._stale.cache_clear()
        return resolve(dataset, "manage_influence_runs", params)

    return run, form


def test_runs_are_managed_from_python(dataset, score, manage):
    run, _ = manage
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    results = score(train, val)
    about, asked = run(action="describe", brain_key="ecif")
    assert about["about"].startswith("**ecif**: influence by ecif-digits")
    assert asked == []
    result, asked = run(action="rename", brain_key="ecif", new_key="better")
    assert result["brain_key"] == "better"
    assert dataset.count("better_influence") == 72
    assert [name for name, _ in asked] == ["reload_dataset", "notify"]
    assert asked[1][1] == {"message": "The run 'ecif' is now 'better'", "variant": "success"}
    size = Store(*results.config.store[:-1]).size()
    result, asked = run(action="delete", brain_key="better")
    assert result["cache_bytes"] == size > 0
    assert asked[1][1]["message"].startswith("Deleted the run 'better', with the fields better_influence, ")
    assert dataset.list_brain_runs() == []
    assert not dataset.has_sample_field("better_influence")
    result, asked = run(action="free")
    assert asked[1][1]["message"].startswith("Freed ")
    with pytest.raises(EcifError, match="No runs yet"):
        run(action="delete", brain_key="better")


def test_the_grid_is_not_left_with_the_fields_of_a_run_that_is_gone(dataset, score):
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    score(train, val)
    view = train.match(fo.ViewField("ecif_influence") < 0).sort_by("ecif_influence")
    order = view.values("id")
    request = {"active_fields": ["caption", "ecif_rank"], "filters": {"ecif_influence": {}}}

    def asked(view, **params):
        stages = view._serialize(include_uuids=False)
        ctx = ExecutionContext(
            request_params={"dataset_name": dataset.name, "view": stages, "params": params, **request},
            executor=Executor(),
        )
        operator("manage_influence_runs").execute(ctx)
        dataset.reload()
        return {request.operator_uri: request.params for request in ctx.executor._requests}

    told = asked(view, action="rename", brain_key="ecif", new_key="better")
    assert told["set_active_fields"]["fields"] == ["caption", "better_rank"]
    assert "clear_sidebar_filters" in told
    assert fo.DatasetView._build(dataset, told["set_view"]["view"]).values("id") == order
    request = {}
    assert "set_view" not in asked(train, action="describe", brain_key="better")
    told = asked(train.sort_by("better_influence"), action="delete", brain_key="better")
    assert fo.DatasetView._build(dataset, told["set_view"]["view"]).values("id") == train.values("id")


def test_what_managing_refuses_is_an_error_of_ours(dataset, score, manage):
    run, _ = manage
    score(dataset.match_tags("train"), dataset.match_tags("val"))
    for params, message in (
        ({"action": "delete", "brain_key": "gone"}, "no run 'gone'. Runs: ecif"),
        ({"action": "rename", "brain_key": "ecif", "new_key": "a key"}, "is not a name"),
        ({"action": "rename", "brain_key": "ecif"}, "Required property"),
        ({"action": "burn", "brain_key": "ecif"}, "action"),
    ):
        with pytest.raises(EcifError, match=message):
            run(**params)
    assert dataset.list_brain_runs() == ["ecif"]


def test_the_form_that_manages_runs(dataset, score, manage):
    _, form = manage
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    results = score(train, val)
    score(train, val.limit(12), brain_key="other")
    found = form()
    assert found["action"]["default"] == "describe"
    (first, second) = found["brain_key"]["view"]["choices"]
    assert first["label"].startswith("ecif — influence, ecif-digits, 72 pairs, ")
    assert "stale" not in first["label"] + second["label"]
    assert "about_ecif" not in found
    for sample in train.limit(3):
        sample.caption = "another"
        sample.save()
    found = form(action="describe", brain_key="ecif")
    assert found["brain_key"]["view"]["choices"][1]["label"].endswith(" (stale: 3 changed)")
    assert "- Since then: 3 changed" in found["about_ecif"]["default"]
    assert not form(action="rename", brain_key="ecif", new_key="better")["new_key"]["invalid"]
    found = form(action="rename", brain_key="ecif", new_key="other")
    assert found["new_key"]["invalid"]
    assert "'other' is taken" in found["new_key"]["error_message"]

    found = form(action="delete", brain_key="ecif")
    said = found["goes"]["view"]["label"]
    assert said.startswith(
        "The run will be deleted, with the fields ecif_influence, ecif_positive, ecif_negative, ecif_rank and 0"
    )
    assert found["delete_ecif"]["invalid"]
    assert not form(action="delete", brain_key="ecif", delete_ecif=True)["delete_ecif"]["invalid"]
    assert form(action="delete", brain_key="other", delete_ecif=True)["delete_other"]["invalid"]
    dataset.delete_brain_run("other")
    said = form(action="delete", brain_key="ecif")["goes"]["view"]["label"]
    assert f"and {size_text(Store(*results.config.store[:-1]).size())} of cache" in said
    found = form(action="free")
    assert "brain_key" not in found
    assert found["unused"]["view"]["label"].startswith(f"The cache takes {size_text(cache_size())}. ")


def test_a_form_that_is_asked_often_reads_the_pairs_once(dataset, score, monkeypatch, manage):
    score(dataset.match_tags("train"), dataset.match_tags("val"))
    asked = []
    monkeypatch.setattr(managing, "staleness", lambda *of: asked.append(of) or managing.Stale(0, 0, 0))
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    for _ in range(3):
        resolve(dataset, "manage_influence_runs", {"action": "rename", "brain_key": "ecif"})
    assert len(asked) == 1
    monkeypatch.setattr(time, "monotonic", lambda: 1030.0)
    resolve(dataset, "manage_influence_runs", {"action": "rename", "brain_key": "ecif"})
    assert len(asked) == 2


def test_forms_without_anything_to_work_on_are_blocked(made):
    dataset = fo.Dataset()
    dataset.add_sample(fo.Sample(filepath=made[0].first().filepath))
    assert resolve(dataset, "compute_influence", {})["no_captions"]["invalid"]
    assert resolve(dataset, "detect_misalignment", {})["no_captions"]["invalid"]
    assert "Detect misaligned pairs first" in resolve(dataset, "review_misalignment", {})["no_run"]["error_message"]
    assert resolve(dataset, "tag_by_influence", {})["no_scores"]["invalid"]
    assert resolve(dataset, "manage_influence_runs", {})["no_run"]["invalid"]
    assert resolve(dataset, "export_pairs", {})["no_captions"]["invalid"]
    dataset.delete()


@pytest.fixture
def few(dataset):
    """Scores of 60 pairs, 20 of which harm, in a dataset of 96."""
    dataset.add_sample_field("ecif_influence", fo.FloatField)
    ids = dataset.match_tags("train").values("id")[:60]
    dataset.set_values("ecif_influence", {i: (n - 20) / 10 or 0.01 for n, i in enumerate(ids)}, key_field="id")
    return dataset


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"limit": "share", "percent": 10}, "6 pairs will be tagged"),
        ({"limit": "share", "share": 0.1}, "6 pairs will be tagged"),
        ({"limit": "count", "count": 15}, "15 pairs will be tagged"),
        (
            {"limit": "count", "count": 30},
            "20 pairs will be tagged, not 30: of the 96 samples to choose among, 60 have this score, and 20 of those "
            "are harmful",
        ),
        ({"limit": "threshold", "threshold": 1.0}, "20 pairs will be tagged"),
    ],
)
def test_the_tag_form_counts_and_says_what_limits_it(few, params, said):
    entered = {"field": "ecif_influence", "direction": "harmful", **params}
    assert resolve(few, "tag_by_influence", entered)["preview"]["view"]["label"] == said
    result = operator("tag_by_influence")(few, **entered).result
    assert result == {"tag": "harmful", "count": int(said.split()[0])}
    assert max(few.match_tags("harmful").values("ecif_influence")) < 0


def test_the_tag_form_says_where_there_are_more(few):
    stages = few.exists("ecif_influence").limit(5)._serialize()
    params = {"field": "ecif_influence", "direction": "harmful", "count": 100}
    said = resolve(few, "tag_by_influence", params, view=stages)["preview"]["view"]["label"]
    assert said.endswith("5 of those are harmful. The whole dataset has 20: choose 'Entire dataset' at the top")


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"limit": "share", "percent": 0}, "percent", "more than 0 and at most 100"),
        ({"limit": "share", "share": 7}, "share", "Share 7"),
        ({"count": 0}, "count", "Pairs 0 must be at least 1"),
        ({"count": 5, "tag": "aligned"}, "tag", "'aligned' is reserved"),
    ],
)
def test_the_tag_form_says_what_is_wrong(few, params, field, message):
    found = resolve(few, "tag_by_influence", {"field": "ecif_influence", **params})[field]
    assert found["invalid"]
    assert message in found["error_message"]


def test_the_tag_goes_with_the_end_that_is_chosen(few):
    tagged = operator("tag_by_influence")(few, direction="valuable", count=3).result
    assert tagged == {"tag": "valuable", "count": 3}
    form = resolve(few, "tag_by_influence", {"direction": "valuable"})
    assert form["tag"]["default"] is None
    assert form["tag"]["view"]["description"] == "'valuable' if left empty"


def test_the_tag_form_starts_with_the_score_of_a_run(dataset):
    for field in ("a_size", "audit_misalignment"):
        dataset.add_sample_field(field, fo.FloatField)
    form = resolve(dataset, "tag_by_influence", {})
    assert form["field"]["default"] == "audit_misalignment"
    assert "direction" not in form  # the least suspicious ones are of no interest
    assert form["tag"]["view"]["description"] == "'suspicious' if left empty"
    dataset.add_sample_field("ecif_influence", fo.FloatField)
    form = resolve(dataset, "tag_by_influence", {})
    assert (form["field"]["default"], form["direction"]["default"]) == ("ecif_influence", "harmful")


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"device": "gpu"}, "device", "none that torch knows"),
        ({"device": "cuda:99"}, "device", "finds no"),
        ({"n_partitions": 0}, "n_partitions", "at least 1"),
        ({"batch_size": 97}, "batch_size", "There are 96 pairs. Use at most 96"),
        ({"pretrained": "/etc/passwd"}, "pretrained", "/etc/passwd is no checkpoint"),
        ({"pretrained": "/etc/"}, "pretrained", "The folder /etc holds no weights"),
        ({"pretrained": "~/none.pt"}, "pretrained", "There is no file HOME/none.pt"),
        ({"brain_key": "a key"}, "brain_key", "Key 'a key' is not a name"),
    ],
)
def test_what_the_form_can_judge_is_judged_there(dataset, monkeypatch, tmp_path, params, field, message):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = resolve(dataset, "compute_influence", {"advanced": True, "caption_field": "caption", **params})[field]
    assert found["invalid"]
    assert message.replace("HOME", str(tmp_path)) in found["error_message"]


def test_a_pasted_path_is_taken_as_it_is_meant(dataset, options, made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(made[1], tmp_path / "mine.pt")
    for text in (" ~/mine.pt ", f'"{tmp_path}/mine.pt"', "'~/mine.pt' "):
        assert not resolve(dataset, "compute_influence", {"pretrained": text})["pretrained"].get("invalid")
        operator("compute_influence")(
            dataset.match_tags("train"), **options | {"pretrained": text, "fit": False, "overwrite": True}
        )
        dataset.reload()
        assert dataset.get_brain_info("ecif").config.pretrained == str(tmp_path / "mine.pt")
    operator("export_pairs")(dataset, ' "~/pairs.csv"')
    assert (tmp_path / "pairs.csv").is_file()


def test_validation_pairs_are_left_out_of_what_is_scored(dataset, options):
    dataset.save_view("mine", dataset.match_tags("val"))
    for target in ("tag: val", "saved view: mine"):
        operator("compute_influence")(dataset, **options | {"target": target, "overwrite": True})
        assert dataset.match_tags("val").count("ecif_influence") == 0
        assert dataset.count("ecif_influence") == 72
    operator("compute_influence")(dataset, **options, leave_out=False, overwrite=True)
    assert dataset.count("ecif_influence") == 96
    form = resolve(dataset, "compute_influence", {"target": "tag: val"}, view=dataset.match_tags("val")._serialize())
    assert "All of these are validation pairs" in form["target"]["error_message"]


def test_a_share_can_be_held_out(dataset, options):
    dataset.untag_samples(["train", "val"])
    form = resolve(dataset, "compute_influence", {"target": "hold out", "held_out": 25.0})
    assert form["target"]["type"]["values"] == ["hold out"]
    assert form["target"]["default"] == "hold out"
    assert form["counts"]["view"]["label"] == "72 pairs will be scored towards 24 validation pairs"
    assert (
        "at least 2"
        in resolve(dataset, "compute_influence", {"target": "hold out", "held_out": 0.5})["target"]["error_message"]
    )
    drawn = []
    for seed in (0, 0, 1):
        operator("compute_influence")(
            dataset, **options | {"target": "hold out", "overwrite": True}, held_out=25.0, held_out_seed=seed
        )
        drawn.append(set(dataset.match_tags("held_out").values("id")))
        assert not set(dataset.exists("ecif_influence").values("id")) & drawn[-1]
    assert len(drawn[0]) == len(drawn[2]) == 24
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_form_starts_with_what_was_entered_last(dataset, options, detect):
    assert resolve(dataset, "compute_influence", {})["pretrained"]["default"] is None
    params = {**options, "caption_field": "spoiled", "target": "tag: train", "scope": "lora:4:99"}
    failed = dict(run_in_the_app(dataset, params))
    assert failed["notify"]["variant"] == "error"
    form = resolve(dataset, "compute_influence", {})
    kept = {name: form[name]["default"] for name in ("model", "pretrained", "caption_field", "target", "fit")}
    assert kept == {name: params[name] for name in kept}
    assert form["brain_key"]["default"] == "ecif"  # nothing was written under it
    assert resolve(dataset, "detect_misalignment", {})["pretrained"]["default"] == options["pretrained"]
    detect(fit=False)
    form = resolve(dataset, "detect_misalignment", {})
    assert (form["brain_key"]["default"], form["caption_field"]["default"]) == ("audit2", "caption")
    dataset.add_sample_field("ecif_rank", fo.StringField)
    assert resolve(dataset, "compute_influence", {})["brain_key"]["default"] == "ecif2"


def test_a_form_starts_with_the_run_where_that_is_newer(dataset, score):
    score(dataset.match_tags("train"), dataset.match_tags("val"), brain_key="direct")
    config = dataset.get_brain_info("direct").config
    form = resolve(dataset, "detect_misalignment", {})
    assert (form["model"]["default"], form["pretrained"]["default"]) == (config.model, config.pretrained)


def test_the_slice_that_the_app_shows_is_scored(grouped, options):
    params = {"caption_field": "caption", "target": "tag: val", "limit": "count", "count": 200}
    for slice_, pairs in (("right", 96), ("left", 96)):
        form = resolve(grouped, "detect_misalignment", params, group_slice=slice_)
        assert not form["caption_field"].get("invalid")
        assert form["counts"]["view"]["label"] == f"{pairs} pairs will be scored"
    form = resolve(grouped, "compute_influence", params, group_slice="right")
    assert form["counts"]["view"]["label"] == "72 pairs will be scored towards 24 validation pairs"
    told = run_in_the_app(grouped, {**options, **params}, group_slice="right")
    assert dict(told)["notify"]["variant"] == "success"
    right = grouped.select_group_slices("right")
    assert right.count("ecif_influence") == len(right.match_tags("train")) == 72
    assert grouped.select_group_slices("left").count("ecif_influence") == 0


def test_a_view_of_groups_is_taken_apart(dataset, options):
    view = dataset.match_tags("train").group_by("spoiled")
    form = resolve(dataset, "detect_misalignment", {"caption_field": "caption"}, view=view._serialize())
    assert form["counts"]["view"]["label"] == "72 pairs will be scored"
    with pytest.raises(EcifError, match=r"Use its samples: view.flatten\(\)"):
        compute_misalignment(view, model=options["model"], pretrained=options["pretrained"])
    compute_misalignment(view.flatten(), model=options["model"], pretrained=options["pretrained"], batch_size=24)


def test_captions_in_lists_get_advice_that_works(dataset, options):
    dataset.add_sample_field("captions", fo.ListField, subfield=fo.StringField)
    dataset.set_values("captions", [[text, "another"] for text in dataset.values("caption")])
    dataset.delete_sample_fields(["caption", "spoiled"])
    said = resolve(dataset, "compute_influence", {})["no_captions"]["error_message"]
    train = dataset.match_tags("train")
    with pytest.raises(EcifError, match="Captions must be in a string field, but 'captions' is a ListField") as failed:
        compute_misalignment(train, "captions", options["model"], options["pretrained"])
    advice = said.partition("Make one of the lists in 'captions': ")[2]
    assert advice
    assert str(failed.value).endswith(advice)
    exec(advice, {"dataset": dataset})
    compute_misalignment(train, model=options["model"], pretrained=options["pretrained"], batch_size=24)


def test_one_selected_pair_cannot_be_scored(dataset):
    one = [dataset.first().id]
    for name in ("compute_influence", "detect_misalignment"):
        form = resolve(dataset, name, {}, selected=one, view_target="SELECTED_SAMPLES")
        assert "at least 2 pairs, and 1 is selected" in form["one_pair"]["error_message"]


def test_the_fields_of_runs_are_no_captions_and_the_likely_one_is_chosen(dataset, detect):
    detect(fit=False)
    dataset.rename_sample_field("caption", "alt_words")
    dataset.add_sample_field("source", fo.StringField)
    form = resolve(dataset, "compute_influence", {})["caption_field"]
    assert sorted(form["type"]["values"]) == ["alt_words", "source", "spoiled"]
    assert form["default"] == "alt_words"  # the one with the longest texts
    dataset.rename_sample_field("alt_words", "Description")
    for name in ("compute_influence", "export_pairs"):
        assert resolve(dataset, name, {})["caption_field"]["default"] == "Description"
    form = resolve(dataset, "compute_influence", {"caption_field": "source"})
    assert form["empty"]["view"]["label"] == "Only 0 of 96 samples have a text in 'source'"
    assert "empty" not in resolve(dataset, "compute_influence", {"caption_field": "Description"})


def test_a_target_that_cannot_be_used_names_the_field(dataset, options):
    dataset.rename_sample_field("caption", "alt")
    dataset.match_tags("val").set_field("alt", None).save("alt")
    with pytest.raises(EcifError, match=r"The target cannot be used.*alt: empty"):
        operator("compute_influence")(dataset.match_tags("train"), **options, caption_field="alt")


def test_the_export_form_protects_a_file(dataset, tmp_path):
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    assert resolve(dataset, "export_pairs", {"path": str(taken)})["path"]["invalid"]
    assert not resolve(dataset, "export_pairs", {"path": str(taken), "overwrite": True})["path"]["invalid"]
    assert "Must end in .csv or .json" in resolve(dataset, "export_pairs", {"path": "/x.doc"})["path"]["error_message"]


def test_a_file_is_not_written_where_the_app_runs(dataset, options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, ending in (("export_pairs", "csv"), ("edit_model", "pt")):
        if name == "edit_model":
            operator("compute_influence")(dataset.match_tags("train"), **options)
        form = resolve(dataset, name, {"path": f"mine.{ending}"})
        assert form["path"]["error_message"] == f"Give the whole path, such as {tmp_path}/mine.{ending}"
        assert not resolve(dataset, name, {"path": f"~/mine.{ending}"})["path"].get("invalid")
    monkeypatch.chdir(tmp_path)
    operator("export_pairs")(dataset, "mine.csv")  # from Python it is where one works
    assert (tmp_path / "mine.csv").is_file()


LIST = """
import sys, fiftyone.operators as foo, fiftyone.operators.registry as registry
print(sorted(op.name for op in foo.list_operators(builtin=False)))
assert not registry.OperatorRegistry().list_errors(), registry.OperatorRegistry().list_errors()
assert "torch" not in sys.modules and "open_clip" not in sys.modules
import fiftyone_ecif
print(fiftyone_ecif.__file__)
homes = [m for m in sys.modules.values() if str(getattr(m, "__file__", "")).endswith("fiftyone_ecif/__init__.py")]
assert len(homes) == 1, homes
"""


def list_in_a_fresh_process(plugins, path=""):
    """Lists the operators of a plugins folder in a process that does not see the package under test as installed."""
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    ran = subprocess.run(
        [sys.executable, "-c", hide + LIST],
        cwd=plugins,
        env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins), "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-2:]


SHIPPED = (
    "fiftyone.yml",
    "requirements.txt",
    "operators/__init__.py",
    "operators/panel/keys.js",
    "skills/curate-pairs/SKILL.md",
)
OPERATORS = str(sorted(LISTED["operators"] + LISTED["panels"]))  # FiftyOne counts panels among the operators


def test_the_plugin_works_from_a_link_where_the_package_is_not_installed(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    found, home = list_in_a_fresh_process(tmp_path)
    assert found == OPERATORS
    assert Path(home) == ROOT / "fiftyone_ecif" / "__init__.py"


def test_the_plugin_is_downloaded_with_the_library_beside_it(tmp_path):
    archive = tmp_path / "served" / "fiftyone-ecif.zip"
    archive.parent.mkdir()
    folders = [path for name in ("operators", "fiftyone_ecif", "skills") for path in (ROOT / name).rglob("*")]
    with zipfile.ZipFile(archive, "w") as file:
        for path in [ROOT / "fiftyone.yml", ROOT / "requirements.txt", *folders]:
            if path.is_file() and "__pycache__" not in path.parts:
                file.write(path, Path("fiftyone-ecif-main") / path.relative_to(ROOT))
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ran = subprocess.run(
            [
                *(Path(sys.executable).with_name("fiftyone"), "plugins", "download"),
                f"http://127.0.0.1:{server.server_port}/{archive.name}",
            ],
            env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins)},
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert ran.returncode == 0, ran.stderr
    assert all((plugins / PLUGIN / name).is_file() for name in SHIPPED)
    found, home = list_in_a_fresh_process(plugins)
    assert found == OPERATORS
    assert Path(home) == plugins / PLUGIN / "fiftyone_ecif" / "__init__.py"


def test_the_plugin_works_from_the_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        assert {name.split("/")[0] for name in archive.namelist()} == {
            "fiftyone_ecif",
            wheel.name.split("-py3")[0] + ".dist-info",
        }
    assert all((site / "fiftyone_ecif/plugin" / name).is_file() for name in SHIPPED)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    installed = subprocess.run(
        [sys.executable, "-c", "from fiftyone_ecif.cli.main import main; main()", "plugin", "install"],
        cwd=site,
        env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr
    assert (plugins / PLUGIN).resolve() == site / "fiftyone_ecif" / "plugin"
    found, home = list_in_a_fresh_process(plugins, site)
    assert found == OPERATORS
    assert Path(home).is_relative_to(site)
    shutil.rmtree(ROOT / "build", ignore_errors=True)


def test_a_missing_dependency_is_an_install_hint(dataset, monkeypatch):
    package = type(operator("compute_influence")).__module__.rpartition(".")[0]
    monkeypatch.setattr(sys.modules[f"{package}.forms"], "MISSING", ["open_clip"])
    for name in LISTED["operators"]:
        assert "pip install" in resolve(dataset, name, {})["missing"]["error_message"]


def test_an_operator_called_in_an_event_loop_is_done_when_it_returns(dataset, made):
    """As in a notebook, where FiftyOne would hand out a task."""

    async def cell():
        operator = foo.get_operator("@ecif/fiftyone-ecif/detect_misalignment")
        return operator(dataset.match_tags("train"), model=training.MODEL, pretrained=made[1], batch_size=24)

    asyncio.run(cell())
    assert dataset.count("audit_misalignment") == len(dataset.match_tags("train"))


@pytest.mark.parametrize(
    ("registry", "base", "name", "field"),
    [
        (SOLVERS, Solver, "compute_influence", "solver"),
        (TARGET_LOSSES, TargetLoss, "compute_influence", "target_loss"),
        (DETECTORS, Detector, "detect_misalignment", "detector"),
    ],
)
def test_what_is_registered_is_offered_in_the_form(dataset, registry, base, name, field):
    said = {"name": "of_a_test", "says": "nothing", "unit": "nats"}
    registry.register(type("OfATest", (base,), said | dict.fromkeys(base.__abstractmethods__, lambda *_: None)))
    try:
        offered = resolve(dataset, name, {"advanced": True})[field]["view"]["choices"]
    finally:
        registry.withdraw("of_a_test")
    again = resolve(dataset, name, {"advanced": True})[field]["view"]["choices"]
    assert [choice["value"] for choice in offered] == [*(choice["value"] for choice in again), "of_a_test"]
