"""Projected removal gradients against autograd, one pair at a time; projections against their matrices."""

import pytest
import torch

from fiftyone_ecif.influence import projections
from fiftyone_ecif.influence.head_gradients import HeadProjection, removal_gradients
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import (
    PROJECTIONS,
    BasisProjection,
    KroneckerProjection,
    gradient_basis,
    principal_projection,
)
from fiftyone_ecif.influence.targets import PairTarget, ZeroShotTarget

each_kind = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
each_scale_scope = pytest.mark.parametrize("with_scale", [False, True], ids=["fixed", "with_scale"])


def _problem(n=7, widths=(9, 6), d=5, scale=4.0, seed=0, kind="softmax", with_scale=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    loss, bias = (SoftmaxLoss(), 0.0) if kind == "softmax" else (SigmoidLoss(), -1.0)
    scope = HeadScope(draw(widths[0], d), draw(widths[1], d), scale, bias, loss, with_scale)
    return scope, (draw(n, widths[0]), draw(n, widths[1])), draw


def _eyes(widths=(9, 6), d=5):
    eye = lambda n: torch.eye(n, dtype=torch.float64)  # noqa: E731
    return tuple(HeadProjection(eye(width), eye(d)) for width in widths)


def _orthonormal(draw, rows, columns):
    return torch.linalg.qr(draw(rows, columns)).Q


def _kronecker(scope, draw, ranks=((3, 2), (4, 3))):
    heads = [
        HeadProjection(_orthonormal(draw, shape[0], a), _orthonormal(draw, shape[1], b))
        for shape, (a, b) in zip(scope.shapes, ranks, strict=True)
    ]
    return KroneckerProjection(scope, *heads)


def _by_autograd(scope, batch, n, theta=None):
    """Gradients of L(B) - l_n - L(B without n), and of l_n, by brute force."""
    theta = (scope.start if theta is None else theta).clone().requires_grad_()
    similarity = scope.similarity(theta, batch)
    losses = scope.loss.pair_losses(similarity)
    keep = [k for k in range(len(batch[0])) if k != n]
    without = scope.loss.pair_losses(scope.similarity(theta, (batch[0][keep], batch[1][keep]))).sum()
    # with a sigmoid loss, half of a pair's loss is with others, and that is the negative role
    own = torch.nn.functional.softplus(-similarity[n, n]) if scope.loss.name == "sigmoid" else losses[n]
    (positive,) = torch.autograd.grad(own, theta, retain_graph=True)
    (negative,) = torch.autograd.grad(losses.sum() - own - without, theta)
    return positive, negative


@each_kind
@each_scale_scope
@pytest.mark.parametrize("scale", [1.0, 10.0, 200.0])
def test_unprojected_gradients_equal_autograd(scale, kind, with_scale):
    scope, batch, _ = _problem(scale=scale, kind=kind, with_scale=with_scale)
    theta = scope.start + 0.01
    positive, negative = removal_gradients(scope, theta, batch, _eyes())
    for n in range(len(batch[0])):
        expected = _by_autograd(scope, batch, n, theta)
        # torch's softplus has a slope of one above 20, where the logistic function is 2e-9 below
        torch.testing.assert_close(positive[n], expected[0], rtol=1e-9, atol=2e-9 * scale)
        torch.testing.assert_close(negative[n], expected[1], rtol=1e-9, atol=2e-9 * scale)


@each_kind
@pytest.mark.parametrize("n", [2, 3, 12])
def test_unprojected_gradients_of_duplicates_equal_autograd(kind, n):
    scope, (images, texts), _ = _problem(n=n, scale=20.0, kind=kind, with_scale=True)
    images[1], texts[1] = images[0], texts[0]
    texts[-1] = texts[0]
    found = removal_gradients(scope, scope.start, (images, texts), _eyes())
    for k in range(n):
        for role, expected in zip(found, _by_autograd(scope, (images, texts), k), strict=True):
            torch.testing.assert_close(role[k], expected, rtol=1e-8, atol=1e-8)


@each_kind
@each_scale_scope
def test_projected_gradients_are_the_projection_of_the_full_ones(kind, with_scale):
    scope, batch, draw = _problem(kind=kind, with_scale=with_scale)
    projection = _kronecker(scope, draw)
    got = projection.removal_gradients(scope.start, batch)
    assert projection.rank == 3 * 2 + 4 * 3 + with_scale
    for n in range(len(batch[0])):
        for role, full in zip(got, _by_autograd(scope, batch, n), strict=True):
            blocks = [
                (p.input.T @ head @ p.output).flatten()
                for p, head in zip(projection.heads, scope.split(full), strict=True)
            ]
            expected = torch.cat([*blocks, full[-1:]] if with_scale else blocks)
            torch.testing.assert_close(role[n], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(projection.project(full), expected)


@pytest.mark.parametrize("role", ["taylor", "positive", "negative", "as_printed"])
@each_scale_scope
def test_other_roles_equal_direct_mode(role, with_scale):
    """Along any direction the gradients give what the derivative of the roles does."""
    scope, batch, draw = _problem(with_scale=with_scale)
    direction = draw(len(scope.start))
    similarity, moved = torch.func.jvp(lambda at: scope.similarity(at, batch), (scope.start,), (direction,))
    expected = scope.loss.removal_tangents(similarity, moved, role)
    found = removal_gradients(scope, scope.start, batch, _eyes(), role)
    for part, tangent in zip(found, expected, strict=True):
        torch.testing.assert_close(part @ direction, tangent, rtol=1e-8, atol=1e-8)


@each_kind
def test_batch_of_one_has_no_negative_role(kind):
    scope, batch, _ = _problem(n=1, kind=kind)
    positive, negative = removal_gradients(scope, scope.start, batch, _eyes())
    assert negative.abs().max() == 0
    assert (positive.abs().max() > 1e-3) == (kind == "sigmoid")  # which is not sure of a pair that is alone


def make_projection(kind, scope, draw):
    if kind == "kronecker":
        return _kronecker(scope, draw)
    return BasisProjection(scope, _orthonormal(draw, len(scope.start), 11))


each_projection = pytest.mark.parametrize("made", ["kronecker", "basis"])


@each_projection
@each_scale_scope
def test_project_and_lift_are_adjoint_and_inverse(made, with_scale):
    scope, _, draw = _problem(with_scale=with_scale)
    projection = make_projection(made, scope, draw)
    coordinates, vector = draw(projection.rank), draw(len(scope.start))
    torch.testing.assert_close(projection.project(projection.lift(coordinates)), coordinates)
    assert projection.lift(coordinates).shape == scope.start.shape
    assert projection.lift(coordinates).dot(vector).item() == pytest.approx(
        coordinates.dot(projection.project(vector)).item()
    )
    stack = draw(2, 3, len(scope.start))
    found = projection.project(stack)
    assert found.shape == (2, 3, projection.rank)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], projection.project(stack[i, j]))


