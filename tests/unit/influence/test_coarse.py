"""Steps in float32 whose result is checked in float64 lead where steps in float64 do."""

import pytest
import torch
from torch.func import grad

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence import solvers
from fiftyone_ecif.influence.curvature import CoarseProduct, hessian_at
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import conjugate_gradient, dense_matrix, solve
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import KroneckerProjection, principal_projection
from fiftyone_ecif.influence.solvers import SOLVERS
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
    product, coarse = hessian_at(objective, fitted), CoarseProduct(hessian_at(objective.coarse(), fitted))
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
    *_, found = conjugate_gradient(lambda v: matrix @ v, right, 1e-10, coarse=CoarseProduct(lambda v: off @ v))
    assert residual(matrix, right, found.vector) == pytest.approx(found.residual, rel=1e-3)
    assert found.residual <= 1e-10


@pytest.mark.parametrize("useless", [lambda v: 1e-3 * v, lambda v: -v], ids=["far too small", "negative"])
def test_steps_that_lead_nowhere_are_taken_exactly(objective, fitted, useless):
    right, matrix = draw(len(fitted), seed=4), dense_matrix(hessian_at(objective, fitted), fitted)
    *_, found = conjugate_gradient(lambda v: matrix @ v, right, coarse=CoarseProduct(useless))
    assert residual(matrix, right, found.vector) <= 1e-6


def test_negative_curvature_is_found_by_the_exact_product():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    with pytest.raises(EcifError, match=r"negative \(-0\."):
        list(conjugate_gradient(lambda v: matrix @ v, draw(3), coarse=CoarseProduct(lambda v: v)))


def test_products_are_counted_in_both_precisions(objective, fitted):
    right, calls = draw(len(fitted), seed=4), []
    matrix = dense_matrix(hessian_at(objective, fitted), fitted)
    counted = lambda v: (calls.append(1), matrix @ v)[1]  # noqa: E731
    *_, found = conjugate_gradient(counted, right, coarse=CoarseProduct(counted))
    assert found.iterations == len(calls)


@pytest.fixture
def held(objective):
    """Held firmly at the start, which is well-conditioned."""
    return ContrastiveLoss(objective.scope, objective.batches, PAIRS, 1000.0)


@pytest.mark.parametrize("size", [1e-9, 1e-8, 1e-5])
def test_the_residual_includes_what_coarse_products_are_off_by(size, held):
    theta = held.scope.start
    right, matrix = draw(len(theta), seed=4), dense_matrix(hessian_at(held, theta), theta)
    off = draw(*matrix.shape, seed=5)
    off = size * matrix.norm() / off.norm() * (off + off.T)
    exact = []
    coarse = CoarseProduct(lambda v: matrix @ v + off @ v, lambda v: (off @ v).norm())
    *_, found = conjugate_gradient(lambda v: (exact.append(1), matrix @ v)[1], right, 1e-6, coarse=coarse)
    left = residual(matrix, right, found.vector)
    assert left <= found.residual * (1 + 1e-9)
    assert found.residual <= 1e-6
    assert bool(exact) == (size > 1e-8)  # no exact product where the steps are good enough as they are


@pytest.fixture
def checked(monkeypatch):
    """Of 90 pairs 30 tell how far coarse products are off."""
    monkeypatch.setattr(solvers, "_CHECKED", 30)


@pytest.mark.parametrize("solver", ["hessian", "ggn"])
def test_how_far_coarse_products_are_off_is_measured_on_some_pairs(solver, objective, fitted, checked):
    coarse = SOLVERS[solver].coarse_product(objective, fitted)
    vector = draw(len(fitted), seed=3)
    off = (SOLVERS[solver].product(objective, fitted)(vector) - coarse.product(vector)).norm()
    assert off <= coarse.error(vector) <= 10 * off


def test_where_some_pairs_are_most_of_them_only_an_exact_product_tells(objective, fitted):
    assert SOLVERS["hessian"].coarse_product(objective, fitted).error is None
    assert SOLVERS["hessian"].coarse_product(objective.coarse(), fitted) is None


@pytest.mark.parametrize("solver", ["hessian", "ggn"])
def test_a_well_conditioned_solve_takes_no_exact_product(solver, held, checked):
    theta, chosen, exact = held.scope.start, SOLVERS[solver], []
    right, product = draw(len(theta), seed=4), chosen.product(held, theta)
    counted = lambda v: (exact.append(1), product(v))[1]  # noqa: E731
    found = result_of(solve(counted, right, coarse=chosen.coarse_product(held, theta)))
    assert not exact
    matrix = dense_matrix(product, right)
    assert residual(matrix, right, found.vector) <= found.residual <= 1e-6
    expected = torch.linalg.solve(matrix, right)
    assert ((found.vector - expected).norm() / expected.norm()).item() <= 1e-6 * found.condition_number


@pytest.mark.parametrize(("decay", "proximal"), [(1.0, 1e-2), (1.5, 1e-3)])
def test_an_ill_conditioned_solve_is_checked_by_exact_products(decay, proximal, checked):
    """Features of ever smaller variance, hardly held by the pull to the start."""
    spread, shown = torch.arange(1, 31) ** -decay, draw(PAIRS, 30, seed=1)
    sides = [((shown + 0.3 * draw(PAIRS, 30, seed=seed)) * spread).float() for seed in (2, 3)]
    scope = HeadScope(draw(30, 10, seed=5), draw(30, 10, seed=6), 20.0)
    batches = FeatureBatches(*sides, random_partition(PAIRS, 30, 0))
    objective = ContrastiveLoss(scope, batches, PAIRS, proximal)
    chosen, exact, right = SOLVERS["ggn"], [], draw(len(scope.start), seed=4)
    product = chosen.product(objective, scope.start)
    counted = lambda v: (exact.append(1), product(v))[1]  # noqa: E731
    *_, found = conjugate_gradient(counted, right, coarse=chosen.coarse_product(objective, scope.start))
    assert exact
    matrix = dense_matrix(product, right)
    condition = torch.linalg.cond(matrix).item()
    assert condition > 5 / proximal
    assert residual(matrix, right, found.vector) <= found.residual * (1 + 1e-6)
    assert found.residual <= 1e-6
    expected = torch.linalg.solve(matrix, right)
    assert ((found.vector - expected).norm() / expected.norm()).item() <= 1e-6 * condition


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
