"""Equal pairs that are not each other's negatives: every closed form against autograd of loops over what competes."""

import pytest
import torch

from fiftyone_ecif import devices
from fiftyone_ecif.influence.curvature import gauss_newton_at, hessian_at
from fiftyone_ecif.influence.direct import batch_influence, direct_influence
from fiftyone_ecif.influence.head_gradients import HeadProjection, removal_gradients
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss, SparingLoss, equal_pairs, others_equal
from fiftyone_ecif.influence.newton_step import group_gradient, removal_step
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import KroneckerProjection
from fiftyone_ecif.influence.roles import ROLES
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES
from fiftyone_ecif.progress import result_of

PAIRS, WIDTHS, WIDTH = 26, (5, 4), 3
# numbers of image and caption: each image has three captions, some captions belong to two images
TWINS = torch.stack([torch.arange(PAIRS) // 3, torch.arange(PAIRS) % 11], dim=1)
LOSSES = {"softmax": SoftmaxLoss(), "sigmoid": SigmoidLoss()}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(a, b):
    return bool(TWINS[a, 0] == TWINS[b, 0] or TWINS[a, 1] == TWINS[b, 1])


def parts(name, similarity, rows):
    """Each pair's own loss and its share of the batch's, by loops over those that compete."""
    own, shares = [], []
    for i, row in enumerate(rows):
        others = [j for j, other in enumerate(rows) if j != i and not equal(row, other)]
        if name == "softmax":
            images = torch.stack([similarity[i, j] for j in [i, *others]])
            captions = torch.stack([similarity[j, i] for j in [i, *others]])
            own.append(images.logsumexp(0) + captions.logsumexp(0) - 2 * similarity[i, i])
            shares.append(own[-1])
        else:
            against = [torch.log1p(similarity[a].exp()) for j in others for a in ((i, j), (j, i))]
            own.append(torch.log1p((-similarity[i, i]).exp()))
            shares.append(own[-1] + sum(against, torch.zeros(())) / 2)
    return torch.stack(own), torch.stack(shares)


def roles(name, similarity, rows):
    """Both roles of each pair: its own loss, and all else that goes when it is taken out."""
    own, shares = parts(name, similarity, rows)
    left = []
    for n in range(len(rows)):
        keep = [k for k in range(len(rows)) if k != n]
        left.append(parts(name, similarity[keep][:, keep], [rows[k] for k in keep])[1].sum())
    return own, shares.sum() - torch.stack(left) - own


@pytest.fixture(params=["softmax", "sigmoid", "with scale"])
def objective(request, monkeypatch):
    monkeypatch.setitem(devices._STACKED, "cpu", 200)  # some batches in twos
    loss = LOSSES.get(request.param, SoftmaxLoss())
    heads = [draw(width, WIDTH, seed=width) for width in WIDTHS]
    scope = HeadScope(*heads, 3.0, -1.0 if loss.name == "sigmoid" else 0.0, loss, request.param == "with scale")
    sides = [draw(PAIRS, width, seed=10 + width).float() for width in WIDTHS]
    batches = FeatureBatches(*sides, random_partition(PAIRS, 9, 0), twins=TWINS)
    return ContrastiveLoss(scope, batches, PAIRS, 0.2)


def by_hand(objective):
    """The objective by loops, as a function of the parameters."""
    scope, batches = objective.scope, objective.batches

    def loss(theta):
        total = objective.proximal / 2 * (theta - scope.start).square().sum()
        for number, rows in enumerate(batches.partition):
            similarity = scope.similarity(theta, batches[number])
            total = total + parts(scope.loss.name, similarity, rows.tolist())[1].sum() / objective.pairs
        return total

    return loss


def away(objective):
    return objective.scope.start + 0.1 * draw(len(objective.scope.start), seed=3)


def test_equal_pairs_meet_in_the_batches(objective):
    met = [others_equal(TWINS, rows) for rows in objective.batches.partition]
    assert sum(found.any().item() for found in met) >= 2
    for found, rows in zip(met, objective.batches.partition, strict=True):
        expected = [[a != b and equal(a, b) for b in rows.tolist()] for a in rows.tolist()]
        assert found.tolist() == expected
        assert equal_pairs(TWINS, rows).diagonal().all()


def test_gradient_and_curvature(objective):
    theta, vector = away(objective), draw(len(objective.scope.start), seed=4)
    expected = by_hand(objective)
    gradient, value = objective.gradient_and_value(theta)
    torch.testing.assert_close(value, expected(theta))
    torch.testing.assert_close(objective.loss(theta), expected(theta))
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(expected, theta))
    hessian = torch.autograd.functional.hessian(expected, theta)
    for found in (hessian_at(objective, theta)(vector), objective.hessian_product(theta, vector)):
        torch.testing.assert_close(found, hessian @ vector)
    torch.testing.assert_close(gauss_newton_at(objective, theta)(vector), objective.gauss_newton_product(theta, vector))
    plain = ContrastiveLoss(
        objective.scope, FeatureBatches(*_sides(objective), objective.batches.partition), PAIRS, objective.proximal
    )
    assert abs(plain.loss(theta) - value) > 1e-3


def _sides(objective):
    return objective.batches.images, objective.batches.texts


def test_gauss_newton(objective):
    """``J^T H J`` with both derivatives by autograd."""
    theta, vector = away(objective), draw(len(objective.scope.start), seed=4)
    scope, total = objective.scope, objective.proximal * vector
    for number, rows in enumerate(objective.batches.partition):
        batch = objective.batches[number]
        jacobian = torch.autograd.functional.jacobian(lambda at, b=batch: scope.similarity(at, b), theta)
        jacobian, size = jacobian.flatten(0, 1), len(rows)
        inner = torch.autograd.functional.hessian(
            lambda flat, r=rows, n=size: parts(scope.loss.name, flat.view(n, n), r.tolist())[1].sum(),
            scope.similarity(theta, batch).flatten(),
        )
        total = total + jacobian.T @ (inner @ (jacobian @ vector)) / objective.pairs
    torch.testing.assert_close(gauss_newton_at(objective, theta)(vector), total)


class AnyScope(Scope):
    """What no closed form is known for, as a scope inside the towers."""

    def __init__(self, of):
        self.start, self.loss = of.start, of.loss
        self.embed_images, self.embed_captions, self.logits = of.embed_images, of.embed_captions, of.logits

    def embed_images(self, theta, images):
        raise NotImplementedError

    embed_captions = logits = embed_images


def test_through_graphs(objective):
    theta, vector = away(objective), draw(len(objective.scope.start), seed=4)
    batches = objective.batches
    deep = ContrastiveLoss(AnyScope(objective.scope), batches, PAIRS, objective.proximal)
    torch.testing.assert_close(deep.gradient_and_value(theta), objective.gradient_and_value(theta))
    for at in (hessian_at, gauss_newton_at):
        torch.testing.assert_close(at(deep, theta)(vector), at(objective, theta)(vector))
    torch.testing.assert_close(deep.gradient_scale(theta), objective.gradient_scale(theta))


@pytest.mark.parametrize("role", ["exact", "positive", "negative"])
def test_influence_and_stored_gradients(objective, role):
    theta, vector, scope = away(objective), draw(len(objective.scope.start), seed=4), objective.scope
    found = result_of(direct_influence(objective, theta, [vector], role))
    eyes = tuple(HeadProjection(*(torch.eye(size, dtype=torch.float64) for size in shape)) for shape in scope.shapes)
    for number, rows in enumerate(objective.batches.partition):
        batch = objective.batches[number]
        stored = removal_gradients(scope, theta, batch, eyes, role)
        at = theta.clone().requires_grad_()
        for place, part in enumerate(roles(scope.loss.name, scope.similarity(at, batch), rows.tolist())):
            for n, row in enumerate(rows.tolist()):
                expected = torch.autograd.grad(part[n], at, retain_graph=True)[0]
                if role == ("negative", "positive")[place]:
                    expected = torch.zeros_like(expected)
                torch.testing.assert_close(stored[place][n], expected)
                assert found[place][0, row] == pytest.approx((expected @ vector).item() / PAIRS, rel=1e-7, abs=1e-12)


def test_curvature_between_stored_gradients(objective):
    theta = away(objective)
    bases = [tuple(torch.linalg.qr(draw(size, 2)).Q for size in shape) for shape in objective.scope.shapes]
    projection = KroneckerProjection(objective.scope, *(HeadProjection(*basis) for basis in bases))
    hessian = torch.autograd.functional.hessian(by_hand(objective), theta)
    lift = torch.stack([projection.project(row) for row in torch.eye(len(theta), dtype=torch.float64)])
    torch.testing.assert_close(projection.hessian(objective, theta), lift.T @ hessian @ lift, rtol=1e-6, atol=1e-8)


def test_removing_a_group(objective):
    theta, gone = away(objective), torch.tensor([3, 9, 4, 16])
    objective.proximal = 20.0  # with which the Hessian is positive here
    left = objective.without(gone)
    whole = torch.autograd.functional.jacobian(by_hand(objective), theta)
    rest = torch.autograd.functional.jacobian(by_hand(left), theta)
    torch.testing.assert_close(group_gradient(objective, theta, gone), whole - rest)
    step = result_of(removal_step(objective, theta, gone, "hessian", tolerance=1e-10)).vector
    torch.testing.assert_close(torch.autograd.functional.hessian(by_hand(left), theta) @ step, whole - rest)


@each_loss
@pytest.mark.parametrize("role", ROLES)
def test_where_no_two_compete_nothing_pulls(loss, role):
    if (loss.name, role) == ("sigmoid", "as_printed"):
        return
    similarity, direction = 5 * draw(4, 4), draw(4, 4, seed=1)
    spared = SparingLoss(loss, ~torch.eye(4, dtype=torch.bool))
    positive, negative = spared.removal_tangents(similarity, direction, role)
    assert not negative.any()
    expected = torch.zeros(4, dtype=torch.float64)
    if loss.name == "sigmoid" and role != "negative":
        expected = -(-similarity.diagonal()).sigmoid() * direction.diagonal()
    torch.testing.assert_close(positive, expected)
    assert spared.curvature(similarity).product(direction).isfinite().all()
    assert spared.pair_losses(similarity).isfinite().all()


@pytest.mark.parametrize("role", ["taylor", "as_printed"])
def test_forms_for_comparison_are_sums_over_what_competes(role):
    rows, direction = [3, 9, 4, 11, 0, 16, 17], draw(7, 7, seed=1)
    similarity = draw(7, 7).requires_grad_()
    spared = SparingLoss(SoftmaxLoss(), others_equal(TWINS, torch.tensor(rows)))
    found = spared.removal_tangents(similarity.detach(), direction, role)[1]
    for n in range(7):
        total = similarity.sum() * 0
        for k in range(7):
            if k == n or equal(rows[n], rows[k]):
                continue
            against = [j for j in range(7) if j == k or not equal(rows[k], rows[j])]
            for scores in (similarity[k], similarity[:, k]):
                share = (scores[n] - torch.stack([scores[j] for j in against]).logsumexp(0)).exp()
                total = total + (share if role == "taylor" else 1 / share)
        expected = (torch.autograd.grad(total, similarity)[0] * direction).sum()
        torch.testing.assert_close(found[n], expected)


@each_loss
def test_a_target_with_the_loss_of_training_spares_them_too(loss):
    heads = [draw(width, WIDTH, seed=width) for width in WIDTHS]
    scope = HeadScope(*heads, 3.0, -1.0 if loss.name == "sigmoid" else 0.0, loss)
    sides = [draw(PAIRS, width, seed=10 + width).float() for width in WIDTHS]
    batches = FeatureBatches(*sides, random_partition(PAIRS, 9, 0), twins=TWINS)
    target = TARGET_LOSSES["contrastive"].make(scope, batches)
    expected = torch.empty(PAIRS, dtype=torch.float64)
    for number, rows in enumerate(batches.partition):
        expected[rows] = parts(loss.name, scope.similarity(scope.start, batches[number]), rows.tolist())[1]
    torch.testing.assert_close(target.losses(scope.start), expected)


@each_loss
def test_one_batch_of_heads_and_its_stack(loss):
    scope = HeadScope(*(draw(width, WIDTH, seed=width) for width in WIDTHS), 3.0, 0.0, loss)
    batch = draw(6, 5, seed=1), draw(6, 4, seed=2), others_equal(TWINS, torch.tensor([3, 9, 4, 11, 0, 1]))
    stack = tuple(torch.stack([side, side]) for side in batch)
    vector = draw(len(scope.start), seed=4)
    for one, two in zip(
        batch_influence(scope, scope.start, batch, vector, 6),
        batch_influence(scope, scope.start, stack, vector, 6),
        strict=True,
    ):
        torch.testing.assert_close(torch.stack([one, one]), two)
