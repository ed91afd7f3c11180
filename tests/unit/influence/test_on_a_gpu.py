"""What the heads give on a GPU is what they give on the CPU."""

import numpy as np
import pytest
import torch

from fiftyone_ecif.devices import ON_CPU, Placement
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope, resident
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.newton_step import removal_step
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.scoring import score_pairs
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.influence.target_losses import Contrastive
from fiftyone_ecif.misalignment.neighbours import nearest
from fiftyone_ecif.progress import result_of
from fiftyone_ecif.store.disk_matrix import DiskMatrix
from fiftyone_ecif.store.tables import Store

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
PAIRS, HELD_OUT = 301, 60
WIDTHS = 48, 32, 24


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def matrices(tmp_path):
    """Features on the disk, of pairs that have something in common."""
    shown = draw(PAIRS, 16)
    found = []
    for number, width in enumerate(WIDTHS[:2]):
        side = DiskMatrix(PAIRS, width, tmp_path)
        side.write(range(PAIRS), (shown @ draw(16, width, seed=1 + number) + 0.5 * draw(PAIRS, width)).numpy())
        found.append(side)
    return found


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path / "cache"))
    return (Store("gpu-test", str(number)) for number in range(9))


def problem(matrices, placement, loss=None, with_scale=False, on_disk=False):
    weights = [draw(width, WIDTHS[2], seed=5) / width**0.5 for width in WIDTHS[:2]]
    bias = -2.0 if isinstance(loss, SigmoidLoss) else 0.0
    scope = HeadScope(*weights, 10.0, bias, loss or SoftmaxLoss(), with_scale, placement)
    sides = matrices if on_disk else [resident(side, placement) for side in matrices]
    batches = FeatureBatches(*sides, random_partition(PAIRS, 32, 0), placement)
    aims = FeatureBatches(*sides, random_partition(HELD_OUT, 20, 1), placement)
    return scope, batches, aims


def score(store, matrices, placement, options, **choice):
    store.ensure_writable()
    scope, batches, aims = problem(matrices, placement, **choice)
    return result_of(score_pairs(store, scope, batches, {"target": Contrastive().make(scope, aims)}, options))


@pytest.mark.parametrize("solver", ["hessian", "ggn", "identity", "logra"])
@pytest.mark.parametrize("loss", [SoftmaxLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
def test_scores(solver, loss, matrices, stores):
    options = ScoringOptions(solver=solver, fit=True, proximal=0.1, damping=0.1, keep_gradients=True)
    found, expected = (
        score(next(stores), matrices, where, options, loss=loss) for where in (Placement("cuda"), ON_CPU)
    )
    for role in ("positive", "negative"):
        one, other = getattr(found, role), getattr(expected, role)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert found.diagnostics["training_loss"] == pytest.approx(expected.diagnostics["training_loss"], rel=1e-6)


def test_features_on_the_disk_give_what_those_on_the_card_give(matrices, stores):
    options = ScoringOptions(fit=False, proximal=1.0)
    found, expected = (
        score(next(stores), matrices, Placement("cuda"), options, with_scale=True, on_disk=on_disk)
        for on_disk in (True, False)
    )
    np.testing.assert_allclose(found.positive, expected.positive, rtol=0, atol=1e-9 * np.abs(expected.positive).max())


def test_float32_keeps_the_order(matrices, stores):
    options = ScoringOptions(fit=True, proximal=0.1)
    scores = [score(next(stores), matrices, where, options) for where in (Placement("cuda", torch.float32), ON_CPU)]
    found, expected = ((each.positive + each.negative)[0] for each in scores)
    ranks = [np.argsort(np.argsort(each)) for each in (found, expected)]
    assert np.corrcoef(*ranks)[0, 1] > 0.999


def test_an_edit(matrices):
    steps = []
    for where in (Placement("cuda"), ON_CPU):
        scope, batches, _ = problem(matrices, where)
        objective = ContrastiveLoss(scope, batches, PAIRS, 1.0)
        steps.append(
            result_of(removal_step(objective, scope.start, torch.arange(40), "hessian", tolerance=1e-8)).vector
        )
    torch.testing.assert_close(steps[0].cpu(), steps[1], rtol=0, atol=1e-7 * steps[1].abs().max().item())


def test_neighbours():
    rows = draw(3000, 24)
    found, expected = nearest(rows, 10, device="cuda"), nearest(rows, 10)
    torch.testing.assert_close(found.similarity.cpu(), expected.similarity, rtol=0, atol=1e-5)
    assert (found.rows.cpu() == expected.rows).float().mean() > 0.999
