"""Scoring through FiftyOne's own registry and executor, from Python, in the App and in the background."""

import asyncio

import fiftyone as fo
import fiftyone.operators as foo
import pytest
from fiftyone.operators.delegated import DelegatedOperationService
from operator_driver import PLUGIN, operator, resolve, run_in_the_app

from fiftyone_ecif import EcifError
from fiftyone_ecif.demo import training
from fiftyone_ecif.influence.solvers import SOLVERS, Solver
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, TargetLoss
from fiftyone_ecif.misalignment.detectors import DETECTORS, Detector


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
