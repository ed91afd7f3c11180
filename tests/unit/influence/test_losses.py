"""The removal roles and their derivatives against loops and autograd."""

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.losses import OwnRoleGradient, RoleGradient, SigmoidLoss, SingleRoleGradient, SoftmaxLoss
from fiftyone_ecif.influence.roles import ROLES

LOSSES = {"softmax": SoftmaxLoss(), "sigmoid": SigmoidLoss()}
NO_FORMULA = ("sigmoid", "as_printed")
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def random_similarity(n=8, scale=1.0, seed=0):
    return scale * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(similarity, n):
    keep = [k for k in range(len(similarity)) if k != n]
    return similarity[keep][:, keep]


def off_diagonal(matrix):
    return matrix - torch.diag(matrix.diagonal())


def roles_by_definition(loss, similarity, role="exact"):
    """The two roles of every pair, from the definition, without regard to rounding."""
    if loss.name == "sigmoid":
        terms = torch.nn.functional.softplus(similarity)
        positive = torch.nn.functional.softplus(-similarity.diagonal())
        negative = off_diagonal(terms).sum(0) + off_diagonal(terms).sum(1)
    else:
        positive = loss.pair_losses(similarity)
        images, captions = similarity.softmax(1), similarity.softmax(0)
        term = {"taylor": lambda p: p, "as_printed": lambda p: 1 / p}.get(role, lambda p: -torch.log(1 - p))
        negative = off_diagonal(term(images)).nan_to_num(0).sum(0) + off_diagonal(term(captions)).nan_to_num(0).sum(1)
    zero = torch.zeros_like(positive)
    return zero if role == "negative" else positive, zero if role == "positive" else negative


@pytest.mark.parametrize(("ours", "theirs"), [(SoftmaxLoss(), ClipLoss()), (SigmoidLoss(), SigLipLoss())])
def test_pair_losses_are_open_clips_loss(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 6, 4, generator=generator), dim=2)
    if ours.name == "softmax":
        expected, similarity = 2 * theirs(images, texts, torch.tensor(7.0)), 7 * images @ texts.T
    else:
        expected, similarity = theirs(images, texts, torch.tensor(7.0), torch.tensor(-3.0)), 7 * images @ texts.T - 3
    assert ours.pair_losses(similarity).sum() / 6 == pytest.approx(expected.item(), rel=1e-6)


@each_loss
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 3.0, 8.0])
def test_roles_add_up_to_the_exact_removal(loss, n, scale):
    """The definition that the other tests differentiate is what removing the pair changes."""
    similarity = random_similarity(n, scale)
    positive, negative = roles_by_definition(loss, similarity)
    for k in range(n):
        change = loss.pair_losses(similarity).sum() - loss.pair_losses(without(similarity, k)).sum()
        torch.testing.assert_close(positive[k] + negative[k], change, rtol=1e-6, atol=1e-6)


def removal_by_autograd(loss, similarity, direction, k):
    """Derivatives along a direction of a pair's own part, and of all that goes with it."""
    point = similarity.clone().requires_grad_()
    removed = loss.pair_losses(point).sum() - loss.pair_losses(without(point, k)).sum()
    return (torch.autograd.grad(removed, point)[0] * direction).sum()


@pytest.mark.parametrize(
    ("loss", "role"), [(loss, role) for loss in LOSSES.values() for role in ROLES if (loss.name, role) != NO_FORMULA]
)
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("scale", [0.1, 3.0, 8.0])
def test_tangents_equal_autograd(loss, role, n, scale):
    similarity, direction = random_similarity(n, scale), random_similarity(n, seed=1)
    found = loss.removal_tangents(similarity, direction, role)
    point = similarity.clone().requires_grad_()
    for k in range(n):
        for part, tangent in zip(roles_by_definition(loss, point, role), found, strict=True):
            expected = 0.0
            if part.requires_grad:
                expected = (torch.autograd.grad(part[k], point, retain_graph=True)[0] * direction).sum().item()
            assert tangent[k].item() == pytest.approx(expected, rel=1e-6, abs=1e-9 * (1 + abs(tangent).max().item()))


