"""The demo set is made once, whoever asks for it, and leaves alone what others use."""

import os
from pathlib import Path

import fiftyone as fo
import pytest

from fiftyone_ecif.demo import demo
from fiftyone_ecif.demo.demo import load_demo


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    yield
    for name in fo.list_datasets("ecif-test-demo*"):
        fo.delete_dataset(name)


def times(dataset):
    return {path: os.stat(path).st_mtime_ns for path in dataset.values("filepath")}


def test_a_second_dataset_of_the_same_set_leaves_the_files_alone():
    first = load_demo(16, name="ecif-test-demo-1")
    before = times(first)
    second = load_demo(16, name="ecif-test-demo-2")
    assert second.values("filepath") == first.values("filepath")
    assert times(first) == before
    assert second.values("caption") == first.values("caption")


def test_a_dataset_of_other_arguments_replaces_it_and_leaves_the_files_alone():
    load_demo(16, name="ecif-test-demo-1")
    other = load_demo(16, name="ecif-test-demo-2")
    before = times(other)
    assert len(load_demo(8, name="ecif-test-demo-1")) == 16
    assert len(load_demo(16, name="ecif-test-demo-1")) == 24
    assert times(other) == before


def test_a_file_that_is_lost_is_made_again_and_the_dataset_kept():
    dataset = load_demo(16, name="ecif-test-demo-1")
    sample = dataset.first()
    sample.tags.append("mine")
    sample.save()
    before, lost = times(dataset), sample.filepath
    content = Path(lost).read_bytes()
    Path(lost).unlink()
    assert load_demo(16, name="ecif-test-demo-1") is dataset
    assert dataset.count_sample_tags()["mine"] == 1
    assert Path(lost).read_bytes() == content
    after = times(dataset)
    assert {path for path in before if after[path] != before[path]} == {lost}


def test_a_demo_that_is_stopped_leaves_no_half_file(monkeypatch):
    def stops(image, path, *format):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo.Image.Image, "save", stops)
        with pytest.raises(KeyboardInterrupt):
            load_demo(16, name="ecif-test-demo-1")
    assert not list(demo.demo_folder(16, 0.2, 0).rglob("*.png*"))
