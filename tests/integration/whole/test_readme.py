"""The README's examples run as they stand."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import fiftyone as fo
import pytest

from fiftyone_ecif.demo.demo import DATASET

DOCS = Path(__file__).resolve().parents[3] / "docs"
README = (DOCS.parent / "README.md").read_text()


def section(title, language):
    body = README.split(f"## {title}\n")[1]
    return re.search(rf"```{language}\n(.*?)```", body, re.S).group(1)


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
