"""Misaligned pairs by the operator, from Python, in the App and in the background."""

import math
from dataclasses import replace

import fiftyone as fo
import pytest
from fiftyone.operators.delegated import DelegatedOperationService
from operator_driver import operator, resolve, run_in_the_app

from fiftyone_ecif import EcifError, compute_misalignment
from fiftyone_ecif.demo import training
from fiftyone_ecif.misalignment import judgement
from fiftyone_ecif.misalignment.evidence import KINDS
from fiftyone_ecif.runs.diagnostics import diagnose


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
