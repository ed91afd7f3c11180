"""What FiftyOne keeps of a run: settings and record, and no lists of samples."""

import pytest
from bson import json_util
from fiftyone.core.odm import get_db_conn

from fiftyone_ecif import EcifError
from fiftyone_ecif.runs import InfluenceConfig, base
from fiftyone_ecif.runs.influence import InfluenceRecord
from fiftyone_ecif.settings.influence import InfluenceSettings


@pytest.fixture
def scored(dataset, score):
    return score(dataset.match_tags("train"), dataset.match_tags("val"), brain_key="ecif")


def document(dataset, key="ecif"):
    return get_db_conn()["runs"].find_one({"_dataset_id": dataset._doc.id, "key": key})


def test_no_document_of_the_database_lists_samples(dataset, scored):
    said = json_util.dumps(document(dataset))
    samples = dataset.values("id")
    assert not [sample for sample in samples if sample in said]


def test_the_targets_samples_are_in_the_results(dataset, scored):
    again = dataset.load_brain_results("ecif", cache=False)
    assert sorted(again.target_ids[""]) == sorted(dataset.match_tags("val").values("id"))
    assert again.target_dataset() is dataset


def test_a_config_is_the_same_after_the_database(dataset, scored):
    config = dataset.get_brain_info("ecif").config
    assert config.settings == scored.config.settings
    assert config.record.store == scored.config.record.store
    assert document(dataset)["config"]["cls"] == "fiftyone_ecif.runs.InfluenceConfig"


def test_a_config_is_changed_by_making_another_only():
    config = InfluenceConfig(InfluenceSettings(fit=True), InfluenceRecord(encoder="e"))
    changed = config.recording(traced=True)
    assert (config.traced, changed.traced, changed.fit, changed.encoder) == (False, True, True, "e")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = config.nonsense


def test_a_view_that_is_too_long_to_be_recorded_is_refused_before_the_work(dataset, score, monkeypatch):
    monkeypatch.setattr(base, "_LARGEST_VIEW", 1000)
    named = dataset.select(dataset.match_tags("train").values("id"))
    with pytest.raises(EcifError, match="The view names its 72 samples one by one"):
        score(named, dataset.match_tags("val"))
    score(dataset.match_tags("train"), dataset.match_tags("val"))
