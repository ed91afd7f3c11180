"""The command line: results on stdout, one-line errors, exit codes."""

import json
import subprocess
import sys

import fiftyone as fo
import pytest
from click.testing import CliRunner

from fiftyone_ecif import demo
from fiftyone_ecif.cli import main
from fiftyone_ecif.store import cache_folder


def invoke(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def named(dataset, made):
    return dataset.name, ["--model", "ecif-digits", "--pretrained", made[1], "--batch-size", 24]


def test_score_tag_export(dataset, named, tmp_path):
    name, model = named
    ran = invoke("score", name, "--tag", "train", "--target-tag", "val", *model, "--fit", "--json")
    assert ran.exit_code == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["scored"], result["skipped"], result["key"]) == (72, {}, "ecif")
    dataset.reload()
    assert dataset.count("ecif_influence") == 72

    ran = invoke("tag", name, "--count", 7, "--json")
    assert json.loads(ran.stdout) == {"dataset": name, "tag": "harmful", "tagged": 7}
    path = tmp_path / "harmful.csv"
    ran = invoke("export", name, path, "--tag", "harmful")
    assert ran.stdout == f"Exported 7 pairs to {path}\n"
    assert len(path.read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["score", "nowhere", "--target-tag", "val"], 1, "There is no dataset 'nowhere'"),
        (["score", "nowhere"], 2, "--target-tag or --target-view"),
        (["score"], 2, "Missing argument 'DATASET'"),
        (["tag", "nowhere", "--direction", "sideways"], 2, "sideways"),
        (["export", "nowhere", "x.csv"], 1, "There is no dataset 'nowhere'"),
        (["demo", "--pairs", "3", "--no-app"], 1, "at least 8 pairs"),
    ],
)
def test_errors_are_one_line(args, code, message):
    ran = invoke(*args)
    assert ran.exit_code == code
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_a_saved_view_that_does_not_exist(named):
    ran = invoke("score", named[0], "--view", "gone", "--target-tag", "val", *named[1])
    assert ran.exit_code == 1
    assert "no saved view 'gone'" in ran.stderr


@pytest.mark.parametrize("command", [[], ["demo"], ["score"], ["tag"], ["export"], ["plugin", "install"], ["doctor"]])
def test_every_command_has_help(command):
    ran = invoke(*command, "--help")
    assert ran.exit_code == 0
    assert len(ran.stdout.splitlines()) > 4


def test_doctor_and_plugin_install_know_this_machine():
    checks = {check["name"]: check for check in json.loads(invoke("doctor", "--json").stdout)["checks"]}
    assert checks["database"]["ok"]
    assert checks["plugin"]["ok"]
    assert checks["cache"]["ok"]
    ran = invoke("plugin", "install", "--json")
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["plugin"].endswith("@ecif/fiftyone-ecif")


def test_the_demo_prints_one_json_object_and_is_quick_the_second_time():
    command = [sys.executable, "-m", "fiftyone_ecif", "demo", "--pairs", "96", "--noise", "0.25", "--no-app", "--json"]
    results = []
    for _ in range(2):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "Logging error" not in ran.stderr
        results.append(json.loads(ran.stdout))
    first, second = results
    assert first["dataset"] == demo.DATASET
    assert (first["pairs"], first["spoiled"], first["validation_pairs"]) == (96, 24, 24)
    assert 0 <= first["precision_at_10"] <= 1
    assert set(first["auroc"]) == {"influence", "clip_score", "self_influence"}
    assert set(first["seconds"]) == {"dataset", "training", "influence"}
    assert first["fields"] == ["ecif_influence", "ecif_negative", "ecif_positive", "ecif_rank"]
    assert second["auroc"] == first["auroc"]
    (kept,) = cache_folder().glob(f"*/{fo.load_dataset(demo.DATASET)._doc.id}")
    assert len(list(kept.iterdir())) == 1  # both processes knew the model by the same fingerprint
    assert second["seconds"]["training"] < 0.5 < first["seconds"]["training"]
    fo.delete_dataset(demo.DATASET)


def test_the_demo_leaves_a_dataset_of_the_users_alone():
    mine = fo.Dataset(demo.DATASET)
    ran = invoke("demo", "--no-app")
    assert ran.exit_code == 1
    assert "not the demo's" in ran.stderr
    mine.delete()
