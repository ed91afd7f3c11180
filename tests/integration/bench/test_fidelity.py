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
def ran(tmp_path_factory):
    """The command, and where it wrote: the rows of the short sections are measured, the others are stand-ins."""
    out = tmp_path_factory.mktemp("out")
    stand_in = [{"method": "m", "scope": "heads", "mean": 0.5, "ci_low": 0.4, "ci_high": 0.6}]
    measured = {name: experiments.SECTIONS[name] for name in ("loo", "curves")}
    sections = {name: measured.get(name, lambda world, sizes: stand_in) for name in experiments.SECTIONS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "QUICK", TINY)
        patch.setattr(experiments, "SECTIONS", sections)
        return CliRunner().invoke(main, ["bench", "fidelity", "--quick", "--json", "--out", str(out)]), out


@pytest.fixture(scope="module")
def result(ran):
    assert ran[0].exit_code == 0, ran[0].output
    return json.loads(ran[0].stdout.strip().splitlines()[-1])


def test_exact_roles_with_the_hessian_predict_leave_one_out(result):
    rows = {(row["role"], row["solver"]): row for row in result["loo"]}
    best = rows["exact", "hessian"]
    assert len(rows) == 20
    assert best["pearson"] > 0.97
    assert best["slope"] == pytest.approx(1, abs=0.2)
    assert best["pearson_low"] <= best["pearson"] <= best["pearson_high"]
    assert rows["as_printed", "hessian"]["pearson"] < best["pearson"]
    assert rows["exact", "identity"]["pearson"] < best["pearson"]


def test_an_edit_is_the_retrained_model():
    study = make_study(make_world(TINY.pairs, TINY.validation, TINY.steps), "heads", TINY.pairs, 0)
    removed = torch.arange(8)
    step = drive(removal_step(study.objective, study.theta, removed, "hessian"))
    change = study.retrain(removed) - study.theta
    assert cosine(step, change) > 0.99
    assert (step.norm() / change.norm()).item() == pytest.approx(1, abs=0.05)


def test_the_command_reports_every_section(ran, result):
    out = ran[1]
    assert set(experiments.SECTIONS) <= set(result)
    assert json.loads((out / "result.json").read_text()) == result
    assert {row["kind"] for row in result["curves"]} == {"random", "harmful", "valuable"}
    assert all(np.isfinite(row["test_loss"]) for row in result["curves"])
    report = (out / "report.md").read_text()
    assert "| exact | hessian | heads |" in report
    assert {path.name for path in out.glob("*.png")} == {"loo.png", "lds.png", "curves.png"}
