"""The demo, and the README's examples as they stand; they share what was trained."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fiftyone as fo
import pytest

from fiftyone_ecif.demo.demo import DATASET
from fiftyone_ecif.store.files import cache_folder

DOCS = Path(__file__).resolve().parents[3] / "docs"
README = (DOCS.parent / "README.md").read_text()


def section(title, language):
    body = README.split(f"## {title}\n")[1]
    return re.search(rf"```{language}\n(.*?)```", body, re.S).group(1)


def test_the_demo_prints_one_json_object_and_is_quick_the_second_time(python):
    results = []
    for command in ([sys.executable], python):
        demo = [*command, "-m", "fiftyone_ecif", "demo", "--pairs", "200", "--no-app", "--json"]
        ran = subprocess.run(demo, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "Logging error" not in ran.stderr
        results.append(json.loads(ran.stdout))
    first, second = results
    assert first["dataset"] == DATASET
    assert (first["pairs"], first["spoiled"], first["validation_pairs"]) == (200, 40, 50)
    assert 0 <= first["precision_at_10"] <= 1
    assert set(first["auroc"]) == {"influence", "clip_score", "self_influence"}
    assert set(first["seconds"]) == {"dataset", "training", "influence"}
    assert first["fields"] == ["ecif_influence", "ecif_negative", "ecif_positive", "ecif_rank"]
    # on the thumbnails the rank alone: many influences look alike when they are rounded
    assert fo.load_dataset(DATASET).app_config.active_fields.paths == ["caption", "ecif_rank", "spoiled"]
    assert second["auroc"] == first["auroc"]
    (kept,) = cache_folder().glob(f"*/{fo.load_dataset(DATASET)._doc.id}")
    assert (
        len([path for path in kept.iterdir() if path.is_dir()]) == 1
    )  # both processes knew the model by the same fingerprint
    assert second["seconds"]["training"] < 0.5 < first["seconds"]["training"]
    fo.delete_dataset(DATASET)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Runs the Python example in a folder of its own."""
    folder = tmp_path_factory.mktemp("example")
    before = os.getcwd()
    os.chdir(folder)
    try:
        variables = {}
        exec(compile(section("From Python", "python"), "README.md", "exec"), variables)
    finally:
        os.chdir(before)
    yield folder, variables
    for name in (DATASET, "small-demo"):
        if fo.dataset_exists(name):
            fo.delete_dataset(name)


def test_a_table_of_pairs_becomes_a_dataset(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "caption", "split"])
        table.writerows((sample.filepath, sample.caption, sample.tags[0]) for sample in made[0])
    exec(compile(section("Your own pairs", "python"), "README.md", "exec"), {})
    dataset = fo.load_dataset("my-pairs")
    assert dataset.values(["filepath", "caption", "tags"]) == made[0].values(["filepath", "caption", "tags"])
    dataset.delete()


def test_the_python_example(example):
    folder, variables = example
    dataset = variables["dataset"]
    assert dataset.count("ecif_influence") == 200
    assert sorted(dataset.list_brain_runs()) == ["audit", "ecif"]
    assert not dataset.has_sample_field("slice_influence")
    assert dataset.count_sample_tags()["check"] == 10
    assert len((folder / "check.csv").read_text().splitlines()) == 11
    assert variables["review"].aligned + variables["review"].misaligned == 20


def test_the_shell_example(example, python, tmp_path):
    folder, _ = example
    program = tmp_path / "fiftyone-ecif"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([*python, "-m", "fiftyone_ecif"])} "$@"\n')
    program.chmod(0o755)
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", section("From the shell", "shell")],
        cwd=folder,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Scored 200 pairs" in ran.stdout
    assert "Tagged 10 pairs of 'ecif-demo' as 'check'" in ran.stdout


def test_the_field_table_names_the_fields():
    from fiftyone_ecif.runs.influence import InfluenceConfig
    from fiftyone_ecif.runs.misalignment import MisalignmentConfig

    fields = [*InfluenceConfig().fields("k"), *MisalignmentConfig().fields("k")]
    assert all(f"`{{key}}_{name.split('_', 1)[1]}`" in README for name in fields)


def test_the_pictures_are_there_and_small():
    guide = (DOCS / "guide.md").read_text()
    pictures = [DOCS.parent / path for path in re.findall(r"!\[.*?\]\((.*?)\)", README)]
    pictures += [DOCS / path for path in re.findall(r"!\[.*?\]\((.*?)\)", guide)]
    assert len(pictures) > 10
    assert all(path.stat().st_size < (250_000 if path.suffix == ".png" else 1_500_000) for path in pictures)
    assert {path.name for path in (DOCS / "guide").iterdir()} == {path.name for path in pictures}
