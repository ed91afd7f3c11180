"""The objective, its derivatives and its minimiser against dense computations and curvlinops."""

import pytest
import torch
from curvlinops import HessianLinearOperator

from fiftyone_ecif.contrastive import SoftmaxLoss
from fiftyone_ecif.curvature import conjugate_gradient
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.fitting import minimise
from fiftyone_ecif.heads import FeatureBatches, HeadScope
from fiftyone_ecif.objective import ContrastiveLoss, random_partition


def make_objective(pairs=20, batch_size=6, scale=5.0, proximal=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scope = HeadScope(draw(5, 3), draw(4, 3), scale)
    shared = draw(pairs, 3)  # what an image and its caption have in common
    images, texts = (shared @ draw(3, width) + 0.3 * draw(pairs, width) for width in (5, 4))
    batches = FeatureBatches(images, texts, random_partition(pairs, batch_size, seed))
    return ContrastiveLoss(scope, batches, pairs, proximal)


def plain_loss(objective, theta):
    """The objective written out once more, with a loop over pairs."""
    scope, total = objective.scope, 0.0
    image_head, text_head = theta[:15].view(5, 3), theta[15:].view(4, 3)
    for images, texts in objective.batches:
        u = images @ image_head
        v = texts @ text_head
        cosine = (u @ v.T) / (u.norm(dim=1)[:, None] * v.norm(dim=1)[None])
        for i in range(len(u)):
            scale = scope.scale(theta)
            row, column = scale * cosine[i], scale * cosine[:, i]
            total = total + row.exp().sum().log() + column.exp().sum().log() - 2 * row[i]
    return total / objective.pairs + objective.proximal / 2 * (theta - scope.start).square().sum()


@pytest.mark.parametrize(("pairs", "batch_size"), [(20, 6), (7, 7), (9, 2), (2, 2)])
def test_every_pair_is_in_one_batch(pairs, batch_size):
    partition = random_partition(pairs, batch_size, seed=1)
    sizes = [len(rows) for rows in partition]
    assert sorted(torch.cat(partition).tolist()) == list(range(pairs))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert all(torch.equal(a, b) for a, b in zip(partition, random_partition(pairs, batch_size, 1), strict=True))


def test_value_gradient_and_hessian_equal_dense_autograd():
    objective = make_objective()
    theta = objective.scope.start + 0.1
    gradient, value = objective.gradient_and_value(theta)
    expected = torch.autograd.functional.jacobian(lambda t: plain_loss(objective, t), theta)
    hessian = torch.autograd.functional.hessian(lambda t: plain_loss(objective, t), theta)
    torch.testing.assert_close(value, plain_loss(objective, theta))
    torch.testing.assert_close(objective.loss(theta), value)
    torch.testing.assert_close(gradient, expected)
    products = torch.stack([objective.hessian_product(theta, row) for row in torch.eye(len(theta), dtype=theta.dtype)])
    torch.testing.assert_close(products, hessian)


def test_the_gradient_scale_is_a_pairs_gradient():
    objective = make_objective(pairs=400, batch_size=50)
    start, squares = objective.scope.start, []
    for batch in objective.batches:
        jacobian = torch.func.jacrev(
            lambda theta, batch=batch: SoftmaxLoss().pair_losses(objective.scope.similarity(theta, batch))
        )
        squares += jacobian(start).square().sum(1).tolist()
    expected = torch.tensor(squares).mean().sqrt().item()
    assert objective.gradient_scale(start).item() == pytest.approx(expected, rel=0.3)


def test_hessian_products_equal_curvlinops():
    objective = make_objective(proximal=0.0)

    class Similarity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(objective.scope.start.clone())

        def forward(self, batch):
            return objective.scope.similarity(self.theta, (batch["images"], batch["texts"]))

    class Loss(torch.nn.MSELoss):  # curvlinops asks for a loss that says how it reduces
        def forward(self, similarity, _):
            return SoftmaxLoss().pair_losses(similarity).sum() / objective.pairs

    model = Similarity()
    data = [({"images": images, "texts": texts}, torch.zeros(len(images))) for images, texts in objective.batches]
    operator = HessianLinearOperator(
        model,
        Loss(reduction="sum"),
        list(model.parameters()),
        data,
        check_deterministic=False,
        batch_size_fn=lambda batch: len(batch["images"]),
    )
    vector = torch.randn(len(objective.scope.start), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(objective.hessian_product(objective.scope.start, vector), operator @ vector)


def test_conjugate_gradients_equal_a_dense_solve():
    objective = make_objective(proximal=0.5)
    *_, (theta, _) = minimise(objective)
    hessian = torch.autograd.functional.hessian(lambda t: plain_loss(objective, t), theta)
    right = torch.randn(len(theta), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    *_, solution = conjugate_gradient(lambda v: objective.hessian_product(theta, v), right, tolerance=1e-10)
    torch.testing.assert_close(solution.vector, torch.linalg.solve(hessian, right), rtol=1e-6, atol=1e-8)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert solution.condition_number == pytest.approx((eigenvalues[-1] / eigenvalues[0]).item(), rel=1e-3)
    assert solution.residual <= 1e-10


def test_negative_curvature_is_an_error_with_a_remedy():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    with pytest.raises(EcifError, match=r"curvature is negative.*fit=True"):
        list(conjugate_gradient(lambda v: matrix @ v, torch.ones(3, dtype=torch.float64)))


def test_a_solve_that_does_not_converge_is_an_error_with_a_remedy():
    matrix = torch.diag(torch.logspace(-9, 3, 40, dtype=torch.float64))
    with pytest.raises(EcifError, match=r"did not converge in 5 .* Raise proximal"):
        list(conjugate_gradient(lambda v: matrix @ v, torch.ones(40, dtype=torch.float64), max_iterations=5))


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(EcifError, match="NaN"):
        list(conjugate_gradient(lambda v: v * torch.nan, torch.ones(3, dtype=torch.float64)))


def test_a_zero_right_hand_side_has_a_zero_solution():
    (solution,) = conjugate_gradient(lambda v: v, torch.zeros(3, dtype=torch.float64))
    assert solution.vector.abs().max() == 0


@pytest.mark.parametrize("proximal", [0.1, 1.0])
def test_minimise_ends_at_a_stationary_point(proximal):
    objective = make_objective(pairs=60, batch_size=20, proximal=proximal)
    *_, (theta, relative) = minimise(objective, tolerance=1e-6)
    start = objective.scope.start
    gradient, value = objective.gradient_and_value(theta)
    assert gradient.norm() / objective.gradient_scale(start) == pytest.approx(relative)
    assert relative <= 1e-6
    assert value < objective.loss(start)


def test_minimise_says_when_it_does_not_get_there():
    with pytest.raises(EcifError, match=r"stationary point in 2 steps.*Raise proximal"):
        list(minimise(make_objective(pairs=60, batch_size=20), max_iterations=2))
