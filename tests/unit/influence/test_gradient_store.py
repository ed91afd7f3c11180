"""Influence from stored gradients against the formulas with an inverse, written out."""

import shutil

import numpy as np
import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.damping import damped
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.gradient_store import (
    GradientStore,
    MatchRows,
    MissingRowsError,
    PairRows,
    TargetRows,
    target_mistakes,
)
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import BasisProjection
from fiftyone_ecif.influence.solvers import LoGra
from fiftyone_ecif.store.tables import Store

each_shape = pytest.mark.parametrize(
    ("pairs", "rank", "targets", "dtype"), [(9, 4, 3, float), (5, 7, 1, float), (1, 1, 2, float), (9, 4, 3, np.float32)]
)


def make_cached(pairs=9, rank=4, dtype=float, seed=0):
    random = np.random.default_rng(seed)
    root = random.normal(size=(rank, rank + 2))
    positive, negative = random.normal(size=(2, pairs, rank)).astype(dtype)
    return CachedGradients(positive, negative, root @ root.T + 0.1 * np.eye(rank), pairs), random


@each_shape
def test_scores_equal_the_formulas(pairs, rank, targets, dtype):
    cached, random = make_cached(pairs, rank, dtype)
    target = random.normal(size=(targets, rank))
    inverse = np.linalg.inv(cached.curvature)
    positive, negative = cached.influence(target)
    relative, lengths, own = cached.relative_influence(target), cached.lengths, cached.self_influence()
    assert positive.shape == negative.shape == relative.shape == (targets, pairs)
    for n in range(pairs):
        g_positive, g_negative = cached.positive[n].astype(float), cached.negative[n].astype(float)
        both = g_positive + g_negative
        length = np.sqrt(both @ inverse @ both)
        assert lengths[n] == pytest.approx(length, rel=1e-5)
        # its own loss is the positive role; what it does to the model are both
        assert own[n] == pytest.approx(g_positive @ inverse @ both / pairs, rel=1e-5, abs=1e-6)
        for m in range(targets):
            assert positive[m, n] == pytest.approx(target[m] @ inverse @ g_positive / pairs, rel=1e-5, abs=1e-6)
            assert negative[m, n] == pytest.approx(target[m] @ inverse @ g_negative / pairs, rel=1e-5, abs=1e-6)
            expected = target[m] @ inverse @ both / pairs / length
            assert relative[m, n] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_double_precision_is_kept():
    cached, random = make_cached()
    target = random.normal(size=(3, 4))
    expected = target @ np.linalg.inv(cached.curvature) @ cached.positive.T / 9
    np.testing.assert_allclose(cached.influence(target)[0], expected, rtol=1e-10, atol=1e-12)


def test_a_pair_that_does_nothing_has_no_influence():
    cached, random = make_cached()
    cached.positive[2] = cached.negative[2] = 0
    cached.negative[3] = -cached.positive[3]
    relative = cached.relative_influence(random.normal(size=(3, 4)))
    assert np.isfinite(relative).all()
    assert (relative[:, 2:4] == 0).all()
    assert (relative[:, 4] != 0).all()


def test_duplicates_have_the_same_scores():
    cached, random = make_cached()
    cached.positive[1], cached.negative[1] = cached.positive[0], cached.negative[0]
    target = random.normal(size=(3, 4))
    for scores in (*cached.influence(target), cached.relative_influence(target)):
        np.testing.assert_allclose(scores[:, 0], scores[:, 1], rtol=1e-12)
    assert cached.self_influence()[0] == pytest.approx(cached.self_influence()[1])


