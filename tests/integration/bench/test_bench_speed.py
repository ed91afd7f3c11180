"""The speed benchmark, with hardly anything to measure."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from fiftyone_ecif.bench.speed import detection, embedding, growth, library_jobs, passes, stored
from fiftyone_ecif.bench.speed import experiments as speed
from fiftyone_ecif.bench.speed.stopwatch import side_by_side
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.demo.training import MODEL

TINY = replace(
    speed.QUICK,
    photographs=24,
    scopes=("heads", "lora:2:1"),
    batch=8,
    width=32,
    layers=1,
    deep_batch=4,
    stored=5_000,
    growth=(600,),
    repeats=1,
)


def test_ways_are_taken_in_turns_and_their_preparation_is_not_timed():
    now, order = [0.0], []

    def takes(name, seconds):
        def way():
            order.append(name)
            now[0] += seconds[order.count(name) - 1]

        return way

    def prepare():
        now[0] += 100

    ways = {"a": takes("a", [1, 9, 2]), "b": takes("b", [5, 4, 6])}
    assert side_by_side(3, ways, prepare, lambda: now[0]) == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("scope", ["heads", "lora:2:1", "blocks:1", "."])
def test_direct_scoring_and_autograd_give_equal_numbers(scope):
    row = passes.direct(scope, pairs=8, width=32, layers=1, repeats=1)
    assert row["difference"] < (1e-10 if scope == "heads" else 1e-4)
    assert row["over_forward"] == pytest.approx((row["enter"] + row["direct"]) / row["forward"])
    assert row["again"] == pytest.approx(row["direct"] / row["forward"])
    assert row["over_autograd"] == pytest.approx(row["autograd"] / row["direct"])


def test_hooks_see_as_many_coordinates_as_are_stored():
    scope, batch, _ = passes.problem("heads", 8, 32, 1)
    projection = passes.principal_projection(scope, scope.start, [batch])
    seen = passes._head_hooks(scope, projection.heads, batch)()
    assert sum(part[0].numel() for part in seen) == projection.rank


def test_ratios_come_from_the_rows():
    found = {
        "embed": [{"who": "fiftyone", "total": 4.0}, {"who": "ecif", "total": 3.0}],
        "direct": [{"over_forward": 2.0, "over_autograd": 300.0}, {"over_forward": 2.5, "over_autograd": 200.0}],
        "cached": [{"scope": "heads", "ratio": 1.5}, {"scope": "lora:2", "ratio": 50.0}],
        "store": [
            {"what": "read", "files": "cold", "mb_per_s": 100.0},
            {"what": "new target", "files": "cold", "mb_per_s": 60.0},
            {"what": "read", "files": "warm", "mb_per_s": 900.0},
            {"what": "new target", "files": "warm", "mb_per_s": 90.0},
        ],
        "growth": [{"pairs": pairs, "seconds": 0.1 * pairs**0.9} for pairs in (10, 100, 1000)],
    }
    assert speed.ratios(found) == pytest.approx(
        {
            "embed": 0.75,
            "direct_forward": 2.5,
            "direct_autograd": 200.0,
            "cached_hook_logra": 1.5,
            "rescore_bandwidth": 0.6,
            "growth_exponent": 0.9,
        }
    )


@pytest.mark.parametrize("name", library_jobs.OURS)
def test_the_job_of_the_libraries_has_a_score_for_each_query_and_pair(name, monkeypatch):
    monkeypatch.setattr(library_jobs, "PAIRS", 24)
    monkeypatch.setattr(library_jobs, "QUERIES", 5)
    monkeypatch.setattr(library_jobs, "RANK", 3)
    scores = np.asarray(library_jobs.JOBS[name](*library_jobs.job()).__array__())
    assert scores.shape == (5, 24)
    assert np.isfinite(scores).all()


def test_the_command_reports_every_section(monkeypatch, tmp_path):
    embed = embedding.embed
    monkeypatch.setattr(speed, "QUICK", TINY)
    monkeypatch.setattr(embedding, "embed", lambda pairs, repeats: embed(pairs, repeats, MODEL))
    monkeypatch.setattr(growth, "measure", growth._score)  # in this process: another takes seconds to import
    result = CliRunner().invoke(main, ["bench", "speed", "--quick", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert set(found["ratios"]) == {
        "embed",
        "direct_forward",
        "direct_autograd",
        "cached_hook_logra",
        "rescore_bandwidth",
        "growth_exponent",
    }
    assert [row["who"] for row in found["embed"]] == ["fiftyone", "ecif"]
    assert found["embed"][1]["Solving"] > 0
    assert found["peers"] == []
    assert set(found["memory_mib"]) == {"600"}
    assert "| lora:2:1 |" in (tmp_path / "report.md").read_text()


def test_a_store_is_scored_from_the_files_that_are_read():
    rows = {(row["what"], row["files"]): row for row in stored.rescore(5_000, 1)}
    assert {files for _, files in rows} == {"cold", "warm"}
    assert all(row["seconds"] > 0 for row in rows.values())


def test_detection_among_many_pairs_is_timed_by_stage(monkeypatch):
    monkeypatch.setattr(detection, "_WIDTHS", (24, 16, 8))
    monkeypatch.setattr(detection, "_SHOWN", 16)
    assert detection.neighbours(300)["recall"] == 1  # all are compared
    found = detection.detect(300)
    assert set(found["stages"]) == {"Finding duplicates", "Comparing pairs", "Refitting", "Judging"}
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()))
