"""The formulas against brute force over shapes, batch sizes, duplicates, temperatures and precisions.

Hypothesis draws the cases, the same ones each time, and shrinks what fails.
"""

import gc

import numpy as np
import open_clip
import psutil
import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradient_store import make_cached

from fiftyone_ecif import devices
from fiftyone_ecif.influence.curvature import gauss_newton_at, hessian_at
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.head_gradients import HeadProjection, removal_gradients
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.newton_step import group_gradient
from fiftyone_ecif.influence.objective import ContrastiveLoss, partition_without, random_partition
from fiftyone_ecif.influence.tower_gradients import tower_gradients
from fiftyone_ecif.misalignment import neighbours
from fiftyone_ecif.misalignment.neighbours import nearest
from fiftyone_ecif.misalignment.ranks import ranked
from fiftyone_ecif.models.tower_scope import TowerScope

LOSSES = {"softmax": (SoftmaxLoss(), 0.0), "sigmoid": (SigmoidLoss(), -2.0)}
kinds = st.sampled_from(sorted(LOSSES))
seeds = st.integers(0, 2**31 - 1)
temperatures = st.sampled_from([0.01, 1.0, 10.0, 100.0, 1000.0])


def cases(examples):
    """The same examples each time, however long one takes."""
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)


def normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def batches(draw, least=1):
    """Image and caption features of a batch in which some images and captions are there more than once."""
    count = draw(st.integers(least, 9))
    copies = st.lists(st.integers(0, count - 1), min_size=count, max_size=count)
    random = normal(draw(seeds))
    images, texts = random(count, draw(st.integers(1, 6))), random(count, draw(st.integers(1, 6)))
    which = draw(st.sampled_from(["none", "images", "captions", "pairs"]))
    rows = torch.tensor(draw(copies)) if which != "none" else torch.arange(count)
    return images if which == "captions" else images[rows], texts if which == "images" else texts[rows]


@st.composite
def head_scopes(draw, batch):
    """Heads that fit a batch's features."""
    random, (loss, bias) = normal(draw(seeds)), LOSSES[draw(kinds)]
    width = draw(st.integers(2, 5))
    heads = [random(side.shape[1], width) for side in batch]
    return HeadScope(*heads, draw(temperatures), bias, loss, draw(st.booleans()))


def removed(loss, similarity, n):
    """What pair ``n`` adds to the loss of its batch, and the part that is its own."""
    keep = [k for k in range(len(similarity)) if k != n]
    whole = loss.pair_losses(similarity).sum() - loss.pair_losses(similarity[keep][:, keep]).sum()
    own = torch.nn.functional.softplus(-similarity[n, n]) if loss.name == "sigmoid" else loss.pair_losses(similarity)[n]
    return own, whole - own


def removal_by_autograd(scope, theta, batch):
    """Gradients of both roles of every pair, one after another, ``(n, p)`` each."""
    point = theta.clone().requires_grad_()
    similarity = scope.similarity(point, batch)
    rows = [
        [torch.autograd.grad(part, point, retain_graph=True)[0] for part in removed(scope.loss, similarity, n)]
        for n in range(len(similarity))
    ]
    return tuple(torch.stack(side) for side in zip(*rows, strict=True))


