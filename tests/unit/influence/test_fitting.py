"""Fits that end at a minimum where the loss is hard, and say so where there is none."""

import math

import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence import fitting
from fiftyone_ecif.influence.collapse import smallest_norm
from fiftyone_ecif.influence.fitting import minimise, stationary_point
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.progress import result_of
from fiftyone_ecif.store.tables import Store


def unrelated(spread, width, size, proximal):
    """Pairs that have nothing in common, with features that are all much alike."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scope = HeadScope(draw(width, size) / width**0.5, draw(width, size) / width**0.5, 14.0)
    images, texts = (draw(1, width) + spread * draw(40, width) for _ in range(2))
    return ContrastiveLoss(scope, FeatureBatches(images, texts, random_partition(40, 20, 0)), 40, proximal)


NO_MINIMUM = {"spread": 0.2, "width": 20, "size": 6}  # an embedding shrinks to nothing instead


def test_an_ill_conditioned_minimum_is_found():
    """L-BFGS has a relative gradient norm of 5e-4 there after a thousand steps."""
    objective = unrelated(0.05, 32, 24, proximal=0.03)
    steps = list(minimise(objective, tolerance=1e-8))
    theta, relative = steps[-1]
    assert relative <= 1e-8
    gradient, value = objective.gradient_and_value(theta)
    assert (gradient.norm() / objective.gradient_scale(objective.scope.start)).item() == pytest.approx(relative)
    hessian = torch.stack([objective.hessian_product(theta, row) for row in torch.eye(len(theta), dtype=theta.dtype)])
    assert torch.linalg.eigvalsh(hessian)[0] > 0
    assert value < objective.loss(objective.scope.start)
    assert len(steps) < 2000


class InTheTowers(Scope):
    """Heads of which no closed form is known, as of parameters inside the towers."""

    def __init__(self, heads):
        self.start, self.loss = heads.start, heads.loss
        for name in ("embed_images", "embed_captions", "logits"):
            object.__setattr__(self, name, getattr(heads, name))

    def embed_images(self, theta, images):
        raise NotImplementedError

    embed_captions = logits = embed_images


def inside(objective):
    return ContrastiveLoss(InTheTowers(objective.scope), objective.batches, objective.pairs, objective.proximal)


def test_inside_the_towers_no_curvature_is_taken_where_gradients_do(monkeypatch):
    """There a product with the Hessian takes several gradients."""
    monkeypatch.setattr(fitting, "hessian_at", None)
    *_, (_, relative) = minimise(inside(unrelated(**NO_MINIMUM, proximal=10.0)), tolerance=1e-8)
    assert relative <= 1e-8


def test_inside_the_towers_newton_steps_go_on_where_gradients_do_not():
    heads = unrelated(0.05, 32, 24, proximal=0.03)
    objective = inside(heads)
    scale = objective.gradient_scale(objective.scope.start).item()
    *steps, (_, stalled) = fitting._lbfgs(objective, objective.scope.start, scale, 3000)
    assert stalled > 1e-6
    assert len(steps) < 1500
    *_, (theta, relative) = minimise(objective, tolerance=1e-8)
    assert relative <= 1e-8
    *_, (known, _) = minimise(heads, tolerance=1e-8)
    torch.testing.assert_close(heads.loss(theta), heads.loss(known))


def test_where_there_is_no_minimum_the_remedy_that_is_named_helps():
    with pytest.raises(EcifError, match=r"or can find no better one.*Raise proximal"):
        list(minimise(unrelated(**NO_MINIMUM, proximal=1.0)))
    *_, (_, relative) = minimise(unrelated(**NO_MINIMUM, proximal=10.0))
    assert relative <= 1e-5


@pytest.mark.parametrize("scale", [0.5, 1.0, 40.0])
def test_a_step_minimises_its_model_within_the_region(scale):
    """Against the secular equation, solved with all eigenvalues; conjugate gradients come near it at least."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    gradient = torch.randn(8, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 8 + 0.1 * torch.eye(8, dtype=torch.float64)
    newton = -torch.linalg.solve(matrix, gradient)
    radius = scale * newton.norm().item()
    *_, (step, curved, bounded) = fitting._steihaug(lambda v: matrix @ v, gradient, radius, 1e-12)
    model = lambda s: (gradient @ s + s @ matrix @ s / 2).item()  # noqa: E731
    torch.testing.assert_close(curved, matrix @ step)
    assert step.norm().item() <= radius * (1 + 1e-9)
    if scale > 1:
        assert not bounded
        torch.testing.assert_close(step, newton)
        return
    values, vectors = torch.linalg.eigh(matrix)
    along = vectors.T @ gradient
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (along / (values + middle)).norm() > radius else (low, middle)
    best = model(-vectors @ (along / (values + high)))
    assert model(step) <= 0.5 * best  # Steihaug's bound; both are negative


def test_negative_curvature_is_followed_to_the_bound():
    matrix = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))
    gradient = torch.tensor([1.0, 1.0], dtype=torch.float64)
    *_, (step, curved, bounded) = fitting._steihaug(lambda v: matrix @ v, gradient, 3.0, 1e-9)
    assert bounded
    assert step.norm().item() == pytest.approx(3)
    torch.testing.assert_close(curved, matrix @ step)
    assert gradient @ step + step @ matrix @ step / 2 < -3


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    return GradientStore(Store("fit"), 40)


def test_what_need_not_converge_goes_on_with_the_best_that_was_found(store):
    objective = unrelated(**NO_MINIMUM, proximal=1.0)
    theta, relative = result_of(stationary_point(store, objective, fit=True, must_converge=False))
    assert math.isfinite(relative)
    assert relative > 1e-5
    assert smallest_norm(objective, theta) >= 0.01
    assert objective.loss(theta) < 0.5 * objective.loss(objective.scope.start)
    again, known = result_of(stationary_point(store, objective, fit=True, must_converge=False))
    assert torch.equal(again, theta)
    assert known == relative
    with pytest.raises(EcifError, match=r"did not reach a stationary point.*Raise proximal"):
        result_of(stationary_point(store, objective, fit=True))  # what is in the store is no minimum


def test_what_must_converge_leaves_nothing_in_the_store(store):
    with pytest.raises(EcifError, match=r"did not reach a stationary point.*Raise proximal"):
        result_of(stationary_point(store, unrelated(**NO_MINIMUM, proximal=1.0), fit=True))
    assert store.parameters() is None
