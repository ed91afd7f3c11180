"""Steps in float32 whose result is checked in float64 lead where steps in float64 do."""

import pytest
import torch
from torch.func import grad

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.curvature import hessian_at
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import conjugate_gradient, dense_matrix, solve
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import KroneckerProjection, principal_projection
from fiftyone_ecif.progress import result_of

PAIRS, WIDTHS, WIDTH = 90, (21, 18), 15  # more parameters than are factorised


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["softmax", "sigmoid", "with scale"])
def objective(request):
    loss = SigmoidLoss() if request.param == "sigmoid" else SoftmaxLoss()
    shared = draw(PAIRS, WIDTH, seed=1)
    sides = [shared @ draw(WIDTH, width, seed=width) + draw(PAIRS, width, seed=9) for width in WIDTHS]
    heads = [torch.linalg.pinv(draw(WIDTH, width, seed=width)) for width in WIDTHS]
    scope = HeadScope(*heads, 10.0, -3.0 if request.param == "sigmoid" else 0.0, loss, request.param == "with scale")
    batches = FeatureBatches(*[side.float() for side in sides], random_partition(PAIRS, 30, 0))
    return ContrastiveLoss(scope, batches, PAIRS, 1.0)


@pytest.fixture
def fitted(objective):
    *_, (theta, _) = minimise(objective)
    return theta


def residual(matrix, right, found):
    return ((right - matrix @ found).norm() / right.norm()).item()


def test_coarse_products_are_in_float32_and_add_up_in_float64(objective):
    theta, vector = objective.scope.start, draw(len(objective.scope.start), seed=3)
    exact, coarse = (hessian_at(each, theta)(vector) for each in (objective, objective.coarse()))
    assert next(iter(objective.coarse().batches))[0].dtype == torch.float32
    assert coarse.dtype == torch.float64
    off = ((exact - coarse).norm() / exact.norm()).item()
    assert 1e-9 < off < 1e-6


def test_a_solve_with_coarse_steps_equals_a_dense_one(objective, fitted):
    right = draw(len(fitted), seed=4)
    product, coarse = hessian_at(objective, fitted), hessian_at(objective.coarse(), fitted)
    found = result_of(solve(product, right, coarse=coarse))
    matrix = dense_matrix(product, right)
    assert found.residual <= 1e-6
    assert residual(matrix, right, found.vector) == pytest.approx(found.residual, rel=1e-3)
    expected = torch.linalg.solve(matrix, right)
    assert ((found.vector - expected).norm() / expected.norm()).item() <= 1e-6 * found.condition_number
    in_doubles = result_of(solve(product, right))
    assert found.condition_number == pytest.approx(in_doubles.condition_number, rel=1e-2)  # estimated in other steps


def test_steps_that_are_off_are_mended(objective, fitted):
    right, matrix = draw(len(fitted), seed=4), dense_matrix(hessian_at(objective, fitted), fitted)
    off = draw(*matrix.shape, seed=5)
    off = matrix + 1e-5 * matrix.norm() / off.norm() * (off + off.T)
    *_, found = conjugate_gradient(lambda v: matrix @ v, right, 1e-10, coarse=lambda v: off @ v)
    assert residual(matrix, right, found.vector) == pytest.approx(found.residual, rel=1e-3)
    assert found.residual <= 1e-10


@pytest.mark.parametrize("useless", [lambda v: 1e-3 * v, lambda v: -v], ids=["far too small", "negative"])
def test_steps_that_lead_nowhere_are_taken_exactly(objective, fitted, useless):
    right, matrix = draw(len(fitted), seed=4), dense_matrix(hessian_at(objective, fitted), fitted)
    *_, found = conjugate_gradient(lambda v: matrix @ v, right, coarse=useless)
    assert residual(matrix, right, found.vector) <= 1e-6


def test_negative_curvature_is_found_by_the_exact_product():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    with pytest.raises(EcifError, match=r"negative \(-0\."):
        list(conjugate_gradient(lambda v: matrix @ v, draw(3), coarse=lambda v: v))


def test_products_are_counted_in_both_precisions(objective, fitted):
    right, calls = draw(len(fitted), seed=4), []
    matrix = dense_matrix(hessian_at(objective, fitted), fitted)
    counted = lambda v: (calls.append(1), matrix @ v)[1]  # noqa: E731
    *_, found = conjugate_gradient(counted, right, coarse=counted)
    assert found.iterations == len(calls)


def test_a_fit_with_coarse_steps_ends_where_one_in_doubles_does(objective, fitted, monkeypatch):
    monkeypatch.setattr(Placement, "coarse", property(lambda self: self))
    *_, (theta, relative) = minimise(objective)
    assert relative <= 1e-5
    gradient = objective.gradient_and_value(fitted)[0].norm()
    assert (gradient / objective.gradient_scale(objective.scope.start)).item() <= 1e-5
    torch.testing.assert_close(fitted, theta, rtol=0, atol=1e-4 * (theta - objective.scope.start).norm().item())


def test_the_scale_of_gradients_is_that_of_the_derivatives(objective):
    theta = objective.scope.start + 0.01 * draw(len(objective.scope.start), seed=3)
    total = 0.0
    for number, batch in enumerate(objective.batches):
        generator = torch.Generator().manual_seed(number)
        signs = 2.0 * torch.randint(2, (len(batch[0]),), generator=generator) - 1
        weighted = lambda at, b=batch, s=signs: (  # noqa: E731
            objective.scope.loss.pair_losses(objective.scope.similarity(at, b)) * s
        ).sum()
        total = total + grad(weighted)(theta).square().sum()
    expected = (total / PAIRS).sqrt()
    torch.testing.assert_close(objective.gradient_scale(theta), expected)
    assert objective.coarse().gradient_scale(theta).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_in_float32_are_those_in_float64_of_each_pair(objective, fitted):
    """Of pairs as well that are learned so well that little is left of their gradient."""
    scope = objective.scope
    projection = principal_projection(scope, fitted, objective.own_stacks(), rank=8)
    assert isinstance(projection, KroneckerProjection)
    coarse = projection.coarse()
    assert {side.dtype for head in coarse.heads for side in (head.input, head.output)} == {torch.float32}
    sharper = HeadScope(*scope.split(fitted), 60.0, scope.logits(fitted, fitted.new_zeros(())).item(), scope.loss)
    theta = sharper.start
    shares = []
    for batch in objective.batches:
        own = sharper.similarity(theta, batch).softmax(-1).diagonal()
        shares.append(1 - own)
        exact = KroneckerProjection(sharper, *projection.heads).removal_gradients(theta, batch)
        rounded = KroneckerProjection(sharper, *coarse.heads).removal_gradients(theta, batch)
        for found, expected in zip(rounded, exact, strict=True):
            assert found.dtype == torch.float32
            off = (found - expected).norm(dim=1) / expected.norm(dim=1)
            assert off.max() < 1e-6
    assert torch.cat(shares).min() < 1e-8
