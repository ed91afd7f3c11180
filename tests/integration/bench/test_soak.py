"""Scoring, tracing and deleting over and over leaves memory and disk as they were."""

from fiftyone_ecif.bench.soak import soak


def test_memory_and_disk_stay_flat(dataset, made):
    found = soak(dataset, made[1], 4)
    assert found["cache_bytes"]["slope"] == 0
    assert found["cache_bytes"]["last"] == found["cache_bytes"]["first"]
    assert abs(found["database_bytes"]["last"] - found["database_bytes"]["first"]) < 512  # a run takes ten times that
    assert found["resident_mib"]["last"] < found["resident_mib"]["first"] + 100
    assert dataset.list_brain_runs() == []