@each_projection
@each_scale_scope
@each_kind
def test_jacobians_equal_autograd(made, with_scale, kind):
    scope, batch, draw = _problem(n=11, with_scale=with_scale, kind=kind)
    projection = make_projection(made, scope, draw)
    theta = scope.start + 0.05
    function = lambda at: scope.loss.pair_losses(scope.similarity(at, batch))  # noqa: E731
    full = torch.autograd.functional.jacobian(function, theta)
    found = projection.jacobian(lambda scope, at: scope.loss.pair_losses(scope.similarity(at, batch)), theta)
    directions = torch.stack([projection.lift(row) for row in torch.eye(projection.rank, dtype=theta.dtype)])
    torch.testing.assert_close(found, full @ directions.T, rtol=1e-9, atol=1e-10)


@each_projection
@each_scale_scope
@pytest.mark.parametrize("of", ["pairs", "classes"])
def test_gradients_of_a_target_equal_autograd(made, with_scale, of):
    """Whatever it asks of the scope: unit embeddings, logits, prompts."""
    scope, batch, draw = _problem(with_scale=with_scale)
    projection, rows = make_projection(made, scope, draw), torch.arange(7)
    batches = FeatureBatches(*batch, [rows])
    if of == "pairs":
        target = PairTarget(scope, batches, lambda images, captions, logits: logits.diagonal() + images[:, 0])
    else:
        target = ZeroShotTarget(scope, batches, rows % 3, draw(6, 6), templates=2)
    theta = scope.start + 0.05
    full = torch.autograd.functional.jacobian(lambda at: target.batch_losses(at, rows, batch), theta)
    found = projection.jacobian(lambda scope, at: target.on(scope).batch_losses(at, rows, batch), theta)
    directions = torch.stack([projection.lift(row) for row in torch.eye(projection.rank, dtype=theta.dtype)])
    torch.testing.assert_close(found, full @ directions.T, rtol=1e-9, atol=1e-10)
    assert target.scope is scope


@each_projection
@each_scale_scope
@each_kind
def test_curvature_is_the_restriction_of_the_matrix(made, with_scale, kind):
    scope, (images, texts), draw = _problem(n=10, with_scale=with_scale, kind=kind)
    projection = make_projection(made, scope, draw)
    batches = FeatureBatches(images, texts, random_partition(10, 4, 0))
    objective = ContrastiveLoss(scope, batches, 10, 0.3)
    theta = scope.start + 0.05

    def plain(at):
        parts = [scope.loss.pair_losses(scope.similarity(at, batch)).sum() for batch in batches]
        return sum(parts) / 10 + 0.15 * (at - scope.start).square().sum()

    hessian = torch.autograd.functional.hessian(plain, theta)
    found = projection.curvature(lambda v: objective.hessian_product(theta, v), theta)
    directions = torch.stack([projection.lift(row) for row in torch.eye(projection.rank, dtype=theta.dtype)])
    torch.testing.assert_close(found, directions @ hessian @ directions.T, rtol=1e-8, atol=1e-9)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(projection.hessian(objective, theta), found)
    expected = projection.curvature(lambda v: objective.gauss_newton_product(theta, v), theta)
    torch.testing.assert_close(projection.gauss_newton(objective, theta), expected)
    assert not torch.allclose(found, expected)


