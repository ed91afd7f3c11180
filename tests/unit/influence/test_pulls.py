"""The pulls on embeddings against autograd, and their leading directions against a full decomposition."""

import pytest
import torch
from torch.nn.functional import normalize

from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.pulls import Pulls

LOSSES = {"softmax": (SoftmaxLoss(), 0.0), "sigmoid": (SigmoidLoss(), -2.0)}


def make_pulls(kind, count, width, scale=20.0):
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    sides = sides + torch.randn(width, generator=generator, dtype=torch.float64)  # in a cone, as embeddings are
    loss, bias = LOSSES[kind]
    scope = HeadScope(*torch.eye(width).expand(2, -1, -1), scale, bias, loss)
    return scope, sides, Pulls(scope, scope.loss, scope.start, *sides)


def all_of(pulls, count):
    return torch.stack([pulls.of(tower, torch.arange(count)) for tower in (0, 1)])


@pytest.mark.parametrize("kind", LOSSES)
def test_pulls_are_the_derivative_of_the_roles(kind):
    scope, sides, pulls = make_pulls(kind, 5, 4)
    for tower in (0, 1):
        rows = torch.tensor([3, 1])
        found = pulls.of(tower, rows)
        assert found.shape == (2, 2, 5, 4)

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

        expected = torch.autograd.functional.jacobian(roles, sides[tower]).movedim(2, 0)[rows]
        expected = expected * sides[tower][rows].norm(dim=1)[:, None, None, None]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("count", "width"), [(6, 12), (12, 6), (40, 64)])
@pytest.mark.parametrize("neglected", [0.0, 1e-3, 0.05])
def test_no_more_is_left_out_than_may_be(kind, count, width, neglected):
    _, sides, pulls = make_pulls(kind, count, width)
    whole, left_out = all_of(pulls, count), 0.0
    for tower, found in enumerate(pulls.leading(neglected)):
        taken = torch.arange(found.directions.shape[1]) < found.needed[:, None]
        along = found.coefficients * taken[:, None, None]
        made = torch.einsum("kamq,kqd,k->kamd", along, found.directions, sides[tower].norm(dim=1))
        left_out += (made - whole[tower]).square().sum()
    assert left_out.sqrt() <= neglected * whole.norm() + 1e-12 * whole.norm()


@pytest.mark.parametrize("neglected", [1e-3, 1e-2, 0.05])
def test_directions_are_few(neglected):
    """As few, but for a tenth, as the singular values of all embeddings' pulls allow."""
    _, _, pulls = make_pulls("softmax", 48, 64)
    values = torch.linalg.svdvals(all_of(pulls, 48).flatten(2, 3)).flatten().sort().values.square()
    needed = int((values.cumsum(0) > neglected**2 * values.sum()).sum())
    found = pulls.leading(neglected)
    spent = sum(int(each.needed.sum()) for each in found)
    assert needed <= spent <= 1.1 * needed
