"""Several processes that share a job against one that does it alone."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from fiftyone_ecif.api.influence import influence_steps
from fiftyone_ecif.api.misalignment import compute_misalignment
from fiftyone_ecif.demo.training import MODEL
from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings

_SCORE = """
import os, sys
import fiftyone as fo
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.api.influence import influence_steps
from fiftyone_ecif.api.misalignment import compute_misalignment
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.distributed import join

processes = join()
dataset = fo.load_dataset(sys.argv[1])
settings = InfluenceSettings(model=sys.argv[2], pretrained=sys.argv[3], fit=True, batch_size=24)
try:
    train, val = (dataset.match_tags(tag) for tag in ("train", "val"))
    steps = influence_steps(train, val, settings, JobSettings(num_workers=0))
    for step in steps:
        if processes.rank == 1 and step.stage == "Computing gradients":
            os._exit(9)
except EcifError as error:
    sys.exit(str(error))
"""


def torchrun(python, script, *arguments, count=2):
    """Runs a script in several processes as torchrun does, without its agent, which would end all when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen(
            [*python, "-c", script, *arguments],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    return [(*process.communicate(timeout=300), process.returncode) for process in processes]


def test_one_process_takes_everything():
    assert ProcessGroup.here() is ALONE
    assert ALONE.first
    assert list(ALONE.share(range(5))) == [0, 1, 2, 3, 4]
    assert ALONE.gather([1, 2]) == [1, 2]
    part = torch.ones(2)
    assert ALONE.total(part) is part


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_items_once(count):
    shares = [ProcessGroup(rank, count).share(range(10)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


_ENGINE = """
import sys
import torch
from fiftyone_ecif.influence.heads import FeatureBatches
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.objective import random_partition
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.distributed import join
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.influence.scoring import score_pairs
from fiftyone_ecif.store.tables import Store
from fiftyone_ecif.influence.target_losses import Contrastive

def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

processes = join()
scope = HeadScope(draw(30, 12, seed=0), draw(20, 12, seed=1), 3.0)
images, texts = draw(70, 30, seed=2), draw(70, 20, seed=3)
batches = FeatureBatches(images, texts, random_partition(70, 9, 0))
target_pairs = FeatureBatches(images[:25] + 0.1, texts[:25], random_partition(25, 9, 1))
target = Contrastive().make(scope, target_pairs)
target.processes = processes
method = ScoringOptions(fit=True, solver=sys.argv[2])
scores = follow(score_pairs(Store("ranks", sys.argv[1]), scope, batches, {"target": target}, method, processes), False)
wrong = target.mistakes(scope.start).sum().item()
loss = target.loss(scope.start).item()
norm, correlation = scores.diagnostics["smallest_norm"], scores.diagnostics.get("cached_correlation", 0)
torch.save([torch.from_numpy(scores.positive), torch.from_numpy(scores.negative), wrong, loss, norm, correlation],
           f"{sys.argv[3]}-{processes.rank}.pt")
"""


@pytest.mark.parametrize("solver", ["hessian", "logra"])
def test_three_processes_find_what_one_finds(tmp_path, solver, python):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    subprocess.run([*python, "-c", _ENGINE, f"alone-{solver}", solver, alone], check=True)
    for _, complaint, code in torchrun(python, _ENGINE, f"shared-{solver}", solver, str(shared), count=3):
        assert code == 0, complaint
    expected = torch.load(f"{alone}-0.pt", weights_only=True)
    for rank in range(3):
        found = torch.load(f"{shared}-{rank}.pt", weights_only=True)
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
        assert found[2] == expected[2]
        assert found[3:] == pytest.approx(expected[3:], rel=1e-5)


def test_torchrun_scores_as_one_process_does(dataset, score, made):
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    score(train, val, fit=True, brain_key="alone")
    expected = np.array(train.values("alone_influence"))
    dataset.persistent = True
    dataset.delete_brain_run("alone")  # with its cache: the processes encode and fit themselves
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "fiftyone_ecif",
        "score",
        dataset.name,
        "--tag",
        "train",
        "--target-tag",
        "val",
        "--json",
        "--fit",
    ]
    command += ["--model", MODEL, "--pretrained", made[1], "--batch-size", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scored"] == len(train)  # once, by the first process
    dataset.reload()
    found = np.array(train.values("ecif_influence"))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


_DETECTION = """
import sys, torch
import numpy as np
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.distributed import join
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.misalignment.detection import run_detectors
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment import neighbours

processes = join()
draw = lambda *shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
meaning = draw(150, 4, seed=0)
images, texts = meaning @ draw(4, 12, seed=1) + draw(150, 12, seed=2), meaning @ draw(4, 10, seed=3)
scope = HeadScope(draw(12, 4, seed=4), draw(10, 4, seed=5), 5.0)
batches = FeatureBatches(images.float(), texts.float(), random_partition(150, 30, 0))
objective = ContrastiveLoss(scope, batches, 150, 0.1, processes)
duplicates = find_duplicates(images.float(), [str(row) for row in range(150)])
findings = follow(run_detectors(DetectorInputs(objective, scope.start, duplicates), ["calibrated"]), False)
neighbours.EXACT_ON_CPU = 10
torch.set_num_threads(1)
many = draw(9000, 8, seed=6)
near = neighbours.nearest(many, 5, processes=processes)
evidence = findings.evidence
rows = torch.from_numpy(np.concatenate([evidence.pairs, evidence.decoys]))
fitted = torch.tensor([name.startswith(("fitted", "canonical")) for name in evidence.names])
torch.save([rows[:, ~fitted], near.similarity, rows[:, fitted]],
           f"{sys.argv[1]}-{processes.rank}.pt")
"""


def test_processes_find_the_same_evidence_as_one(tmp_path, python):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    subprocess.run([*python, "-c", _DETECTION, alone], check=True)
    for _, complaint, code in torchrun(python, _DETECTION, str(shared), count=2):
        assert code == 0, complaint
    expected = torch.load(f"{alone}-0.pt", weights_only=True)
    for rank in range(2):
        *same, fitted = torch.load(f"{shared}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(same, expected[:-1], rtol=1e-5, atol=1e-5)
        # fits add up in another order and stop somewhere near the minimum, and canonical heads weigh pairs by them
        for one, other in zip(fitted.T, expected[-1].T, strict=True):
            assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.999


def test_torchrun_detects_as_one_process_does(dataset, made):
    options = {"caption_field": "caption", "model": MODEL, "pretrained": made[1], "batch_size": 24}
    train = dataset.match_tags("train")
    compute_misalignment(train, brain_key="alone", progress=False, **options)
    expected = np.array(train.values("alone_misalignment"))
    dataset.persistent = True
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fiftyone_ecif", "misalignment", dataset.name, "--tag", "train", "--key", "shared", "--json"]
    command += ["--model", MODEL, "--pretrained", made[1], "--batch-size", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scored"] == len(train)  # once, by the first process
    dataset.reload()
    found = train.values("shared_misalignment")
    assert np.corrcoef(found, expected)[0, 1] > 0.9999
    # fits add up in another order and stop near the minimum; each round of judging goes on from the one before
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_what_cannot_be_shared_says_so(dataset, python):
    command = [*python, "-m", "fiftyone_ecif", "tag", dataset.name, "--count", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": "2"})
    assert done.returncode == 1
    assert done.stderr == "Error: Only score and misalignment can be shared by processes. Run this without torchrun\n"


def test_a_process_that_died_is_said_and_nothing_is_lost(dataset, score, made, python):
    dataset.persistent = True
    (_, complaint, code), (_, _, died) = torchrun(python, _SCORE, dataset.name, MODEL, made[1])
    assert died == 9
    assert code == 1
    assert "Another process of this job ended" in complaint.splitlines()[-1]
    dataset.reload()
    assert not dataset.has_sample_field("ecif_influence")
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    settings = InfluenceSettings(model=MODEL, pretrained=made[1], fit=True, batch_size=24)
    stages = {step.stage for step in influence_steps(train, val, settings, JobSettings(num_workers=0))}
    assert "Computing gradients" in stages
    assert not stages & {"Encoding images", "Encoding captions", "Fitting"}
    found = np.array(train.values("ecif_influence"))
    dataset.delete_brain_run("ecif")
    score(train, val, fit=True)
    expected = np.array(train.values("ecif_influence"))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