@each_loss
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("seed", range(4))
def test_tangents_stay_exact_for_duplicates_hard_negatives_and_extreme_temperatures(loss, scale, seed):
    """P reaches 1 for another pair's caption: log(1 - P) by subtraction would be -inf."""
    n = 3 + 2 * seed
    similarity = random_similarity(n, scale, seed)
    similarity[:, 2] = similarity[:, 1]  # duplicate captions
    similarity[0, -1] += 200.0  # image 0 is sure of the last caption
    direction = random_similarity(n, seed=seed + 1)
    positive, negative = loss.removal_tangents(similarity, direction)
    rough = [part.double() for part in loss.removal_tangents(similarity.float(), direction.float())]
    size = max(abs(positive).max().item(), abs(negative).max().item(), 1.0)
    for k in range(n):
        expected = removal_by_autograd(loss, similarity, direction, k).item()
        assert (positive + negative)[k].item() == pytest.approx(expected, rel=1e-7, abs=1e-7 * size)
        assert sum(rough)[k].item() == pytest.approx(expected, rel=1e-3, abs=1e-3 * size)


def test_weights_cannot_overflow():
    similarity = random_similarity(5)
    similarity[1, 0] += 1e6
    for role_gradients in SoftmaxLoss().role_gradients(similarity):
        for role_gradient in role_gradients:
            assert role_gradient.weight.abs().max() <= 1
            torch.testing.assert_close(role_gradient.mean.sum(1), torch.ones(5, dtype=torch.float64))


@each_loss
def test_pulls_of_one_pair_each_are_sparse_matrices(loss):
    """Whatever a role_gradient is made of, it does what its matrix of weights does."""
    similarity, direction, factor = (random_similarity(6, seed=seed) for seed in range(3))
    similarity[0, 3] = similarity[4, 3] = 50.0  # two anchors carry one pair
    rows = random_similarity(6, seed=4)[:, :2]
    kinds = set()
    for role_gradient in (
        role_gradient for role_gradients in loss.role_gradients(similarity) for role_gradient in role_gradients
    ):
        kinds.add(type(role_gradient))
        dense = RoleGradient(role_gradient.matrix(), role_gradient.mean)
        assert dense.weight.shape == similarity.shape
        torch.testing.assert_close(role_gradient.aggregate(rows), dense.aggregate(rows))
        torch.testing.assert_close(role_gradient.aggregate(rows[:, 0]), dense.aggregate(rows[:, 0]))
        torch.testing.assert_close(role_gradient.scaled(factor).matrix(), dense.weight * factor)
        moved = dense.weight * (direction - (role_gradient.mean * direction).sum(1, keepdim=True))
        torch.testing.assert_close(role_gradient.tangent(direction), moved.sum(0))
        torch.testing.assert_close(dense.tangent(direction), moved.sum(0))
    one_other = {SingleRoleGradient} if loss.name == "softmax" else set()
    assert kinds == {RoleGradient, OwnRoleGradient} | one_other


def test_a_pair_alone_in_its_batch_changes_nothing():
    positive, negative = SoftmaxLoss().removal_tangents(random_similarity(1), random_similarity(1, seed=1))
    assert positive.abs().max() < 1e-12
    assert negative.abs().max() == 0


def test_the_misprint_is_refused_for_a_sigmoid_loss():
    with pytest.raises(EcifError, match="softmax"):
        SigmoidLoss().role_gradients(random_similarity(3), "as_printed")


@each_loss
def test_an_unknown_role_is_an_error(loss):
    similarity = random_similarity(3)
    for ask in (
        lambda: loss.role_gradients(similarity, "both"),
        lambda: loss.removal_tangents(similarity, similarity, ""),
    ):
        with pytest.raises(EcifError, match=r"is not available\. Use one of exact, taylor"):
            ask()


@each_loss
def test_the_own_loss_is_the_positive_role(loss):
    similarity = random_similarity(6, 3.0)
    torch.testing.assert_close(loss.own_losses(similarity), roles_by_definition(loss, similarity)[0])
