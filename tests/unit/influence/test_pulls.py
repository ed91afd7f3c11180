"""The pulls on embeddings against autograd, and what is taken out of them against a full decomposition."""

import pytest
import torch
from torch.nn.functional import normalize

from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.pulls import Pulls, Remainder

LOSSES = {"softmax": (SoftmaxLoss(), 0.0), "sigmoid": (SigmoidLoss(), -2.0)}


def make_pulls(kind, count, width, scale=20.0):
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    sides = sides + torch.randn(width, generator=generator, dtype=torch.float64)  # in a cone, as embeddings are
    loss, bias = LOSSES[kind]
    scope = HeadScope(*torch.eye(width).expand(2, -1, -1), scale, bias, loss)
    return scope, sides, Pulls(scope, scope.loss, scope.start, *sides)


@pytest.mark.parametrize("kind", LOSSES)
def test_pulls_are_the_derivative_of_the_roles(kind):
    scope, sides, pulls = make_pulls(kind, 5, 4)
    for tower in (0, 1):
        found = pulls.of(tower)
        assert found.shape == (5, 2, 5, 4)

        def roles(own, tower=tower):
            images, captions = (own, sides[1]) if tower == 0 else (sides[0], own)
            similarity = scope.logits(scope.start, normalize(images, dim=1) @ normalize(captions, dim=1).T)
            losses = scope.loss.pair_losses(similarity)
            changes = []
            for n in range(5):
                keep = [k for k in range(5) if k != n]
                changes.append(losses.sum() - scope.loss.pair_losses(similarity[keep][:, keep]).sum())
            positive = scope.loss.own_losses(similarity)
            return torch.stack([positive, torch.stack(changes) - positive])

        expected = torch.autograd.functional.jacobian(roles, sides[tower]).movedim(2, 0)
        expected = expected * sides[tower].norm(dim=1)[:, None, None, None]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("count", "width"), [(6, 12), (12, 6), (40, 64)])
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_what_is_taken_out_and_what_is_left_add_up(kind, count, width, size):
    _, _, pulls = make_pulls(kind, count, width)
    for tower in (0, 1):
        whole = size * pulls.of(tower).flatten(1, 2)
        left, taken = Remainder(size * pulls.of(tower)), torch.zeros_like(whole)
        for _ in range(min(count, width)):
            directions, along = left.take()
            taken += along[..., None] * directions[:, None]
            torch.testing.assert_close((whole - taken).square().sum(), left.energy, rtol=1e-6, atol=1e-16 * size**2)
            torch.testing.assert_close((whole - taken).sum(0), left.on_all, rtol=1e-6, atol=1e-8 * size)
        assert left.energy < 1e-20 * whole.square().sum()


@pytest.mark.parametrize("kind", LOSSES)
def test_most_goes_in_the_directions_that_are_taken_first(kind):
    """What they leave is hardly more than what the leading singular vectors of each embedding's pulls do."""
    _, _, pulls = make_pulls(kind, 48, 64)
    for tower in (0, 1):
        values, left = torch.linalg.svdvals(pulls.of(tower).flatten(1, 2)).square(), Remainder(pulls.of(tower))
        for number in range(1, 9):
            left.take()
            assert left.energy <= 1.2 * values[:, number:].sum()


@pytest.mark.parametrize("spared", [1e-6, 1e-3, 0.1])
def test_the_weakest_pulls_are_spared(spared):
    _, _, pulls = make_pulls("softmax", 12, 6)
    for tower in (0, 1):
        whole, taken = pulls.of(tower).flatten(1, 2), torch.zeros(12, 24, 6, dtype=torch.float64)
        left = Remainder(pulls.of(tower), spared)
        torch.testing.assert_close(left.energy, whole.square().sum())
        torch.testing.assert_close(left.on_all, whole.sum(0))
        for _ in range(6):
            directions, along = left.take()
            taken += along[..., None] * directions[:, None]
            torch.testing.assert_close((whole - taken).square().sum(), left.energy)
            torch.testing.assert_close((whole - taken).sum(0), left.on_all)
        lengths, never = whole.norm(dim=2), (taken == 0).all(2)
        assert never.any()
        assert lengths[never].square().sum() <= spared * whole.square().sum()
        for row, kept in zip(lengths, ~never, strict=True):
            assert row[kept].min() >= row[~kept].max()


@pytest.mark.parametrize("spared", [0.0, 0.1])
def test_nothing_is_taken_where_nothing_pulls(spared):
    left = Remainder(torch.zeros(3, 2, 3, 4), spared)
    directions, along = left.take()
    assert not along.any()
    assert directions.isfinite().all()


def test_the_root_of_spread_is_that_of_the_covariance_and_the_unit_matrix():
    _, sides, pulls = make_pulls("softmax", 40, 6)
    for tower in (0, 1):
        units = normalize(sides[tower], dim=1)
        spread = torch.cov(units.T, correction=0)
        root = pulls.root_of_spread(tower)
        torch.testing.assert_close(root @ root.T, torch.eye(6).double() + spread / spread.diagonal().mean())
        assert not root.triu(1).any()


@pytest.mark.parametrize(("count", "width"), [(1, 3), (3, 1), (4, 4)])
def test_embeddings_that_are_equal_but_for_rounding_have_no_spread(count, width):
    scope, sides, _ = make_pulls("softmax", 1, width)
    noise = 1e-12 * torch.randn(2, count, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pulls = Pulls(scope, scope.loss, scope.start, *(sides + noise))
    torch.testing.assert_close(pulls.root_of_spread(0), torch.eye(width).double())