def assert_near(found, expected, tolerance):
    """Equal but for rounding, in units of the largest entry that either role has."""
    size = max(1.0, *(part.abs().max().item() for part in expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * size)


@cases(100)
@given(st.data(), batches(), st.sampled_from([torch.float64, torch.float32]))
def test_removal_tangents_are_the_derivative_of_the_removal(data, batch, dtype):
    scope = data.draw(head_scopes(batch))
    similarity = scope.similarity(scope.start, batch).to(dtype)
    direction = normal(data.draw(seeds))(*similarity.shape).to(dtype)
    found = scope.loss.removal_tangents(similarity, direction)
    point = similarity.double().requires_grad_()
    expected = [
        [
            (torch.autograd.grad(part, point, retain_graph=True)[0] * direction).sum()
            for part in removed(scope.loss, point, n)
        ]
        for n in range(len(point))
    ]
    expected = torch.tensor(expected, dtype=torch.float64).T
    assert_near(found, expected, 1e-8 if dtype == torch.float64 else 1e-4)


@cases(60)
@given(st.data(), batches())
def test_head_gradients_are_those_of_the_removal(data, batch):
    scope = data.draw(head_scopes(batch))
    eyes = [HeadProjection(*(torch.eye(size, dtype=torch.float64) for size in shape)) for shape in scope.shapes]
    assert_near(
        removal_gradients(scope, scope.start, batch, tuple(eyes)), removal_by_autograd(scope, scope.start, batch), 1e-8
    )


@cases(30)
@given(st.data(), batches())
def test_tower_gradients_without_an_error_are_those_of_the_removal(data, batch):
    scope = data.draw(head_scopes(batch))
    found, _ = tower_gradients(scope, scope.start, batch, tolerance=0.0)
    assert_near(found, removal_by_autograd(scope, scope.start, batch), 1e-8)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    vision = {"image_size": 8, "layers": 1, "width": 8, "patch_size": 4, "head_width": 4}
    text = {"context_length": 4, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=4, vision_cfg=vision, text_cfg=text, init_logit_bias=-2.0).eval().double()


@cases(5)
@given(data=st.data(), count=st.integers(1, 5), kind=kinds, seed=seeds)
def test_tower_gradients_of_a_whole_model(tiny, data, count, kind, seed):
    scope = TowerScope(tiny, [name for name, _ in tiny.named_parameters()], LOSSES[kind][0])
    random = normal(seed)
    batch = random(count, 3, 8, 8), torch.from_numpy(np.random.default_rng(seed).integers(1, 20, (count, 4)))
    theta = scope.start + 0.05 * random(len(scope.start))
    found, _ = tower_gradients(scope, theta, batch, tolerance=0.0)
    assert_near(found, removal_by_autograd(scope, theta, batch), 1e-8)


@cases(30)
@given(st.data(), batches())
def test_influence_is_the_gradient_along_the_solution(data, batch):
    scope = data.draw(head_scopes(batch))
    solution, pairs = normal(data.draw(seeds))(len(scope.start)), data.draw(st.integers(1, 50))
    found = batch_influence(scope, scope.start, batch, solution, pairs)
    expected = [gradients @ solution / pairs for gradients in removal_by_autograd(scope, scope.start, batch)]
    assert_near(found, expected, 1e-8)


@cases(50)
@given(
    pairs=st.integers(1, 12),
    rank=st.integers(1, 8),
    targets=st.integers(1, 4),
    dtype=st.sampled_from([np.float64, np.float32]),
    seed=seeds,
)
def test_stored_gradients_give_what_a_dense_solve_gives(pairs, rank, targets, dtype, seed):
    cached, random = make_cached(pairs, rank, dtype, seed)
    target_pairs = random.normal(size=(targets, rank))
    inverse = np.linalg.inv(cached.curvature)
    positive, negative = cached.positive.astype(float), cached.negative.astype(float)
    both = positive + negative
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if dtype == np.float64 else {"rtol": 1e-3, "atol": 1e-3}
    for found, gradients in zip(cached.influence(target_pairs), (positive, negative), strict=True):
        np.testing.assert_allclose(found, target_pairs @ inverse @ gradients.T / pairs, **tolerance)
    lengths = np.sqrt(np.einsum("nr,rs,ns->n", both, inverse, both))
    np.testing.assert_allclose(cached.lengths, lengths, **tolerance)
    np.testing.assert_allclose(
        cached.relative_influence(target_pairs), target_pairs @ inverse @ both.T / pairs / lengths, **tolerance
    )
    np.testing.assert_allclose(
        cached.self_influence(), np.einsum("nr,rs,ns->n", positive, inverse, both) / pairs, **tolerance
    )


@st.composite
def objectives(draw):
    """Pairs in batches of any size and the loss over them."""
    count, seed = draw(st.integers(2, 14)), draw(seeds)
    random, (loss, bias) = normal(seed), LOSSES[draw(kinds)]
    widths, width = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(st.integers(2, 4))
    heads = [random(side, width) for side in widths]
    scope = HeadScope(*heads, draw(st.sampled_from([0.01, 1.0, 10.0, 100.0])), bias, loss, draw(st.booleans()))
    copies = torch.tensor(draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count)))
    images, texts = random(count, widths[0]), random(count, widths[1])[copies]
    partition = random_partition(count, draw(st.integers(1, count)), seed)
    return ContrastiveLoss(scope, FeatureBatches(images, texts, partition), count, draw(st.sampled_from([0.0, 0.5])))


class Similarity(torch.nn.Module):
    """The similarity matrix of a batch, as curvlinops takes a model."""

    def __init__(self, scope):
        super().__init__()
        self.scope, self.theta = scope, torch.nn.Parameter(scope.start.clone())

    def forward(self, batch):
        return self.scope.similarity(self.theta, (batch["images"], batch["texts"]))


class Loss(torch.nn.MSELoss):
    """The loss of a batch; curvlinops asks for one that says how it reduces."""

    def __init__(self, objective):
        super().__init__(reduction="sum")
        self.objective = objective

    def forward(self, similarity, _):
        return self.objective.scope.loss.pair_losses(similarity).sum() / self.objective.pairs


