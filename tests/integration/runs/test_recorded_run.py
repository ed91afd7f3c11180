"""Runs that version 0.1 recorded are read, traced, renamed and deleted by this one. See tests/data/recorded_run."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import fiftyone as fo
import numpy as np
import pytest
from bson import json_util
from click.testing import CliRunner
from fiftyone.core.odm import get_db_conn
from panel_driver import Panel

from fiftyone_ecif import (
    EcifError,
    InfluenceResults,
    MisalignmentResults,
    delete_run,
    export_pairs,
    list_runs,
    propose_pairs,
    rename_run,
    review_misalignment,
    staleness,
    tag_by_influence,
    trace,
)
from fiftyone_ecif.api.inspection import inspect_pair
from fiftyone_ecif.api.tracing import mark_traces
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.runs.describe import describe_run
from fiftyone_ecif.runs.manage import load_run, removal
from fiftyone_ecif.store.files import cache_folder

RECORDED = Path(__file__).resolve().parents[2] / "data" / "recorded_run"
EXPECTED = json.loads((RECORDED / "expected.json").read_text())
INFLUENCE = ("ecif_influence", "ecif_positive", "ecif_negative", "ecif_rank", "ecif_self_influence")
AUDIT = ("audit_misalignment", "audit_reason", "audit_duplicate")


@pytest.fixture
def recorded(tmp_path):
    """The dataset as it was recorded, in this database and this cache folder; deleted afterwards."""
    content = (RECORDED / "database.json").read_text().replace("@HOME@", tmp_path.as_posix())
    collections, database = json_util.loads(content), get_db_conn()
    for name, documents in collections.items():
        database[name].insert_many(documents)
    with tarfile.open(RECORDED / "store.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    cache_folder().mkdir(exist_ok=True)
    shutil.copytree(tmp_path / "cache", cache_folder(), dirs_exist_ok=True)
    dataset = fo.load_dataset("recorded")
    yield dataset
    dataset.delete()
    for name, documents in collections.items():
        database[name].delete_many({"_id": {"$in": [document["_id"] for document in documents]}})
    shutil.rmtree(store_of(dataset), ignore_errors=True)


def store_of(dataset):
    return cache_folder() / "format-1" / str(dataset._doc.id)


def load(dataset, key):
    return dataset.load_brain_results(key, cache=False)


def culprits(results):
    return [{"id": one.id, "culprits": [culprit.id for culprit in one.culprits]} for one in trace(results)]


def values_of(dataset, field):
    return dict(zip(*dataset.match_tags("train").values(["id", field]), strict=True))


def test_it_is_listed_and_described(recorded):
    audit, ecif = list_runs(recorded)
    assert (ecif.key, ecif.kind, ecif.model) == ("ecif", "influence", "tiny-recorded")
    assert (audit.key, audit.kind, audit.model) == ("audit", "misalignment", "tiny-recorded")
    for run, fields in ((ecif, INFLUENCE), (audit, AUDIT)):
        assert (run.scored, run.skipped, run.when.year) == (20, 0, 2026)
        assert run.pretrained.endswith("/model.pt")
        assert run.cache_bytes > 100_000
        assert set(fields) <= set(run.fields)
    assert "ecif_trace" in ecif.fields
    assert staleness(recorded, "ecif") == (20, 0, 0)  # no image is where it was
    assert describe_run(recorded, "ecif").startswith("**ecif**: influence by tiny-recorded ")
    assert describe_run(recorded, "audit").startswith("**audit**: misalignment by tiny-recorded ")
    listed = CliRunner().invoke(main, ["runs", "recorded"]).stdout.splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["audit", "ecif"]


def test_its_settings_are_what_they_were(recorded):
    config = recorded.get_brain_info("ecif").config
    assert (config.model, config.batch_size, *config.scores) == ("tiny-recorded", 10, "self_influence")
    assert (config.fit, config.traced, config.role, config.solver) == (True, True, "exact", "hessian")
    audit = recorded.get_brain_info("audit").config
    assert (audit.detector, audit.fit, audit.trained, audit.proximal) == ("fused", True, False, 1.0)
    for key in ("ecif", "audit"):
        assert recorded.load_brain_view(key).values("id") == recorded.match_tags("train").values("id")


def test_its_values_are_what_they_were(recorded):
    assert values_of(recorded, "ecif_influence") == EXPECTED["influence"]
    assert values_of(recorded, "audit_misalignment") == EXPECTED["misalignment"]
    results, audit = load(recorded, "ecif"), load(recorded, "audit")
    assert isinstance(results, InfluenceResults)
    assert isinstance(audit, MisalignmentResults)
    assert results.ids == audit.ids == sorted(EXPECTED["influence"])
    assert results.diagnostics["target_loss"] == pytest.approx(4.2267907981)
    assert 0 <= audit.noise_rate.low <= audit.noise_rate.rate <= audit.noise_rate.high <= 1
    assert sorted(results.target_pairs().ids) == sorted(recorded.match_tags("val").values("id"))


def test_what_it_stored_is_read(recorded):
    train, results = recorded.match_tags("train").sort_by("id"), load(recorded, "ecif")
    target = results.target_pairs().gradients.mean(0, keepdims=True)
    for field, stored in zip(("ecif_positive", "ecif_negative"), results.cached().influence(target), strict=True):
        np.testing.assert_allclose(stored[0], train.values(field), rtol=1e-5)
    np.testing.assert_allclose(results.self_influence(), train.values("ecif_self_influence"))
    assert len(results.clip_score()) == len(results.leave_one_out_loss()) == 20
    np.testing.assert_allclose(np.linalg.norm(results.image_embeddings(), axis=1), 1, rtol=1e-5)
    sample = results.ids[3]
    found = inspect_pair(results, sample)
    assert found.neighbours[0].id in results.ids
    assert {link.id for link in (*found.harms, *found.helps)} <= set(results.target_pairs().ids)
    with pytest.raises(EcifError, match="Run compute_misalignment again"):  # it had no decoys yet
        load(recorded, "audit").evidence()


def test_it_is_traced(recorded):
    results = load(recorded, "ecif")
    assert culprits(results) == EXPECTED["trace"]
    marked = values_of(recorded, "ecif_trace")
    mark_traces(results, trace(results))
    assert values_of(recorded, "ecif_trace") == marked
    assert any(marked.values())


def test_it_has_no_decoys_to_learn_from_and_says_what_to_do(recorded):
    train, before = recorded.match_tags("train"), values_of(recorded, "audit_misalignment")
    order = train.sort_by("audit_misalignment")
    order.limit(10).tag_samples("aligned")
    order.skip(10).tag_samples("misaligned")
    for learn in (review_misalignment, lambda audit: propose_pairs(audit, 4)):
        with pytest.raises(EcifError, match="Run compute_misalignment again with overwrite=True"):
            learn(load(recorded, "audit"))
    assert values_of(recorded, "audit_misalignment") == before


def test_it_is_shown_in_the_panel(recorded):
    panel = Panel(recorded)
    assert sorted(panel.state["runs"]) == ["audit", "ecif"]
    assert (
        "positive = valuable, negative = harmful"
        in panel.send("choose_run", value="ecif").send("choose_page", value="overview").text
    )
    text = panel.send("choose_page", value="run").text
    assert "Do not trust it any more" in text  # its images are not there
    assert "20 changed" in text


def test_it_is_tagged_and_exported(recorded, tmp_path):
    worst = sorted(EXPECTED["influence"], key=EXPECTED["influence"].get)[:3]
    assert tag_by_influence(recorded.match_tags("train"), "ecif_influence", tag="out", count=3).values("id") == worst
    assert export_pairs(recorded.match_tags("out"), tmp_path / "out.csv") == 3
    with (tmp_path / "out.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert {sample: float(row["ecif_influence"]) for sample, row in rows.items()} == {
        sample: pytest.approx(EXPECTED["influence"][sample]) for sample in worst
    }


def test_it_is_renamed(recorded):
    rename_run(recorded, "ecif", "other")
    rename_run(recorded, "audit", "second")
    recorded.reload()
    assert sorted(recorded.list_brain_runs()) == ["other", "second"]
    assert not [field for field in recorded.get_field_schema() if field.startswith(("ecif", "audit"))]
    assert values_of(recorded, "other_influence") == EXPECTED["influence"]
    assert values_of(recorded, "second_misalignment") == EXPECTED["misalignment"]
    assert any(values_of(recorded, "other_trace").values())
    assert culprits(load(recorded, "other")) == EXPECTED["trace"]
    assert len(load(recorded, "second").ids) == 20


def test_it_is_deleted(recorded):
    store = store_of(recorded)
    assert any(store.iterdir())
    delete_run(recorded, "ecif")
    assert recorded.list_brain_runs() == ["audit"]
    assert len(load(recorded, "audit").ids) == 20
    with pytest.raises(EcifError, match="has no influence run 'ecif'"):
        load_run(recorded, "ecif")
    removed = removal(recorded, "audit")
    assert sorted(removed.fields) == sorted(AUDIT)
    assert removed.cache_bytes > 100_000
    delete_run(recorded, "audit")
    recorded.reload()
    assert recorded.list_brain_runs() == []
    assert not [field for field in recorded.get_field_schema() if field.startswith(("ecif", "audit"))]
    assert not list(store.rglob("*.h5"))