def test_a_full_space_gives_what_direct_mode_gives():
    """From the pairs to their scores once through the whole engine, both ways."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    scope = HeadScope(draw(4, 2), draw(3, 2), 3.0)
    batches = FeatureBatches(draw(6, 4), draw(6, 3), random_partition(6, 3, 0))
    objective = ContrastiveLoss(scope, batches, 6, 2.0)
    theta, size = scope.start, len(scope.start)
    projection = BasisProjection(scope, torch.linalg.qr(draw(size, size)).Q)
    parts = [projection.removal_gradients(theta, batch) for batch in batches]
    positive, negative = (torch.cat(role).numpy() for role in zip(*parts, strict=True))
    curvature = projection.curvature(lambda v: objective.gauss_newton_product(theta, v), theta).numpy()
    targets = draw(2, size)
    found = CachedGradients(positive, negative, curvature, len(positive)).influence(projection.project(targets).numpy())

    matrix = torch.stack([objective.gauss_newton_product(theta, row) for row in torch.eye(size).double()])
    for number, target in enumerate(targets):
        solution = torch.linalg.solve(matrix, target)
        direct = [batch_influence(scope, theta, batch, solution, 6) for batch in batches]
        for part, role in zip(found, zip(*direct, strict=True), strict=True):
            np.testing.assert_allclose(part[number], torch.cat(role).numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("pairs", "rank"), [(9, 4), (3, 6), (1, 1)])
def test_the_covariance_is_damped_by_a_tenth_of_its_mean_eigenvalue(pairs, rank):
    cached, _ = make_cached(pairs, rank)
    covariance = np.zeros((rank, rank))
    for n in range(pairs):
        gradient = cached.positive[n] + cached.negative[n]
        covariance += np.outer(gradient, gradient) / pairs
    gradients = cached.positive + cached.negative
    found = LoGra().stored_curvature([gradients[:1], gradients[1:]])
    mean = np.linalg.eigvalsh(covariance).mean()
    np.testing.assert_allclose(found, covariance + 0.1 * mean * np.eye(rank))
    assert np.linalg.eigvalsh(found)[0] > 0.09 * mean
    half = LoGra().stored_curvature([gradients.astype(np.float16)])
    assert half.dtype == np.float64
    np.testing.assert_allclose(half, found, rtol=1e-2, atol=1e-2 * mean)


@pytest.mark.parametrize("least", [-3.0, -0.5, -1e-4, 0.0])
def test_a_matrix_that_is_not_positive_is_mended_by_the_least_power_of_two(least):
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(5, 5)))[0]
    values = np.array([least, 1.0, 2.0, 3.0, 10.0])
    matrix = basis @ np.diag(values) @ basis.T
    mean = values.mean()
    damping = next(2.0**k for k in range(-10, 20) if least + 2.0**k * mean > 1e-6 * mean)
    np.testing.assert_allclose(damped(matrix), matrix + damping * mean * np.eye(5), atol=1e-10)
    np.linalg.cholesky(damped(matrix))


def test_a_positive_matrix_is_left_as_it_is():
    cached, _ = make_cached()
    np.testing.assert_array_equal(damped(cached.curvature), cached.curvature)


def test_a_matrix_that_no_damping_mends_is_an_error():
    for matrix in (np.zeros((3, 3)), np.diag([1.0, -1.0])):
        with pytest.raises(EcifError, match="not usable"):
            damped(matrix)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_is_an_error(value):
    with pytest.raises(EcifError, match="not usable"):
        damped(np.diag([1.0, value]))


def test_damping_is_added_before_anything_is_mended():
    matrix = np.diag([1.0, 2.0, 3.0])
    np.testing.assert_allclose(damped(matrix, 0.5), matrix + 0.5 * 2.0 * np.eye(3))
    np.testing.assert_allclose(damped(matrix), matrix)


PARTS = (slice(0, 4), slice(4, 9), slice(9, 11))


@pytest.fixture
def stored():
    """Gradients in the tables of a store, in three parts and shuffled, and the same in memory."""
    cached, random = make_cached(11, 4, np.float32)
    images, losses = random.normal(size=(11, 3)).astype(np.float32), random.normal(size=11)
    store = Store("cached-test")
    order = random.permutation(11)
    for part in PARTS:
        rows = order[part]
        columns = {"row": rows, "batch": 0 * rows, "image": images[rows], "cosine": losses[rows], "loss": losses[rows]}
        columns |= {"positive": cached.positive[rows], "negative": cached.negative[rows]}
        store.table("gradients").write(f"{part.start:09d}", columns)
    store.table("projected-curvature").write("hessian", {"matrix": cached.curvature})
    yield store, cached, random.normal(size=(3, 4)), (order, images, losses)
    store.delete()


def test_part_by_part_is_as_all_at_once(stored):
    tables, cached, targets, (_, images, losses) = stored
    store = GradientStore(tables, 11)
    whole = store.load()
    np.testing.assert_array_equal(whole.positive, cached.positive)
    np.testing.assert_array_equal(whole.curvature, cached.curvature)
    positive, negative = cached.influence(targets)
    np.testing.assert_allclose(store.influence(targets), positive + negative, rtol=1e-4)
    np.testing.assert_allclose(store.influence(targets, ["positive"]), positive, rtol=1e-4)
    effects = store.effects()
    np.testing.assert_allclose(effects.length, cached.lengths)
    np.testing.assert_allclose(effects.own, cached.self_influence())
    np.testing.assert_allclose(store.similarity(images[:2]), images[:2] @ images.T, rtol=1e-5, atol=1e-6)
    for found, expected in zip(store.columns("negative", "loss"), (cached.negative, losses), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_one_pair_is_as_among_all(stored):
    tables, cached, targets, (_, images, _) = stored
    store = GradientStore(tables, 11)
    for row in (0, 7, 10):
        image, positive, negative = store.pair(row, "image", "positive", "negative")
        np.testing.assert_array_equal(image, images[row])
        found = store.influence_of(positive + negative, targets)
        np.testing.assert_allclose(found, sum(cached.influence(targets))[:, row], rtol=1e-5)
    assert store.pair(11, "image") is None


def test_what_is_written_lies_where_earlier_runs_have_it(stored):
    tables, cached, _, (order, images, losses) = stored
    other = Store("cached-test", "other")
    store = GradientStore(other, 11)
    for part in PARTS:
        batches = [order[part][:1], order[part][1:]]
        store.write_pairs(
            part.start,
            [
                PairRows(r, 0 * r, images[r], losses[r], losses[r], cached.positive[r], cached.negative[r])
                for r in batches
            ],
        )
    store.write_curvature(cached.curvature)
    assert store.written() == {0, 4, 9}
    store.effects()
    assert other.table("effects").parts() == ["hessian-0.0"]
    for name in ("gradients", "projected-curvature"):
        found, expected = (
            {path.name: path.read_bytes() for path in s.table(name).folder.iterdir()} for s in (other, tables)
        )
        assert found == expected


def test_parameters_and_directions_are_given_back():
    tables = Store("cached-test")
    store = GradientStore(tables, 3)
    assert store.parameters() is None
    assert store.directions() is None
    try:
        store.write_parameters(np.arange(4.0), 0.5)
        store.write_directions({"image-input": np.eye(2), "basis": np.ones((3, 1))})
        theta, norm = store.parameters()
        np.testing.assert_array_equal(theta, np.arange(4.0))
        assert norm == 0.5
        assert tables.table("projection").parts() == ["basis", "image-input", "whole"]
        assert sorted(store.directions()) == ["basis", "image-input"]
        (tables.table("projection").folder / "whole.h5").unlink()  # as of a run that was killed on the way
        assert store.directions() is None
    finally:
        tables.delete()


def test_a_target_is_read_in_order_and_whole_or_not_at_all():
    tables, random = Store("cached-test"), np.random.default_rng(0)
    rows = TargetRows(
        np.array([2, 0, 1]), random.normal(size=(3, 2)), random.normal(size=3), np.array([1, 0, 1], bool), np.eye(3)
    )
    wrong, cosine = np.array([[0, 1], [2, 2], [0, 0]]), random.normal(size=(3, 2))
    matches = MatchRows(rows.row, wrong, cosine + 1, wrong[::-1], cosine)
    store = GradientStore(tables, 5)

    def write(start, chosen):
        parts = [[type(columns)(*(column[chosen] for column in columns))] for columns in (rows, matches)]
        store.write_target("target-a", start, *parts)

    try:
        write(8, slice(2))
        assert store.matches("target-a", 3) is None
        with pytest.raises(MissingRowsError, match="lacks some of 3 pairs"):
            store.target("target-a", 3)
        write(0, slice(2, None))
        assert store.written("target-a") == {0, 8}
        for found, column in zip(store.target("target-a", 3), rows, strict=True):
            np.testing.assert_array_equal(found, column[[1, 2, 0]])
        for found, column in zip(store.matches("target-a", 3), matches, strict=True):
            np.testing.assert_array_equal(found, column[[1, 2, 0]])
        shutil.rmtree(tables.table("target-a-matches").folder)  # as of a run of before they were kept
        assert store.matches("target-a", 3) is None
        assert store.written("target-a") == set()
        assert target_mistakes(tables, ["target-a"]).sum() == 2
        with pytest.raises(MissingRowsError, match="lacks a target"):
            target_mistakes(tables, ["target-a", "target-b"])
    finally:
        tables.delete()


def test_the_covariance_of_a_store_is_that_of_its_gradients(stored):
    tables, cached, _, _ = stored
    expected = LoGra().stored_curvature([cached.positive + cached.negative])
    np.testing.assert_allclose(GradientStore(tables, 11, "logra").curvature(), expected, rtol=1e-6)
    np.testing.assert_array_equal(GradientStore(tables, 11, "identity").curvature(), np.eye(4))


def test_a_curvature_that_is_not_there_is_an_error(stored):
    with pytest.raises(EcifError, match="The curvature of solver='ggn' is not in the store"):
        GradientStore(stored[0], 11, "ggn").curvature()


def test_a_store_that_lacks_some_pairs_gives_no_numbers(stored):
    tables, _, targets, _ = stored
    (tables.table("gradients").folder / "000000004.h5").unlink()
    store = GradientStore(tables, 11)
    for read in (lambda: store.influence(targets), store.effects):
        with pytest.raises(MissingRowsError, match="lacks the gradients of 5 of 11 pairs"):
            read()
    with pytest.raises(MissingRowsError, match="lacks some of 11 pairs"):
        store.load()