@each_projection
@each_scale_scope
def test_state_is_enough_to_make_a_projection_again(made, with_scale):
    scope, batch, draw = _problem(with_scale=with_scale)
    projection = make_projection(made, scope, draw)
    kind = PROJECTIONS[made]
    again = kind.from_state(scope, {key: value.clone() for key, value in projection.state().items()})
    assert type(again) is type(projection)
    assert again.rank == projection.rank
    vector = draw(len(scope.start))
    torch.testing.assert_close(again.project(vector), projection.project(vector), rtol=0, atol=0)
    for part, expected in zip(
        again.removal_gradients(scope.start, batch), projection.removal_gradients(scope.start, batch), strict=True
    ):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


@each_kind
@each_scale_scope
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_full_basis_gives_the_removal_gradients(kind, with_scale, n):
    """All directions of a small scope, turned at random: nothing is lost but what is left out of the weakest pulls."""
    scope, batch, draw = _problem(n=n, widths=(4, 3), d=3, kind=kind, with_scale=with_scale)
    basis = _orthonormal(draw, len(scope.start), len(scope.start))
    assert basis.shape[0] == basis.shape[1]
    found = BasisProjection(scope, basis).removal_gradients(scope.start, batch)
    size = max(part.abs().max().item() for part in found)
    for k in range(n):
        for role, full in zip(found, _by_autograd(scope, batch, k), strict=True):
            torch.testing.assert_close(basis @ role[k], full, rtol=1e-6, atol=1e-6 * (1 + size))


def test_a_gradient_basis_spans_the_pairs_gradients():
    scope, (images, texts), _ = _problem(n=8)
    objective = ContrastiveLoss(scope, FeatureBatches(images, texts, random_partition(8, 4, 0)), 8)
    basis = gradient_basis(scope.start, [(objective, 24)])  # more than enough, as random signs may repeat
    torch.testing.assert_close(basis.T @ basis, torch.eye(24, dtype=torch.float64))
    for batch in objective.batches:
        gradients = torch.autograd.functional.jacobian(
            lambda at, b=batch: scope.loss.pair_losses(scope.similarity(at, b)), scope.start
        )
        left = gradients - gradients @ basis @ basis.T
        assert left.norm() < 1e-8 * gradients.norm()
    assert gradient_basis(scope.start, [(objective, 3), (objective, 2)]).shape == (len(scope.start), 5)


def test_directions_of_many_pairs_are_those_of_the_first(monkeypatch):
    scope, (images, texts), _ = _problem(n=40, widths=(30, 20), d=18)
    objective = ContrastiveLoss(scope, FeatureBatches(images, texts, random_partition(40, 10, 0)), 40)
    monkeypatch.setattr(projections, "_VARIED", 20)
    found = KroneckerProjection.choose(objective, scope.start, [])
    for pairs, near in ((20, True), (40, False)):
        stacks = objective.sample(pairs).own_stacks()
        expected = principal_projection(scope, scope.start, stacks)
        for head, other in zip(found.heads, expected.heads, strict=True):
            overlap = (head.input.T.double() @ other.input).square().sum().item()  # of the spaces, in dimensions
            assert (overlap > 16 - 1e-6) == near


def test_a_principal_projection_of_full_rank_loses_nothing():
    scope, batch, draw = _problem(n=30)
    full = principal_projection(scope, scope.start, [batch])
    assert full.rank == 9 * 5 + 6 * 5
    vector = draw(len(scope.start))
    torch.testing.assert_close(full.lift(full.project(vector)), vector)
    small = principal_projection(scope, scope.start, [batch], rank=2)
    assert small.rank == 2 * 2 * 2
    for head, features, other in zip(small.heads, batch, batch[::-1], strict=True):
        torch.testing.assert_close(head.input.T @ head.input, torch.eye(2, dtype=torch.float64))
        right = torch.linalg.svd(features).Vh[:2].T
        torch.testing.assert_close(head.input @ head.input.T, right @ right.T, rtol=1e-7, atol=1e-8)
        number = 1 if other is batch[1] else 0
        embeddings = torch.nn.functional.normalize(other @ scope.split(scope.start)[number], dim=1)
        right = torch.linalg.svd(embeddings).Vh[:2].T
        torch.testing.assert_close(head.output @ head.output.T, right @ right.T, rtol=1e-7, atol=1e-8)
