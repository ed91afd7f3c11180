"""The fidelity benchmark, with hardly anything to measure."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fiftyone_ecif.bench.fidelity import experiments, sizes
from fiftyone_ecif.bench.fidelity.agreement import cosine
from fiftyone_ecif.bench.fidelity.study import drive, make_study
from fiftyone_ecif.bench.fidelity.world import make_world
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.influence.newton_step import removal_step

TINY = replace(
    sizes.QUICK,
    pairs=400,
    lora_pairs=32,
    validation=256,
    steps=150,
    removals=8,
    subsets=6,
    lora_subsets=3,
    fractions=(0.2,),
    edits=(0.1,),
    directions=16,
)


@pytest.fixture(scope="module")
def world():
    return make_world(TINY.pairs, TINY.validation, TINY.steps)


def test_exact_roles_with_the_hessian_predict_leave_one_out(world):
    rows = {(row["role"], row["solver"]): row for row in experiments.loo(world, TINY)}
    best = rows["exact", "hessian"]
    assert len(rows) == 20
    assert best["pearson"] > 0.97
    assert best["slope"] == pytest.approx(1, abs=0.2)
    assert best["pearson_low"] <= best["pearson"] <= best["pearson_high"]
    assert rows["as_printed", "hessian"]["pearson"] < best["pearson"]
    assert rows["exact", "identity"]["pearson"] < best["pearson"]


def test_an_edit_is_the_retrained_model(world):
    study = make_study(world, "heads", TINY.pairs, 0)
    removed = torch.arange(8)
    step = drive(removal_step(study.objective, study.theta, removed, "hessian"))
    change = study.retrain(removed) - study.theta
    assert cosine(step, change) > 0.99
    assert (step.norm() / change.norm()).item() == pytest.approx(1, abs=0.05)


def test_the_command_reports_every_section(monkeypatch, tmp_path):
    """The rows of the short sections are measured; those that retrain adapters are stand-ins."""
    stand_in = [{"method": "m", "scope": "heads", "mean": 0.5, "ci_low": 0.4, "ci_high": 0.6}]
    sections = {name: experiments.SECTIONS[name] for name in ("loo", "curves")}
    monkeypatch.setattr(sizes, "QUICK", TINY)
    monkeypatch.setattr(
        experiments,
        "SECTIONS",
        {name: sections.get(name, lambda world, sizes: stand_in) for name in experiments.SECTIONS},
    )
    result = CliRunner().invoke(main, ["bench", "fidelity", "--quick", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert set(experiments.SECTIONS) <= set(found)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert {row["kind"] for row in found["curves"]} == {"random", "harmful", "valuable"}
    assert all(np.isfinite(row["test_loss"]) for row in found["curves"])
    report = (tmp_path / "report.md").read_text()
    assert "| exact | hessian | heads |" in report
    assert {path.name for path in tmp_path.glob("*.png")} == {"loo.png", "lds.png", "curves.png"}
