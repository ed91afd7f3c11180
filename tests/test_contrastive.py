"""The removal roles and their derivatives against loops and autograd."""

import pytest
import torch
from open_clip.loss import ClipLoss

from fiftyone_ecif.contrastive import pair_losses, removal_pulls, removal_roles, removal_tangents


def random_similarity(n=8, scale=1.0, seed=0):
    return scale * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(similarity, n):
    keep = [k for k in range(len(similarity)) if k != n]
    return similarity[keep][:, keep]


def test_pair_losses_are_open_clips_loss():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 6, 4, generator=generator), dim=2)
    expected = ClipLoss()(images, texts, torch.tensor(7.0))
    assert pair_losses(7 * images @ texts.T).sum() / 12 == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_roles_add_up_to_the_exact_removal(n, scale):
    similarity = random_similarity(n, scale)
    positive, negative = removal_roles(similarity)
    for k in range(n):
        change = pair_losses(similarity).sum() - pair_losses(without(similarity, k)).sum()
        torch.testing.assert_close(positive[k] + negative[k], change, rtol=1e-9, atol=1e-9)
    assert (negative >= 0).all()


def tangents_by_autograd(similarity, direction, n):
    point = similarity.clone().requires_grad_()
    gradients = [torch.autograd.grad(role[n], point, retain_graph=True)[0] for role in removal_roles(point)]
    return [(gradient * direction).sum() for gradient in gradients]


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_tangents_equal_autograd(n, scale):
    similarity, direction = random_similarity(n, scale), random_similarity(n, seed=1)
    positive, negative = removal_tangents(similarity, direction)
    for k in range(n):
        expected = tangents_by_autograd(similarity, direction, k)
        torch.testing.assert_close(positive[k], expected[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(negative[k], expected[1], rtol=1e-8, atol=1e-10)


def test_duplicate_captions_and_hard_negatives_stay_exact():
    """P reaches 1 for another pair's caption: log(1 - P) by subtraction would be -inf."""
    similarity = random_similarity(6)
    similarity[:, 3] = similarity[:, 2]  # duplicate captions
    similarity[0, 4] += 200.0  # image 0 is sure of caption 4
    direction = random_similarity(6, seed=1)
    roles, tangents = removal_roles(similarity), removal_tangents(similarity, direction)
    step = 1e-6
    ahead, behind = removal_roles(similarity + step * direction), removal_roles(similarity - step * direction)
    for role, tangent, up, down in zip(roles, tangents, ahead, behind, strict=True):
        assert torch.isfinite(role).all()
        torch.testing.assert_close(tangent, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)


def test_float32_tangents_stay_close_at_the_sharpest_temperature():
    similarity, direction = random_similarity(32, 100.0), random_similarity(32, seed=1)
    exact = removal_tangents(similarity, direction)
    rough = removal_tangents(similarity.float(), direction.float())
    for a, b in zip(exact, rough, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-4)


def test_weights_cannot_overflow():
    similarity = random_similarity(5)
    similarity[1, 0] += 1e6
    for pulls in removal_pulls(similarity):
        for pull in pulls:
            assert pull.weight.abs().max() <= 1
            torch.testing.assert_close(pull.mean.sum(1), torch.ones(5, dtype=torch.float64))


def test_a_pair_alone_in_its_batch_changes_nothing():
    positive, negative = removal_tangents(random_similarity(1), random_similarity(1, seed=1))
    assert positive.abs().max() < 1e-12
    assert negative.abs().max() == 0
