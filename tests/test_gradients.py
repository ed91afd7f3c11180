"""Projected removal gradients against autograd, one pair at a time."""

import pytest
import torch

from fiftyone_ecif.contrastive import SoftmaxLoss
from fiftyone_ecif.gradients import HeadProjection, removal_gradients
from fiftyone_ecif.heads import HeadScope


def _problem(n=7, widths=(9, 6), d=5, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    scope = HeadScope(draw(widths[0], d), draw(widths[1], d), scale)
    return scope, (draw(n, widths[0]), draw(n, widths[1])), draw


def _by_autograd(scope, batch, n):
    """Gradients of L(B) - l_n - L(B without n), and of l_n, by brute force."""
    theta = scope.start.clone().requires_grad_()
    losses = SoftmaxLoss().pair_losses(scope.similarity(theta, batch))
    keep = [k for k in range(len(batch[0])) if k != n]
    without = SoftmaxLoss().pair_losses(scope.similarity(theta, (batch[0][keep], batch[1][keep]))).sum()
    (positive,) = torch.autograd.grad(losses[n], theta, retain_graph=True)
    (negative,) = torch.autograd.grad(losses.sum() - losses[n] - without, theta)
    return positive, negative


@pytest.mark.parametrize("scale", [1.0, 10.0, 200.0])
def test_unprojected_gradients_equal_autograd(scale):
    scope, batch, _ = _problem(scale=scale)
    eye = lambda n: torch.eye(n, dtype=torch.float64)  # noqa: E731
    projections = HeadProjection(eye(9), eye(5)), HeadProjection(eye(6), eye(5))
    positive, negative = removal_gradients(scope, scope.start, batch, projections)
    for n in range(len(batch[0])):
        expected = _by_autograd(scope, batch, n)
        torch.testing.assert_close(positive[n], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(negative[n], expected[1], rtol=1e-9, atol=1e-9)


def test_projected_gradients_are_the_projection_of_the_full_ones():
    scope, batch, draw = _problem()
    projections = HeadProjection(draw(9, 3), draw(5, 2)), HeadProjection(draw(6, 4), draw(5, 3))
    got = removal_gradients(scope, scope.start, batch, projections)
    for n in range(len(batch[0])):
        for role, full in zip(got, _by_autograd(scope, batch, n), strict=True):
            blocks = [
                (p.input.T @ head @ p.output).flatten() for p, head in zip(projections, scope.split(full), strict=True)
            ]
            torch.testing.assert_close(role[n], torch.cat(blocks), rtol=1e-9, atol=1e-9)


def test_batch_of_one_has_no_negative_role():
    scope, batch, _ = _problem(n=1)
    eye = lambda n: torch.eye(n, dtype=torch.float64)  # noqa: E731
    _, negative = removal_gradients(
        scope, scope.start, batch, (HeadProjection(eye(9), eye(5)), HeadProjection(eye(6), eye(5)))
    )
    assert negative.abs().max() == 0
