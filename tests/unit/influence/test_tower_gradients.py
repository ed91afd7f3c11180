"""Removal gradients along leading directions against autograd of the removal itself."""

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from fiftyone_ecif.bench.fidelity.sketch import sketched_gradients
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss, others_equal
from fiftyone_ecif.influence.projections import BasisProjection
from fiftyone_ecif.influence.pulls import Pulls, Remainder
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.tower_gradients import tower_gradients
from fiftyone_ecif.models.tower_scope import TowerScope
from fiftyone_ecif.settings.influence import InfluenceSettings

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
def test_without_an_error_they_are_exact(loss, vision, rank):
    """All parameters, or adapters; temperature and bias, which act on the logits directly, included."""
    scope, batch = make_scope(vision, loss, rank), make_batch()
    (positive, negative), spent = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    assert spent == 6  # as many directions as there are pairs
    for n in range(6):
        for found, expected in zip((positive[n], negative[n]), removal_by_autograd(scope, batch, n), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", [SoftmaxLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("rank", [None, 2], ids=["all", "lora"])
def test_equal_pairs_that_are_spared_do_not_pull(loss, rank):
    twins = torch.tensor([[0, 0], [1, 1], [0, 2], [2, 1], [0, 4], [5, 5]])
    scope, batch = make_scope(VIT, loss, rank), (*make_batch(), others_equal(twins, torch.arange(6)))
    (positive, negative), _ = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    for n in range(6):
        for found, expected in zip((positive[n], negative[n]), removal_by_autograd(scope, batch, n), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    vector = torch.randn(len(scope.start), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for part, rows in zip(batch_influence(scope, scope.start, batch, vector, 6), (positive, negative), strict=True):
        torch.testing.assert_close(part, rows @ vector / 6)


def test_a_basis_keeps_the_coordinates():
    scope, batch = make_scope(VIT, SoftmaxLoss()), make_batch()
    basis = torch.linalg.qr(torch.randn(len(scope.start), 5, dtype=torch.float64)).Q
    whole, _ = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    kept, _ = tower_gradients(scope, scope.start, batch, basis=basis, tolerance=0.0)
    for a, b in zip(whole, kept, strict=True):
        torch.testing.assert_close(a @ basis, b)


def relative_error(found, exact):
    found, exact = torch.stack(found), torch.stack(exact)
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("loss", [SoftmaxLoss(), SigmoidLoss()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(("vision", "rank"), [(VIT, None), (RESNET, None), (VIT, 2)], ids=["vit", "resnet", "lora"])
def test_the_tolerance_bounds_the_error(loss, vision, rank):
    scope, batch = make_scope(vision, loss, rank), make_batch(12)
    exact, most = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    spendings = [most]
    for tolerance in (1e-2, 0.1, 0.5):
        found, spent = tower_gradients(scope, scope.start, batch, tolerance=tolerance)
        assert 0 < relative_error(found, exact) < tolerance
        spendings.append(spent)
    assert spendings == sorted(spendings, reverse=True)
    assert spendings[3] < most / 4


class Shifts(Scope):
    """Embeddings that are all moved alike, one vector a tower: each has the same Jacobian."""

    def __init__(self, width):
        self.loss, self.start = SoftmaxLoss(), torch.zeros(2 * width, dtype=torch.float64)

    def embed_images(self, theta, images):
        return images + theta[: len(theta) // 2]

    def embed_captions(self, theta, captions):
        return captions + theta[len(theta) // 2 :]

    def logits(self, theta, cosine):
        return 10 * cosine


def test_what_all_embeddings_have_in_common_takes_few_directions():
    scope, generator = Shifts(16), torch.Generator().manual_seed(0)
    batch = tuple(normalize(torch.randn(2, 32, 16, generator=generator, dtype=torch.float64), dim=-1))
    exact, most = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    found, spent = tower_gradients(scope, scope.start, batch)
    assert relative_error(found, exact) < 1e-2
    assert most == 16
    assert spent <= 5
    pulls = Pulls(scope, scope.loss, scope.start, *batch)
    whole = [pulls.of(tower) for tower in (0, 1)]
    left = [Remainder(each.clone()) for each in whole]
    for _ in range(5):
        for each in left:
            each.take()
    neglected, all_of_it = sum(each.energy for each in left), sum(each.square().sum() for each in whole)
    assert neglected > 0.05**2 * all_of_it


class ShiftsOfKinds(Shifts):
    """Embeddings of some kinds, the last number of an input: those of each kind are moved alike."""

    def __init__(self, width, kinds):
        super().__init__(kinds * width)
        self.kinds = kinds

    def embed_images(self, theta, images):
        return images[:, :-1] + theta.view(2, self.kinds, -1)[0, images[:, -1].long()]

    def embed_captions(self, theta, captions):
        return captions[:, :-1] + theta.view(2, self.kinds, -1)[1, captions[:, -1].long()]


@pytest.mark.parametrize(("kinds", "tolerance"), [(8, 0.1), (8, 1e-2), (4, 1e-2)])
def test_the_tolerance_bounds_the_error_where_embeddings_are_alike(kinds, tolerance):
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(64) % kinds
    centres = torch.randn(kinds, 16, generator=generator, dtype=torch.float64)[kind]
    noise = torch.randn(2, 64, 16, generator=generator, dtype=torch.float64)
    scope, batch = ShiftsOfKinds(16, kinds), [torch.cat([centres + part, kind[:, None]], 1) for part in noise]
    exact, most = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    found, spent = tower_gradients(scope, scope.start, batch, tolerance=tolerance)
    assert relative_error(found, exact) < tolerance
    assert spent < most


def test_stored_gradients_are_as_exact_as_is_asked_for():
    scope, batch = make_scope(VIT, SoftmaxLoss(), 2), make_batch(12)
    basis = torch.linalg.qr(torch.randn(len(scope.start), 5, dtype=torch.float64)).Q
    projection = BasisProjection(scope, basis)
    exact = [part @ basis for part in tower_gradients(scope, scope.start, batch, tolerance=0.0)[0]]
    asked = InfluenceSettings(gradient_tolerance=0.0).scoring.gradient_tolerance
    assert relative_error(projection.removal_gradients(scope.start, batch, tolerance=asked), exact) < 1e-12
    assert 1e-6 < relative_error(projection.removal_gradients(scope.start, batch), exact) < 1e-2


@pytest.mark.parametrize("role", ["positive", "negative"])
def test_a_role_that_is_left_out_is_zero(role):
    scope, batch = make_scope(VIT, SoftmaxLoss(), 2), make_batch()
    both, _ = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    found, _ = tower_gradients(scope, scope.start, batch, role, tolerance=0.0)
    for one, part, name in zip(found, both, ("positive", "negative"), strict=True):
        torch.testing.assert_close(one, part if name == role else torch.zeros_like(part))


@pytest.mark.parametrize("count", [1, 2])
def test_small_batches(count):
    scope, batch = make_scope(VIT, SoftmaxLoss(), 2), make_batch(count)
    exact, _ = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    found, _ = tower_gradients(scope, scope.start, batch)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * other.abs().max().item())


@pytest.mark.parametrize("role", ["exact", "taylor", "positive", "negative", "as_printed"])
def test_the_forward_mode_sketch_finds_the_same(role):
    scope, batch = make_scope(VIT, SoftmaxLoss()), make_batch()
    basis = torch.linalg.qr(torch.randn(len(scope.start), 3, dtype=torch.float64)).Q
    (positive, negative), _ = tower_gradients(scope, scope.start, batch, role, basis, tolerance=0.0)
    expected = sketched_gradients(scope, scope.start, batch, basis, role)
    torch.testing.assert_close(positive, expected[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(negative, expected[1], rtol=1e-8, atol=1e-7)
