"""Influence scores against retraining; against autograd through a model they are in test_towers.py."""

import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import conjugate_gradient
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.scoring import _smallest_norm


def make_problem(pairs=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    scope = HeadScope(draw(6, 4) / 2, draw(5, 4) / 2, 4.0)
    mix = draw(3, 6), draw(3, 5)
    shared, held_out = draw(pairs, 3), draw(48, 3)
    features = [[z @ m + 0.5 * draw(len(z), m.shape[1]) for m in mix] for z in (shared, held_out)]
    return scope, features[0], features[1]


def fitted(objective):
    *_, (theta, _) = minimise(objective, tolerance=1e-7)
    return theta


@pytest.mark.parametrize("with_scale", [False, True])
def test_the_tangent_of_the_heads_is_the_derivative_of_their_similarity(with_scale):
    plain, (images, texts), _ = make_problem(8)
    scope = HeadScope(*plain.split(plain.start), 4.0, bias=-3.0, with_scale=with_scale)
    direction = torch.randn(len(scope.start), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, tangent = scope.similarity_and_tangent(scope.start, (images, texts), direction)
    expected = torch.func.jvp(lambda at: scope.similarity(at, (images, texts)), (scope.start,), (direction,))
    torch.testing.assert_close((value, tangent), expected)


def test_influence_predicts_leave_one_out_retraining():
    """Fit again without a pair, for real; the sign, size and order of the change must be as predicted."""
    scope, (images, texts), held_out = make_problem()
    partition = random_partition(96, 32, seed=0)
    objective = ContrastiveLoss(scope, FeatureBatches(images, texts, partition), 96, proximal=1.0)
    target = ContrastiveLoss(scope, FeatureBatches(*held_out, [torch.arange(48)]), 48)
    theta = fitted(objective)
    gradient, before = target.gradient_and_value(theta)
    *_, solution = conjugate_gradient(lambda v: objective.hessian_product(theta, v), gradient)

    predicted, actual = [], []
    for rows, batch in zip(partition, objective.batches, strict=True):
        parts = batch_influence(scope, theta, batch, solution.vector, 96)
        predicted += (parts[0] + parts[1])[:8].tolist()
        for row in rows[:8]:
            without = FeatureBatches(images, texts, [batch[batch != row] for batch in partition])
            # the mean stays over all 96 pairs, so that only the removed terms change
            actual.append((target.loss(fitted(ContrastiveLoss(scope, without, 96, 1.0))) - before).item())
    predicted, actual = torch.tensor(predicted), torch.tensor(actual)
    assert torch.corrcoef(torch.stack([predicted, actual]))[0, 1] > 0.97
    assert (predicted.dot(actual) / predicted.dot(predicted)).item() == pytest.approx(1, abs=0.15)


def test_an_embedding_that_has_collapsed_is_an_error():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(21, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scope = HeadScope(torch.eye(4), 2 * torch.eye(4), 5.0)
    objective = ContrastiveLoss(scope, FeatureBatches(images, texts, random_partition(21, 6, seed=0)), 21)
    found = _smallest_norm(objective, scope.start)
    lengths = [sorted(row.norm().item() for row in side) for side in (images, 2 * texts)]
    assert found == pytest.approx(min(side[0] / side[10] for side in lengths))
    images[7] *= 1e-5
    with pytest.raises(EcifError, match="An embedding has collapsed"):
        _smallest_norm(objective, scope.start)