@cases(20)
@given(objectives(), seeds, st.sampled_from([0, 10_000, devices._KEPT_ON_CPU]))
def test_curvature_products_are_those_of_curvlinops(objective, seed, kept):
    scope = objective.scope
    vector = normal(seed)(len(scope.start))
    data = [({"images": images, "texts": texts}, torch.zeros(len(images))) for images, texts in objective.batches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_KEPT_ON_CPU", kept)  # nothing of the batches, some or all
        hessian, ggn = (at(objective, scope.start) for at in (hessian_at, gauss_newton_at))
    for operator, product in (
        (HessianLinearOperator, lambda v: objective.hessian_product(scope.start, v)),
        (HessianLinearOperator, hessian),
        (GGNLinearOperator, lambda v: objective.gauss_newton_product(scope.start, v)),
        (GGNLinearOperator, ggn),
    ):
        model = Similarity(scope)
        matrix = operator(
            model,
            Loss(objective),
            list(model.parameters()),
            data,
            check_deterministic=False,
            batch_size_fn=lambda batch: len(batch["images"]),
        )
        expected = matrix @ vector + objective.proximal * vector
        assert_near([product(vector)], [expected.detach()], 1e-9)


def test_graphs_go_with_the_product_that_they_were_made_for():
    draw = normal(0)
    images, texts = draw(256, 64), draw(256, 64)
    scope = HeadScope(draw(64, 32), draw(64, 32), 5.0)
    objective = ContrastiveLoss(scope, FeatureBatches(images, texts, [torch.arange(256)]), 256)
    process, resident = psutil.Process(), []
    for rounds in (10, 50):
        for _ in range(rounds):
            hessian_at(objective, scope.start)
            gauss_newton_at(objective, scope.start)
        gc.collect()
        resident.append(process.memory_info().rss / 2**20)
    assert resident[1] - resident[0] < 20  # each holds some 2 MiB


@cases(50)
@given(st.data(), objectives())
def test_the_gradient_of_a_group_is_what_the_objective_loses_without_it(data, objective):
    rows = st.lists(st.integers(0, objective.pairs - 1), min_size=1, max_size=objective.pairs - 1, unique=True)
    group = torch.tensor(data.draw(rows))
    point = objective.scope.start.clone().requires_grad_()
    total = point.sum() * 0
    for batch in objective.batches.partition:
        left = torch.tensor([row for row in batch.tolist() if row not in group.tolist()], dtype=torch.long)
        for sign, members in ((1, batch), (-1, left)):
            if len(members):
                images, texts = objective.batches.images[members], objective.batches.texts[members]
                losses = objective.scope.loss.pair_losses(objective.scope.similarity(point, (images, texts)))
                total = total + sign * losses.sum() / objective.pairs
    (expected,) = torch.autograd.grad(total, point)
    assert_near([group_gradient(objective, objective.scope.start, group)], [expected], 1e-9)


@cases(100)
@given(st.data(), st.integers(1, 60), seeds)
def test_partitions_hold_every_pair_once_and_lose_only_what_is_taken(data, pairs, seed):
    size = data.draw(st.integers(1, pairs))
    partition = random_partition(pairs, size, seed)
    sizes = [len(batch) for batch in partition]
    assert sorted(torch.cat(partition).tolist()) == list(range(pairs))
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    taken = data.draw(st.sets(st.integers(0, pairs - 1)))
    left = partition_without(partition, torch.tensor(sorted(taken), dtype=torch.long))
    expected = [[row for row in batch.tolist() if row not in taken] for batch in partition]
    assert [batch.tolist() for batch in left] == [batch for batch in expected if batch]


@cases(60)
@given(
    rows=st.integers(2, 30),
    width=st.integers(2, 5),
    count=st.integers(1, 40),
    groups=st.integers(2, 30),
    blocks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    copies=st.booleans(),
    seed=seeds,
)
def test_neighbours_are_those_of_the_whole_matrix(rows, width, count, groups, blocks, copies, seed):
    embeddings = normal(seed)(rows, width).float()
    if copies:  # as many near as far, none of them the row itself
        embeddings = embeddings[torch.arange(rows) % max(rows // 2, 2)]
    group = torch.arange(rows) % groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(neighbours._BLOCK, "cpu", blocks)
        found = nearest(embeddings, count, group)
    units = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    cosine = (units @ units.T).masked_fill(group[:, None] == group, -torch.inf)
    possible = int((cosine > -torch.inf).sum(1).min())
    expected = cosine.sort(dim=1, descending=True).values[:, : min(count, possible)]
    torch.testing.assert_close(found.similarity.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine.gather(1, found.rows), expected, rtol=0, atol=1e-6)  # ties may fall either way
    assert all(len(set(row)) == len(row) for row in found.rows.tolist())


@cases(60)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_ranks_count_what_is_below(values):
    scores = np.array(values, dtype=float)
    expected = [(np.sum(scores < score) + (np.sum(scores == score) + 1) / 2) / len(scores) for score in scores]
    np.testing.assert_allclose(ranked(scores), expected)
    np.testing.assert_allclose(ranked(np.exp(scores)), expected)
