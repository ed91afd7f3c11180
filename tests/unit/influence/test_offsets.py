"""Heads whose tower adds something to them: the embedding, and all that follows from it, against plain autograd."""

import pytest
import torch
from torch.nn.functional import normalize

from fiftyone_ecif.influence.curvature import gauss_newton_at, hessian_at
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import KroneckerProjection, principal_projection

PAIRS, WIDTHS, SIZE = 8, (6, 5), 4


@pytest.fixture(params=[SoftmaxLoss, SigmoidLoss])
def problem(request):
    """A scope, features with an offset on the image side, and the same without HeadScope."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    heads, images, captions, offset = (
        [draw(width, SIZE) for width in WIDTHS],
        draw(PAIRS, WIDTHS[0]),
        draw(PAIRS, WIDTHS[1]),
        draw(PAIRS, SIZE),
    )
    scope = HeadScope(*heads, 3.0, loss=request.param(), with_scale=True)

    def plain(theta, rows):
        image, text = theta[:24].view(6, 4), theta[24:44].view(5, 4)
        u, v = normalize(offset[rows] + images[rows] @ image, dim=1), normalize(captions[rows] @ text, dim=1)
        return theta[-1].exp() * u @ v.T

    return scope, (torch.cat([images, offset], dim=1), captions), plain


def test_the_embedding_is_the_offset_and_the_product(problem):
    scope, batch, plain = problem
    theta = scope.start + 0.1
    torch.testing.assert_close(scope.similarity(theta, batch), plain(theta, torch.arange(PAIRS)))
    direction = torch.linspace(-1, 1, len(theta), dtype=torch.float64)
    expected = torch.func.jvp(lambda at: plain(at, torch.arange(PAIRS)), (theta,), (direction,))
    torch.testing.assert_close(scope.similarity_and_tangent(theta, batch, direction), expected)


def test_removal_gradients_equal_autograd(problem):
    scope, batch, plain = problem
    projection = principal_projection(scope, scope.start, [batch])  # of full rank
    everyone = torch.arange(PAIRS)
    positive, negative = projection.removal_gradients(scope.start, batch)
    for pair in range(PAIRS):
        rest = everyone[everyone != pair]

        def removal(theta, rest=rest):
            losses = scope.loss.pair_losses(plain(theta, everyone))
            return losses.sum() - scope.loss.pair_losses(plain(theta, rest)).sum()

        expected = torch.autograd.functional.jacobian(removal, scope.start)
        torch.testing.assert_close(projection.lift(positive[pair] + negative[pair]), expected)


def test_the_gradient_and_the_curvature_are_those_of_the_loss(problem):
    scope, batch, plain = problem
    partition = random_partition(PAIRS, 4, 0)
    objective = ContrastiveLoss(scope, FeatureBatches(*batch, partition), PAIRS, 0.3)
    full = principal_projection(scope, scope.start, [batch], rank=3)
    projection = KroneckerProjection(scope, *full.heads)
    theta = scope.start + 0.05

    def loss(at):
        parts = [scope.loss.pair_losses(plain(at, rows)).sum() for rows in partition]
        return sum(parts) / PAIRS + 0.15 * (at - scope.start).square().sum()

    gradient, value = objective.gradient_and_value(theta)
    torch.testing.assert_close(value, loss(theta))
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(loss, theta))
    hessian = torch.autograd.functional.hessian(loss, theta)
    for row in torch.eye(len(theta), dtype=theta.dtype)[::7]:
        torch.testing.assert_close(hessian_at(objective, theta)(row), hessian @ row)
        product = objective.gauss_newton_product(theta, row)
        torch.testing.assert_close(gauss_newton_at(objective, theta)(row), product)
    directions = torch.stack([projection.lift(row) for row in torch.eye(projection.rank, dtype=theta.dtype)])
    torch.testing.assert_close(projection.hessian(objective, theta), directions @ hessian @ directions.T)


def test_the_principal_directions_are_those_of_what_the_head_multiplies(problem):
    scope, batch, _ = problem
    found = principal_projection(scope, scope.start, [batch], rank=2).heads[0].input
    right = torch.linalg.svd(batch[0][:, : WIDTHS[0]]).Vh[:2].T
    torch.testing.assert_close(found @ found.T, right @ right.T)
