"""Truncated removal gradients against autograd of the removal itself."""

import open_clip
import pytest
import torch

from fiftyone_ecif.bench.fidelity.sketch import sketched_gradients
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss, others_equal
from fiftyone_ecif.influence.tower_gradients import truncated_gradients
from fiftyone_ecif.models.tower_scope import TowerScope

VIT = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


def make_scope(vision, loss, rank=None):
    torch.manual_seed(0)
    bias = {"init_logit_bias": -3.0} if loss.name == "sigmoid" else {}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, **bias).eval().double()
    names = [name for name, value in model.named_parameters() if rank is None or name.endswith("in_proj_weight")]
    scope = TowerScope(model, names, loss, rank)
    if rank:
        scope.start = scope.start + 0.1 * torch.randn_like(scope.start)
    return scope


def make_batch(n=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randint(1, 50, (n, 8), generator=generator)


def removal_by_autograd(scope, batch, n):
    """The gradient of the pair's own part, and of the batch loss minus that without the pair."""
    theta = scope.start.clone().requires_grad_()
    similarity = scope.similarity(theta, batch)
    if len(batch) == 3:
        similarity = similarity.masked_fill(batch[2], -torch.inf)
    keep = [k for k in range(len(similarity)) if k != n]
    losses = scope.loss.pair_losses(similarity)
    removed = losses.sum() - scope.loss.pair_losses(similarity[keep][:, keep]).sum()
    own = losses[n] if scope.loss.name == "softmax" else torch.nn.functional.softplus(-similarity[n, n])
    (positive,) = torch.autograd.grad(own, theta, retain_graph=True)
    (total,) = torch.autograd.grad(removed, theta)
    return positive, total - positive


@pytest.mark.parametrize("loss", [SoftmaxLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("vision", "rank"), [(VIT, None), (RESNET, None), (VIT, 2)], ids=["vit", "resnet", "lora"])
def test_with_everything_kept_they_are_exact(loss, vision, rank):
    """All parameters, or adapters; temperature and bias, which act on the logits directly, included."""
    scope, batch = make_scope(vision, loss, rank), make_batch()
    (positive, negative), spent = truncated_gradients(scope, scope.start, batch, kept=1.0)
    assert spent == 1
    for n in range(6):
        for found, expected in zip((positive[n], negative[n]), removal_by_autograd(scope, batch, n), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", [SoftmaxLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("rank", [None, 2], ids=["all", "lora"])
def test_equal_pairs_that_are_spared_do_not_pull(loss, rank):
    twins = torch.tensor([[0, 0], [1, 1], [0, 2], [2, 1], [0, 4], [5, 5]])
    scope, batch = make_scope(VIT, loss, rank), (*make_batch(), others_equal(twins, torch.arange(6)))
    (positive, negative), _ = truncated_gradients(scope, scope.start, batch, kept=1.0)
    for n in range(6):
        for found, expected in zip((positive[n], negative[n]), removal_by_autograd(scope, batch, n), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    vector = torch.randn(len(scope.start), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for part, rows in zip(batch_influence(scope, scope.start, batch, vector, 6), (positive, negative), strict=True):
        torch.testing.assert_close(part, rows @ vector / 6)


def test_a_basis_keeps_the_coordinates():
    scope, batch = make_scope(VIT, SoftmaxLoss()), make_batch()
    basis = torch.linalg.qr(torch.randn(len(scope.start), 5, dtype=torch.float64)).Q
    whole, _ = truncated_gradients(scope, scope.start, batch)
    kept, _ = truncated_gradients(scope, scope.start, batch, basis=basis)
    for a, b in zip(whole, kept, strict=True):
        torch.testing.assert_close(a @ basis, b)


def test_the_share_that_is_kept_bounds_the_error():
    scope, batch = make_scope(VIT, SoftmaxLoss()), make_batch(12)
    exact, _ = truncated_gradients(scope, scope.start, batch, kept=1.0)
    errors, spendings = [], []
    for kept in (0.999, 0.9, 0.5):
        short, spent = truncated_gradients(scope, scope.start, batch, kept=kept)
        errors.append(((short[0] + short[1] - exact[0] - exact[1]).norm() / (exact[0] + exact[1]).norm()).item())
        spendings.append(spent)
    assert errors[0] < 0.01 < errors[2]
    assert errors == sorted(errors)
    assert spendings == sorted(spendings, reverse=True)
    assert spendings[2] < 0.5


@pytest.mark.parametrize("role", ["exact", "taylor", "positive", "negative", "as_printed"])
def test_the_forward_mode_sketch_finds_the_same(role):
    scope, batch = make_scope(VIT, SoftmaxLoss()), make_batch()
    basis = torch.linalg.qr(torch.randn(len(scope.start), 3, dtype=torch.float64)).Q
    (positive, negative), _ = truncated_gradients(scope, scope.start, batch, role, basis, kept=1.0)
    expected = sketched_gradients(scope, scope.start, batch, basis, role)
    torch.testing.assert_close(positive, expected[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(negative, expected[1], rtol=1e-8, atol=1e-7)
