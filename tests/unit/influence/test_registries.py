"""A solver and a target loss of one's own, from their registration to scores; names that nobody registered."""

import numpy as np
import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.direct import direct_influence
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.newton_step import removal_step
from fiftyone_ecif.influence.objective import ContrastiveLoss, OneByOne, random_partition
from fiftyone_ecif.influence.projected_gradients import keep_gradients
from fiftyone_ecif.influence.roles import parse_role
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scoring import score_pairs
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.influence.solvers import SOLVERS, Solver
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, PairLoss, find_target_loss
from fiftyone_ecif.influence.tower_gradients import tower_gradients
from fiftyone_ecif.progress import result_of
from fiftyone_ecif.store.tables import Store

PAIRS, HELD_OUT = 20, 10


class Twice(Solver):
    """Two of every parameter."""

    name = "twice"
    says = "twice the identity"

    def product(self, objective, theta):
        return lambda vector: 2 * vector


class StoredTwice(Solver):
    """The same, between stored gradients."""

    name = "stored_twice"
    says = "twice the identity between stored gradients"
    solves = False
    needs_gradients = True

    def stored_curvature(self, gradients):
        return 2 * np.eye(next(iter(gradients)).shape[1])


class OwnLogit(PairLoss):
    """How little an image and its own caption have in common."""

    name = "own_logit"
    says = "that captions are near their images"
    unit = "logits"

    def pair_losses(self, scope, images, captions, logits):
        return -logits.diagonal()


@pytest.fixture(autouse=True)
def registered():
    entries = ((SOLVERS, Twice), (SOLVERS, StoredTwice), (TARGET_LOSSES, OwnLogit))
    for registry, entry in entries:
        registry.register(entry)
    yield
    for registry, entry in entries:
        registry.withdraw(entry.name)


class Towers(Scope):
    """A scope that is no head: its gradients are kept in any directions."""

    def __init__(self, heads):
        self.heads, self.start, self.loss = heads, heads.start, heads.loss

    def embed_images(self, theta, images):
        return self.heads.embed_images(theta, images).tanh()

    def embed_captions(self, theta, captions):
        return self.heads.embed_captions(theta, captions).tanh()

    def logits(self, theta, cosine):
        return self.heads.logits(theta, cosine)


class Inputs(OneByOne):
    """Features as the inputs of towers come: a batch at a time."""

    def __init__(self, images, texts, partition):
        self.images, self.texts, self.partition = images, texts, partition

    def __getitem__(self, index):
        rows = self.partition[index]
        return self.images[rows], self.texts[rows]

    def regrouped(self, partition):
        return Inputs(self.images, self.texts, partition)


@pytest.fixture(params=["heads", "towers"])
def problem(request):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    heads = HeadScope(draw(4, 3), draw(3, 3), 3.0)
    scope = heads if request.param == "heads" else Towers(heads)
    kind = FeatureBatches if request.param == "heads" else Inputs
    batches = kind(draw(PAIRS, 4), draw(PAIRS, 3), random_partition(PAIRS, 7, 0))
    held_out = kind(draw(HELD_OUT, 4), draw(HELD_OUT, 3), random_partition(HELD_OUT, 5, 1))
    return scope, batches, held_out


@pytest.fixture
def score(problem):
    scope, batches, held_out = problem
    stores = []

    def run(target_loss, solver, **options):
        stores.append(Store("registries-test", str(len(stores))))
        targets = {"target": find_target_loss(target_loss).make(scope, held_out)}
        return result_of(score_pairs(stores[-1], scope, batches, targets, ScoringOptions(solver=solver, **options)))

    yield run
    Store("registries-test").delete()


def test_a_solver_of_ones_own_scores_pairs(score):
    own, plain = score("contrastive", "twice"), score("contrastive", "identity")
    assert np.abs(plain.positive).min() > 0
    np.testing.assert_allclose(own.positive, plain.positive / 2, rtol=1e-6)
    np.testing.assert_allclose(own.negative, plain.negative / 2, rtol=1e-6)
    assert own.diagnostics["solve_residual"] < 1e-6
    assert own.diagnostics["cached_correlation"] > 0.99  # all directions of so small a scope are kept


def test_a_solver_of_ones_own_works_on_stored_gradients(score):
    own = score("contrastive", "stored_twice", keep_gradients=False)  # which it needs all the same
    plain = score("contrastive", "identity")
    for part, other in ((own.positive, plain.positive), (own.negative, plain.negative)):
        np.testing.assert_allclose(part, other / 2, rtol=1e-4, atol=1e-6)
    assert "solve_residual" not in own.diagnostics


def test_a_target_loss_of_ones_own_is_what_pairs_are_scored_on(score, problem):
    scope, batches, held_out = problem

    def loss(theta):
        sides = scope.embed(theta, (held_out.images, held_out.texts))
        return -3 * torch.nn.functional.cosine_similarity(*sides).mean()

    point = scope.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(point), point)
    objective = ContrastiveLoss(scope, batches, PAIRS)
    expected = result_of(direct_influence(objective, scope.start, [gradient], "exact"))
    found = score("own_logit", "identity")
    assert found.diagnostics["target_loss"] == pytest.approx(loss(point).item())
    for part, other in zip((found.positive, found.negative), expected[:2], strict=True):
        assert np.abs(other).min() > 0
        np.testing.assert_allclose(part, other)


def test_names_that_nobody_registered_are_errors_everywhere(score, problem):
    scope, batches, _ = problem
    objective, theta, rows = ContrastiveLoss(scope, batches, PAIRS), scope.start, torch.arange(2)
    tables = Store("registries-test", "unknown")
    levels = {
        "solver": [
            lambda: SOLVERS["lu"],
            lambda: score("contrastive", "lu"),
            lambda: GradientStore(tables, PAIRS, "lu"),
            lambda: result_of(removal_step(objective, theta, rows, "lu")),
        ],
        "target_loss": [lambda: TARGET_LOSSES["lu"], lambda: find_target_loss("lu"), lambda: score("lu", "hessian")],
        "role": [
            lambda: parse_role("lu"),
            lambda: score("contrastive", "hessian", role="lu"),
            lambda: result_of(direct_influence(objective, theta, [theta], "lu")),
            lambda: tower_gradients(scope, theta, batches[0], "lu"),
            lambda: result_of(keep_gradients(GradientStore(tables, PAIRS), objective, theta, {}, "lu")),
        ],
    }
    known = {"solver": "hessian, ggn, logra, identity", "target_loss": "contrastive", "role": "exact, taylor"}
    for noun, calls in levels.items():
        for call in calls:
            with pytest.raises(EcifError, match=rf"^{noun}='lu' is not available\. Use one of {known[noun]}"):
                call()


@pytest.mark.parametrize("solver", ["logra", "identity", "stored_twice"])
def test_a_solver_without_a_curvature_makes_no_step(problem, solver):
    scope, batches, _ = problem
    objective = ContrastiveLoss(scope, batches, PAIRS)
    with pytest.raises(EcifError, match=rf"solver='{solver}' has no curvature to solve with\. Use hessian or ggn"):
        result_of(removal_step(objective, scope.start, torch.arange(2), solver))


def test_a_loss_about_classes_needs_them(problem):
    scope, _, held_out = problem
    with pytest.raises(EcifError, match="target_loss='zero_shot' needs the classes of the target"):
        find_target_loss("zero_shot").make(scope, held_out)
