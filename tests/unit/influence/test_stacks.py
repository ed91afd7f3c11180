"""Batches in stacks give what batches one at a time give, and the closed form what autograd gives."""

import numpy as np
import pytest
import torch
from torch.func import grad

from fiftyone_ecif import devices
from fiftyone_ecif.influence.curvature import gauss_newton_at, hessian_at
from fiftyone_ecif.influence.direct import direct_influence
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import principal_projection
from fiftyone_ecif.progress import result_of
from fiftyone_ecif.store.disk_matrix import DiskMatrix

PAIRS, WIDTHS, WIDTH = 47, (6, 5), 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["softmax", "sigmoid", "with scale"])
def objective(request):
    loss = SigmoidLoss() if request.param == "sigmoid" else SoftmaxLoss()
    bias = -3.0 if request.param == "sigmoid" else 0.0
    heads = [draw(width, WIDTH, seed=width) for width in WIDTHS]
    scope = HeadScope(*heads, 6.0, bias, loss, request.param == "with scale")
    sides = [draw(PAIRS, width, seed=10 + width).float() for width in WIDTHS]
    batches = FeatureBatches(*sides, random_partition(PAIRS, 9, 0))  # of two sizes
    return ContrastiveLoss(scope, batches, PAIRS, 0.2)


@pytest.fixture(params=[1, 200, 10**9], ids=["one by one", "in twos", "in one of each size"])
def stacked(request, monkeypatch):
    monkeypatch.setitem(devices._STACKED, "cpu", request.param)


def everything(objective):
    theta = objective.scope.start + 0.1 * draw(len(objective.scope.start), seed=3)
    vector = draw(len(theta), seed=4)
    gradient, value = objective.gradient_and_value(theta)
    scores = result_of(direct_influence(objective, theta, [vector], "exact"))
    projection = principal_projection(objective.scope, theta, objective.own_stacks(), rank=3)
    curvature = projection.hessian(objective, theta)
    return {
        "gradient": gradient,
        "value": value,
        "loss": objective.loss(theta),
        "scale": objective.gradient_scale(theta),
        "hessian": hessian_at(objective, theta)(vector),
        "gauss-newton": gauss_newton_at(objective, theta)(vector),
        "positive": torch.from_numpy(scores[0]),
        "negative": torch.from_numpy(scores[1]),
        "curvature": curvature.diagonal().sum(),  # eigenvectors have no sign
    }


def test_stacks_have_batches_of_one_size_and_every_batch_once(objective, stacked):
    stacks, partition = objective.stacks(), objective.batches.partition
    assert sorted(number for stack in stacks for number in stack) == list(range(len(partition)))
    assert all(len({len(partition[number]) for number in stack}) == 1 for stack in stacks)
    for stack, (images, texts) in zip(stacks, objective.own_stacks(), strict=True):
        for place, number in enumerate(stack):
            one, other = objective.batches[number]
            assert torch.equal(images[place], one)
            assert torch.equal(texts[place], other)


def test_stacks_change_nothing(objective, stacked, monkeypatch):
    found = everything(objective)
    monkeypatch.setitem(devices._STACKED, "cpu", 1)
    for name, expected in everything(objective).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_scores_come_with_the_mean_loss(objective, stacked):
    theta = objective.scope.start + 0.1 * draw(len(objective.scope.start), seed=3)
    found = result_of(direct_influence(objective, theta, [theta, draw(len(theta), seed=4)], "exact"))
    unpulled = ContrastiveLoss(objective.scope, objective.batches, PAIRS).loss(theta)
    assert found.loss == pytest.approx(unpulled.item(), rel=1e-12)


def test_closed_form_is_the_derivative(objective, stacked):
    theta = objective.scope.start + 0.1 * draw(len(objective.scope.start), seed=3)
    vector = draw(len(theta), seed=4)
    batches = list(objective.batches)

    def loss(at):
        parts = [objective.scope.loss.pair_losses(objective.scope.similarity(at, batch)).sum() for batch in batches]
        offset = at - objective.scope.start
        return sum(parts) / PAIRS + 0.1 * offset.dot(offset)

    expected = grad(loss)(theta)
    torch.testing.assert_close(objective.gradient_and_value(theta)[0], expected, rtol=1e-10, atol=1e-12)
    for at, twin in ((hessian_at, objective.hessian_product), (gauss_newton_at, objective.gauss_newton_product)):
        torch.testing.assert_close(at(objective, theta)(vector), twin(theta, vector), rtol=1e-9, atol=1e-12)


def test_features_on_the_disk_in_the_order_of_the_partition(objective, stacked, tmp_path):
    batches = objective.batches
    order = torch.cat(list(batches.partition))
    sides = []
    for side in (batches.images, batches.texts):
        matrix = DiskMatrix(*side.shape, tmp_path)
        matrix.write(range(PAIRS), side.numpy())
        sides.append(matrix.in_order(order))
        np.testing.assert_array_equal(sides[-1][:].numpy(), side.numpy())
    on_disk = FeatureBatches(*sides, batches.partition)
    for found, expected in zip(on_disk.each(objective.stacks()), objective.own_stacks(), strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
