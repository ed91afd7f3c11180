"""Runs are described, renamed and deleted by the operator."""

import sys
import time

import fiftyone as fo
import pytest
from fiftyone.operators.executor import ExecutionContext, Executor
from operator_driver import operator, resolve

from fiftyone_ecif import EcifError
from fiftyone_ecif.runs import manage as managing
from fiftyone_ecif.runs.cache import cache_size, size_text
from fiftyone_ecif.store.tables import Store


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
    assert said == "The run will be deleted, with the fields ecif_influence, ecif_positive, ecif_negative, ecif_rank"
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
