"""Runs survive that media are moved: what counts is the bytes of an image."""

import os
import shutil

import fiftyone as fo
import numpy as np
import pytest

from fiftyone_ecif import EcifError, group_influence, staleness, trace
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.runs.manage import Stale


@pytest.fixture
def own(dataset, tmp_path):
    """The dataset with image files of its own."""
    folder = tmp_path / "first"
    folder.mkdir()
    for sample in dataset.iter_samples(autosave=True):
        sample.filepath = str(shutil.copy(sample.filepath, folder))
    return dataset


@pytest.fixture
def scored(own, score):
    results = score(own.match_tags("train"), own.match_tags("val"), fit=True)
    return own, results, group_influence(results, results.ids[:3])


def move(dataset, folder):
    folder.mkdir()
    for sample in dataset.iter_samples(autosave=True):
        sample.filepath = str(shutil.move(sample.filepath, folder))


def touch(dataset, folder):
    for path in dataset.values("filepath"):
        os.utime(path, ns=(0, 10**18))


@pytest.mark.parametrize("change", [move, touch])
def test_a_run_survives_moved_files(change, scored, score, tmp_path, monkeypatch):
    dataset, results, before = scored
    change(dataset, tmp_path / "second")
    assert staleness(dataset, "ecif") == Stale(0, 0, 0)
    np.testing.assert_allclose(group_influence(results, results.ids[:3]), before, rtol=1e-6)
    assert staleness(dataset, "ecif") == Stale(0, 0, 0)
    monkeypatch.setattr(OpenClipEncoder, "features", None)  # nothing is encoded again
    again = score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True, overwrite=True)
    assert again.skipped == {}
    assert again.digests == results.digests


def test_a_run_survives_an_export_and_an_import(scored, tmp_path):
    dataset, _, before = scored
    dataset.export(str(tmp_path / "out"), dataset_type=fo.types.FiftyOneDataset, progress=False)
    found = fo.Dataset.from_dir(str(tmp_path / "out"), dataset_type=fo.types.FiftyOneDataset, progress=False)
    for path in dataset.values("filepath"):
        os.unlink(path)
    results = found.load_brain_results("ecif")
    assert results.samples._dataset is found
    assert staleness(found, "ecif") == Stale(0, 0, 0)
    np.testing.assert_allclose(group_influence(results, results.ids[:3]), before, rtol=1e-6)
    assert trace(results, limit=1)
    found.delete()


def test_other_bytes_at_the_same_place_are_a_change(scored):
    dataset, results, _ = scored
    first, second = dataset.match_tags("train").sort_by("id").limit(2).values("filepath")
    stat = os.stat(first)
    shutil.copyfile(second, first)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert staleness(dataset, "ecif") == Stale(1, 0, 0)
    with pytest.raises(EcifError, match="changed since"):
        group_influence(results, results.ids[:3])
