"""The objective, its derivatives and its minimiser against dense computations and curvlinops."""

import pytest
import torch
from curvlinops import HessianLinearOperator

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence import linear_solve
from fiftyone_ecif.influence import objective as module
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import conjugate_gradient, mean_eigenvalue, solve
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition


def make_objective(pairs=20, batch_size=6, scale=5.0, proximal=0.1, seed=0, loss=None, with_scale=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scope = HeadScope(draw(5, 3), draw(4, 3), scale, -1.0 if loss else 0.0, loss, with_scale)
    shared = draw(pairs, 3)  # what an image and its caption have in common
    images, texts = (shared @ draw(3, width) + 0.3 * draw(pairs, width) for width in (5, 4))
    batches = FeatureBatches(images, texts, random_partition(pairs, batch_size, seed))
    return ContrastiveLoss(scope, batches, pairs, proximal)


def plain_loss(objective, theta):
    """The objective written out once more, with a loop over pairs."""
    scope, total = objective.scope, 0.0
    image_head, text_head = theta[:15].view(5, 3), theta[15:27].view(4, 3)
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


def test_the_gradient_scale_of_many_pairs_is_that_of_the_first(monkeypatch):
    objective = make_objective(pairs=400, batch_size=10)
    whole = objective.gradient_scale(objective.scope.start).item()
    monkeypatch.setattr(module, "_TYPICAL", 200)
    found = objective.gradient_scale(objective.scope.start)
    torch.testing.assert_close(found, objective.sample(200).gradient_scale(objective.scope.start))
    assert found.item() != whole
    assert found.item() == pytest.approx(whole, rel=0.3)


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
    with pytest.raises(EcifError, match=r"stationary point of.*Raise proximal"):
        list(minimise(make_objective(pairs=60, batch_size=20), max_passes=3))


@pytest.mark.parametrize(
    ("loss", "with_scale", "pairs", "batch_size", "scale"),
    [(None, False, 20, 6, 5.0), (None, True, 9, 4, 30.0), (SigmoidLoss(), True, 20, 6, 5.0), (None, False, 3, 1, 5.0)],
)
def test_gauss_newton_products_equal_a_dense_matrix(loss, with_scale, pairs, batch_size, scale):
    objective = make_objective(pairs, batch_size, scale, loss=loss, with_scale=with_scale)
    theta = objective.scope.start + 0.1
    expected = objective.proximal * torch.eye(len(theta), dtype=theta.dtype)
    for batch in objective.batches:
        n = len(batch[0])
        jacobian = torch.autograd.functional.jacobian(
            lambda at, batch=batch: objective.scope.similarity(at, batch).flatten(), theta
        )

        def batch_loss(flat, n=n):
            s = flat.view(n, n)
            if loss:
                off = 1 - torch.eye(n, dtype=s.dtype)
                return (-torch.sigmoid(s.diagonal()).log()).sum() - (torch.sigmoid(-s).log() * off).sum()
            return -s.log_softmax(1).trace() - s.log_softmax(0).trace()

        similarity = objective.scope.similarity(theta, batch).flatten()
        inner = torch.autograd.functional.hessian(batch_loss, similarity)
        expected = expected + jacobian.T @ inner @ jacobian / pairs
    rows = torch.eye(len(theta), dtype=theta.dtype)
    found = torch.stack([objective.gauss_newton_product(theta, row) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.linalg.eigvalsh(found)[0] >= objective.proximal - 1e-9
    if batch_size > 1:  # and that is not the Hessian
        hessian = torch.stack([objective.hessian_product(theta, row) for row in rows])
        assert (found - hessian).norm() > 1e-3 * hessian.norm()


@pytest.mark.parametrize("rows", [[], [3], [0, 1, 5, 19], list(range(12))])
@pytest.mark.parametrize("batch_size", [6, 2, 1])
def test_without_takes_pairs_out_and_leaves_the_others_where_they_are(rows, batch_size):
    objective = make_objective(batch_size=batch_size)
    rows = [*rows, *objective.batches.partition[1].tolist()]  # a whole batch goes as well
    theta = objective.scope.start + 0.1
    left = objective.without(torch.tensor(rows))
    images, texts = objective.batches.images.double(), objective.batches.texts.double()
    kept = [[row for row in batch.tolist() if row not in rows] for batch in objective.batches.partition]
    assert [batch.tolist() for batch in left.batches.partition] == [batch for batch in kept if batch]

    def expected(at):
        total = objective.proximal / 2 * (at - objective.scope.start).square().sum()
        for batch in kept:
            u, v = images[batch] @ at[:15].view(5, 3), texts[batch] @ at[15:].view(4, 3)
            s = 5 * (u / u.norm(dim=1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T
            for n in range(len(batch)):
                total = total + (s[n].exp().sum().log() + s[:, n].exp().sum().log() - 2 * s[n, n]) / 20
        return total

    gradient, value = left.gradient_and_value(theta)
    torch.testing.assert_close(value, expected(theta))
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(expected, theta))
    if batch_size > 1:  # a pair that is alone has no loss to take away
        assert abs(objective.loss(theta) - value) > 1e-3
    assert sum(len(batch) for batch in objective.batches.partition) == 20


def pair_gradients(objective, theta):
    return torch.cat(
        [
            torch.func.jacrev(lambda at, b=batch: objective.scope.loss.pair_losses(objective.scope.similarity(at, b)))(
                theta
            )
            for batch in objective.batches
        ]
    )


def test_random_gradients_have_the_pairs_second_moment():
    """The average outer product of a sum with random signs is the sum of the outer products."""
    objective = make_objective(pairs=8, batch_size=5, proximal=7.0)
    theta = objective.scope.start + 0.1
    count = 600
    drawn = torch.stack(list(objective.random_gradients(theta, count)))
    each = pair_gradients(objective, theta)
    expected = each.T @ each
    found = drawn.T @ drawn / count
    # relative error of about sqrt(rank / count); without signs it would be near 1
    assert (found - expected).norm() < 0.25 * expected.norm()
    assert drawn.mean(0).norm() < 0.15 * expected.trace().sqrt()
    again = torch.stack(list(objective.random_gradients(theta, 3)))
    torch.testing.assert_close(again, drawn[:3])
    assert not torch.allclose(next(objective.random_gradients(theta, 1, seed=1)), drawn[0])
    assert torch.linalg.matrix_rank(drawn, rtol=1e-9) == 8


def make_matrix(size, least=1.0, most=100.0, seed=0):
    """Symmetric, with known eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(least, most, size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, values, torch.randn(size, generator=generator, dtype=torch.float64)


def finish(generator):
    """What a generator returns, and what it yielded."""
    seen = []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as stop:
            return stop.value, seen


each_path = pytest.mark.parametrize("dense", [True, False], ids=["dense", "cg"])


@each_path
@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_solve_equals_a_direct_solve_with_relative_damping(size, damping, dense, monkeypatch):
    monkeypatch.setattr(linear_solve, "_DENSE", 512 if dense else 0)
    matrix, values, right = make_matrix(size)
    solution, seen = finish(solve(lambda v: matrix @ v, right, damping, tolerance=1e-10))
    # the mean eigenvalue is exact if it comes from the factorisation, and estimated otherwise
    mean = values.mean().item() if dense else mean_eigenvalue(lambda v: matrix @ v, right)
    shifted = matrix + damping * mean * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(solution.vector, torch.linalg.solve(shifted, right), rtol=1e-7, atol=1e-9)
    assert solution.damping == damping
    assert solution.residual <= 1e-10
    eigenvalues = torch.linalg.eigvalsh(shifted)
    assert solution.condition_number == pytest.approx((eigenvalues[-1] / eigenvalues[0]).item(), rel=0.05)
    assert bool(seen) != dense
    assert seen == [] or seen[-1] == solution.residual


@each_path
@pytest.mark.parametrize("least", [-0.01, -1.0, -40.0])
def test_negative_curvature_is_mended_by_the_least_power_of_two(least, dense, monkeypatch):
    monkeypatch.setattr(linear_solve, "_DENSE", 512 if dense else 0)
    matrix, values, right = make_matrix(40, least)
    mean = values.mean().item() if dense else mean_eigenvalue(lambda v: matrix @ v, right)
    damping = next(2.0**k for k in range(-10, 20) if least + 2.0**k * mean > 0)
    solution, _ = finish(solve(lambda v: matrix @ v, right, tolerance=1e-8))
    assert solution.damping == damping
    shifted = matrix + damping * mean * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(solution.vector, torch.linalg.solve(shifted, right), rtol=1e-4, atol=1e-6)


@each_path
def test_damping_that_is_asked_for_is_doubled_until_it_mends(dense, monkeypatch):
    monkeypatch.setattr(linear_solve, "_DENSE", 512 if dense else 0)
    matrix, _, right = make_matrix(40, -20.0)  # the mean eigenvalue is 40
    assert finish(solve(lambda v: matrix @ v, right, 0.3))[0].damping == 0.6
    assert finish(solve(lambda v: matrix @ v, right, 0.75))[0].damping == 0.75


@each_path
def test_curvature_that_no_damping_mends_is_an_error(dense, monkeypatch):
    monkeypatch.setattr(linear_solve, "_DENSE", 512 if dense else 0)
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    with pytest.raises(EcifError, match="negative whatever the damping"):
        finish(solve(lambda v: matrix @ v, torch.ones(2, dtype=torch.float64)))


@each_path
def test_solve_in_single_precision(dense, monkeypatch):
    monkeypatch.setattr(linear_solve, "_DENSE", 512 if dense else 0)
    matrix, _, right = make_matrix(50)
    rough = matrix.float()
    solution, _ = finish(solve(lambda v: rough @ v, right.float(), 0.1))
    assert solution.vector.dtype == torch.float32
    assert solution.residual <= 1e-3
    mean = mean_eigenvalue(lambda v: matrix @ v, right) if not dense else torch.linalg.eigvalsh(matrix).mean().item()
    expected = torch.linalg.solve(matrix + 0.1 * mean * torch.eye(50, dtype=torch.float64), right)
    assert (solution.vector.double() - expected).norm() < 1e-2 * expected.norm()


def test_both_ways_to_solve_agree_on_the_objective(monkeypatch):
    objective = make_objective(proximal=0.5)
    *_, (theta, _) = minimise(objective)
    right = torch.randn(len(theta), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for product in (objective.hessian_product, objective.gauss_newton_product):
        dense, _ = finish(solve(lambda v, p=product: p(theta, v), right))
        with monkeypatch.context() as patch:
            patch.setattr(linear_solve, "_DENSE", 0)
            iterated, _ = finish(solve(lambda v, p=product: p(theta, v), right, tolerance=1e-10))
        torch.testing.assert_close(iterated.vector, dense.vector, rtol=1e-6, atol=1e-8)


def test_the_mean_eigenvalue_is_within_the_error_of_its_estimate():
    matrix, values, right = make_matrix(200)
    # Hutchinson with random signs: the variance of v.Hv is twice the sum of squares off the diagonal
    off = matrix - torch.diag(matrix.diagonal())
    error = (2 * off.square().sum() / 8).sqrt().item() / 200
    assert error < 0.05 * values.mean()
    found = mean_eigenvalue(lambda v: matrix @ v, right)
    assert found == pytest.approx(values.mean().item(), abs=4 * error)
    assert mean_eigenvalue(lambda v: matrix @ v, right) == found
    assert mean_eigenvalue(lambda v: -matrix @ v, right) == pytest.approx(found)
    diagonal = torch.arange(1.0, 6.0, dtype=torch.float64)
    assert mean_eigenvalue(lambda v: diagonal * v, diagonal) == pytest.approx(3.0)
