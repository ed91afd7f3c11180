"""Detectors of misaligned pairs against their formulas written out, and against real refits."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from weakref import ref

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import softplus

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.head_gradients import HeadProjection
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import KroneckerProjection
from fiftyone_ecif.misalignment import cross_fitting, embeddings, gathering, neighbour_influence, signals
from fiftyone_ecif.misalignment.canonical import canonical_heads
from fiftyone_ecif.misalignment.cross_fitting import refit_held_out
from fiftyone_ecif.misalignment.detection import run_detectors
from fiftyone_ecif.misalignment.detectors import DETECTORS, Detector
from fiftyone_ecif.misalignment.duplicates import Duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs, EmbeddingSpace
from fiftyone_ecif.misalignment.evidence import CANONICAL
from fiftyone_ecif.misalignment.neighbours import Neighbours
from fiftyone_ecif.progress import Progress, result_of

PAIRS, WRONG = 120, 24
each_kind = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])


def make_objective(kind="softmax", pairs=PAIRS, wrong=WRONG, batch_size=40, seed=0, copies=True, proximal=1.0):
    """Image and caption features of scenes, the last captions swapped among themselves, and heads near the right ones.

    Pair 1 is a copy of pair 0, pair 3 has the image of pair 2, pair 5 the caption of pair 4, but for a trifle.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    to_image, to_text = draw(5, 6), draw(5, 5)
    scenes = draw(10, 5)[torch.arange(pairs) % 10] + 0.4 * draw(
        pairs, 5
    )  # ten kinds, so that neighbours know something
    order = torch.arange(pairs)
    order[pairs - wrong :] = order[pairs - wrong :].roll(1)
    images = torch.cat([scenes @ to_image + 0.2 * draw(pairs, 6), torch.ones(pairs, 1)], dim=1)
    texts = (scenes @ to_text)[order] + 0.2 * draw(pairs, 5)
    image, caption = np.arange(pairs), np.arange(pairs)
    if copies:
        for side, row, like in ((images, 1, 0), (texts, 1, 0), (images, 3, 2), (texts, 5, 4)):
            side[row] = side[like] * (1 + 1e-3 * draw(side.shape[1]))  # nearly, so that none is as near as another
        image[[1, 3]], caption[[1, 5]] = [0, 2], [0, 4]
    heads = torch.cat([torch.linalg.pinv(to_image), torch.zeros(1, 5)]), torch.linalg.pinv(to_text)
    heads = [head + 0.1 * draw(*head.shape) for head in heads]
    loss, bias = (SoftmaxLoss(), 0.0) if kind == "softmax" else (SigmoidLoss(), -3.0)
    scope = HeadScope(*heads, 6.0, bias, loss)
    batches = FeatureBatches(images, texts, random_partition(pairs, batch_size, seed))
    return ContrastiveLoss(scope, batches, pairs, proximal), Duplicates(image, caption)


def fitted(objective, start=None):
    *_, (theta, _) = minimise(objective, 1e-6, start=start)
    return theta


@cache
def inputs(kind="softmax", **options):
    """Of fitted heads, with gradients in all directions, so that none of them is lost."""
    objective, duplicates = make_objective(kind, **options)
    scope, theta = objective.scope, fitted(objective)
    eyes = [HeadProjection(torch.eye(w).double(), torch.eye(d).double()) for w, d in scope.shapes]
    projection = KroneckerProjection(scope, *eyes)
    positive, negative = np.empty((2, objective.pairs, projection.rank))
    for rows, batch in zip(objective.batches.partition, objective.batches, strict=True):
        positive[rows], negative[rows] = (part.numpy() for part in projection.removal_gradients(theta, batch))
    curvature = projection.curvature(lambda v: objective.hessian_product(theta, v), theta).numpy()
    return DetectorInputs(
        objective, theta, duplicates, CachedGradients(positive, negative, curvature, len(positive)), seed=3
    )


@cache
def findings(kind="softmax", **options):
    wanted = [name for name in DETECTORS if name != "global_influence"]
    return result_of(run_detectors(inputs(kind, **options), wanted))


def alone(name, of):
    return result_of(run_detectors(of, [name])).scores[name]


def units(of, theta=None):
    """Unit embeddings of images and captions in float64, from the weights."""
    scope, batches = of.objective.scope, of.batches
    heads = scope.split(of.theta if theta is None else theta)
    rows = [features.double() @ head for features, head in zip((batches.images, batches.texts), heads, strict=True)]
    return [(side / side.norm(dim=1, keepdim=True)).numpy() for side in rows]


def nearest_others(side, group, n, count):
    others = [m for m in range(len(side)) if group[m] != group[n]]
    return sorted(others, key=lambda m: -(side[n] @ side[m]))[:count]


def lemon_terms(u, v, group, count):
    d = [1 - u[n] @ v[n] for n in range(len(u))]
    terms = []
    for near, other in ((u, v), (v, u)):
        terms.append(
            [
                np.mean(
                    [
                        (1 - other[n] @ other[m]) * math.exp(-0.1 * (1 - near[n] @ near[m])) * math.exp(-5 * d[m])
                        for m in nearest_others(near, group, n, count)
                    ]
                )
                for n in range(len(u))
            ]
        )
    return np.array([d, *terms])


def standard(values):
    return (values - np.mean(values)) / np.std(values)


def log_sum_exp(values):
    return math.log(sum(math.exp(value) for value in values))


def logits(of):
    u, v = units(of)
    bias = -3.0 if of.objective.scope.loss.name == "sigmoid" else 0.0
    return 6 * u @ v.T + bias


def own_loss(similarity, n, rows, kind):
    if kind == "sigmoid":
        return math.log1p(math.exp(-similarity[n, n]))
    row, column = [similarity[n, m] for m in rows], [similarity[m, n] for m in rows]
    return log_sum_exp(row) + log_sum_exp(column) - 2 * similarity[n, n]


def removal_gradients(of, kind):
    """Of the pair's own loss and of all that goes when the pair goes, by autograd, a pair at a time."""
    objective = of.objective
    own, whole = np.empty((2, objective.pairs, len(of.theta)))
    for rows, batch in zip(objective.batches.partition, objective.batches, strict=True):
        for place, row in enumerate(rows.tolist()):
            theta = of.theta.clone().requires_grad_()
            similarity = objective.scope.similarity(theta, batch)
            losses = objective.scope.loss.pair_losses(similarity)
            keep = torch.arange(len(rows)) != place
            left = objective.scope.loss.pair_losses(similarity[keep][:, keep]).sum()
            loss = softplus(-similarity[place, place]) if kind == "sigmoid" else losses[place]
            own[row] = torch.autograd.grad(loss, theta, retain_graph=True)[0].numpy()
            whole[row] = torch.autograd.grad(losses.sum() - left, theta)[0].numpy()
    return own, whole


def hessian(of):
    objective = of.objective

    def plain(at):
        losses = [objective.scope.loss.pair_losses(objective.scope.similarity(at, b)).sum() for b in of.batches]
        offset = at - objective.scope.start
        return sum(losses) / objective.pairs + objective.proximal / 2 * offset @ offset

    return torch.autograd.functional.hessian(plain, of.theta).numpy()


def test_clip_score_is_one_minus_the_cosine():
    u, v = units(inputs())
    np.testing.assert_allclose(
        findings().scores["clip_score"], [1 - a @ b for a, b in zip(u, v, strict=True)], atol=1e-5
    )


@each_kind
def test_neg_clip_loss_leaves_false_negatives_out(kind):
    of = inputs(kind)
    similarity, expected = logits(of), np.zeros(PAIRS)
    image, caption = of.duplicates.image, of.duplicates.caption
    for number in range(10):
        for rows in random_partition(PAIRS, 40, 3 + number):
            for n in rows.tolist():
                fair = [m for m in rows.tolist() if m == n or (image[m] != image[n] and caption[m] != caption[n])]
                row, column = [similarity[n, m] for m in fair], [similarity[m, n] for m in fair]
                expected[n] += ((log_sum_exp(row) + log_sum_exp(column)) / 2 - similarity[n, n]) / 10
    np.testing.assert_allclose(findings(kind).scores["neg_clip_loss"], expected, atol=1e-4)


def test_lemon_and_its_standardised_form():
    of = inputs()
    group, (u, v) = of.duplicates.pair, units(of)
    d, a, b = lemon_terms(u, v, group, 30)
    np.testing.assert_allclose(findings().scores["lemon"], d + 5 * a + 5 * b, atol=1e-5)
    d, a, b = lemon_terms(u, v, group, 5)
    np.testing.assert_allclose(findings().scores["lemon_z"], standard(d) + standard(a) + standard(b), atol=1e-4)


def test_deep_knn_compares_captions_of_alike_images():
    of = inputs()
    u, v = units(of)
    expected = [np.mean([1 - v[n] @ v[m] for m in nearest_others(u, of.duplicates.pair, n, 30)]) for n in range(PAIRS)]
    np.testing.assert_allclose(findings().scores["deep_knn"], expected, atol=1e-5)


@each_kind
def test_losses_and_influences_equal_explicit_gradients(kind):
    of, scores = inputs(kind), findings(kind).scores
    similarity = logits(of)
    loss = np.empty(PAIRS)
    for rows in of.batches.partition:
        for n in rows.tolist():
            loss[n] = own_loss(similarity, n, rows.tolist(), kind)
    np.testing.assert_allclose(scores["loss"], loss, atol=1e-4)
    own, whole = removal_gradients(of, kind)
    curvature = hessian(of)
    influence = np.array([a @ np.linalg.solve(curvature, b) for a, b in zip(own, whole, strict=True)]) / PAIRS
    np.testing.assert_allclose(scores["self_influence"], influence, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(scores["loo_loss"], loss + influence, atol=1e-4)

    damped = curvature + np.trace(curvature) / len(curvature) * np.eye(len(curvature))
    u, v = units(of)
    expected = np.zeros(PAIRS)
    for gradients in (own, whole):
        solved = np.linalg.solve(damped, gradients.T).T
        for n in range(PAIRS):
            near = [m for side in (u, v) for m in nearest_others(side, of.duplicates.pair, n, 30)]
            lengths = np.linalg.norm(solved[n]) * np.linalg.norm(gradients[near], axis=1)
            expected[n] -= np.mean(gradients[near] @ solved[n] / lengths)
    np.testing.assert_allclose(scores["neighbour_influence"], expected, atol=1e-6)


@each_kind
def test_loo_loss_is_the_loss_after_fitting_without_the_pair(kind):
    of, predicted = inputs(kind), findings(kind).scores["loo_loss"]
    rows = torch.arange(0, PAIRS, 8)
    actual = []
    for row in rows:
        theta = fitted(of.objective.without(row[None]), of.theta)
        u, v = units(of, theta)
        mates = next(batch for batch in of.batches.partition if row in batch).tolist()
        bias = -3.0 if kind == "sigmoid" else 0.0
        actual.append(own_loss(6 * u @ v.T + bias, int(row), mates, kind))
    before = findings(kind).scores["loss"][rows]
    assert np.corrcoef(predicted[rows], actual)[0, 1] > 0.99
    assert np.corrcoef(predicted[rows] - before, actual - before)[0, 1] > 0.95
    assert np.abs(predicted[rows] - actual).mean() < 0.5 * np.abs(before - actual).mean()


@pytest.fixture
def fits(monkeypatch):
    """The objectives that detectors fit."""
    seen = []

    def spy(objective, *arguments):
        seen.append(objective)
        return minimise(objective, *arguments)

    monkeypatch.setattr(cross_fitting, "minimise", spy)
    return seen


def rows_of(objective):
    return torch.cat(list(objective.batches.partition)).sort().values.tolist()


@each_kind
def test_cross_fit_is_a_refit_without_each_fold(kind, fits, monkeypatch):
    monkeypatch.setattr(cross_fitting, "_TOLERANCE", 1e-6)
    of = inputs(kind)
    found = result_of(refit_held_out(of))
    held = [sorted(set(range(PAIRS)) - set(rows_of(objective))) for objective in fits]
    assert len(held) == 5
    assert sorted(row for fold in held for row in fold) == list(range(PAIRS))
    for fold, objective in zip(held, fits, strict=True):
        left = of.batches.regrouped([batch[~torch.isin(batch, torch.tensor(fold))] for batch in of.batches.partition])
        same = ContrastiveLoss(of.objective.scope, left, PAIRS - len(fold), of.objective.proximal)
        theta = fitted(same)
        assert same.loss(theta).item() == pytest.approx(objective.loss(theta).item())
        u, v = units(of, theta)
        np.testing.assert_allclose(found[fold], standard(1 - (u * v).sum(1)[fold]), atol=2e-3)
    np.testing.assert_allclose(findings(kind).scores["cross_fit"], found, atol=0.1)


def test_copies_of_a_pair_are_never_fitted_when_one_of_them_is_held_out(fits):
    of = inputs()
    group = np.arange(PAIRS) // 3  # three of each
    result_of(refit_held_out(replace(of, duplicates=Duplicates(group, group))))
    assert len(fits) == 5
    for objective in fits:
        assert (np.bincount(group[rows_of(objective)]) % 3 == 0).all()


def misaligned():
    return np.arange(PAIRS) >= PAIRS - WRONG


@each_kind
def test_misaligned_pairs_are_more_suspicious(kind):
    scores = findings(kind).scores
    assert set(scores) == set(DETECTORS) - {"global_influence"}
    for name, found in scores.items():
        assert found.shape == (PAIRS,)
        assert found.dtype == np.float64
        assert np.isfinite(found).all()
        # the nearest images alone say little of a model that tells kinds apart so badly
        assert roc_auc_score(misaligned(), found) > (0.52 if (kind, name) == ("sigmoid", "deep_knn") else 0.75), name


@each_kind
def test_the_default_is_ahead_of_the_others_and_says_how_far_to_trust_it(kind):
    of = inputs(kind, pairs=600, wrong=120)
    found = result_of(
        run_detectors(replace(of, gradients=None), ["calibrated", "clip_score", "neg_clip_loss", "lemon_z"])
    )
    wrong = np.arange(600) >= 480
    aurocs = {name: roc_auc_score(wrong, scores) for name, scores in found.scores.items()}
    assert max(aurocs, key=aurocs.get) == "calibrated"
    told = found.judgement
    assert told.rate.low <= 0.2 <= told.rate.high
    assert told.power["random"] == pytest.approx(aurocs["calibrated"], abs=0.06)
    assert roc_auc_score(wrong, told.probability) == pytest.approx(aurocs["calibrated"], abs=1e-3)


def test_two_neighbour_searches_and_a_fit_a_fold_are_all(monkeypatch):
    seen = {"nearest": 0, "minimise": 0}
    for name in seen:
        original = getattr(gathering, name)

        def spy(*arguments, name=name, original=original):
            seen[name] += 1
            return original(*arguments)

        monkeypatch.setattr(gathering, name, spy)
    result_of(gathering.gather_evidence(inputs()))
    assert seen == {"nearest": 2, "minimise": 5}


def test_signals_of_a_fold_are_by_heads_that_have_not_seen_it(monkeypatch):
    fitted_rows = []

    def spy(objective, *arguments):
        fitted_rows.append(set(rows_of(objective)))
        return minimise(objective, *arguments)

    monkeypatch.setattr(gathering, "minimise", spy)
    of = inputs()
    evidence = result_of(gathering.gather_evidence(of))
    group = of.duplicates.pair
    for number, rows in enumerate(fitted_rows):
        inside = np.flatnonzero(evidence.fold == number)
        assert not {int(group[row]) for row in rows} & {int(group[row]) for row in inside}
        assert len(rows) + len(inside) == PAIRS


def test_captions_that_are_all_the_same_are_an_error():
    nothing = np.zeros(PAIRS, dtype=int)
    with pytest.raises(EcifError, match="captions are the same"):
        result_of(gathering.gather_evidence(replace(inputs(), duplicates=Duplicates(np.arange(PAIRS), nothing))))


class Brevity(Detector):
    """Short captions are suspicious."""

    name = "brevity"
    says = "the caption is short"

    def score(self, inputs, found):
        return np.arange(inputs.objective.pairs) % 7


class Doubt(Detector):
    """Takes long, and reads what others found, one of whom may not be there."""

    name = "doubt"
    says = "others doubt"
    needs = ("neighbour_influence", "brevity")
    refits = True

    def score(self, inputs, found):
        yield Progress("Refitting", 0, 1)
        return torch.tensor(sum(found.scores[name] for name in self.needs if name in found.scores))


@pytest.fixture
def added():
    for detector in (Brevity, Doubt):
        DETECTORS.register(detector)
    yield
    for detector in (Brevity, Doubt):
        DETECTORS.withdraw(detector.name)


def test_a_detector_is_added_in_one_place(added):
    assert "brevity" in DETECTORS
    assert "| brevity | the caption is short |" in DETECTORS.table()
    scores = result_of(run_detectors(inputs(), ["brevity", "clip_score"])).scores
    assert scores["brevity"].dtype == np.float64
    np.testing.assert_array_equal(scores["brevity"], np.arange(PAIRS) % 7)


@pytest.mark.parametrize("trained", [True, False])
def test_what_a_detector_needs_comes_first(added, trained):
    of = inputs() if trained else replace(inputs(), gradients=None)
    stages = [step.stage for step in run_detectors(of, ["doubt", "clip_score"])]
    scores = result_of(run_detectors(of, ["doubt", "clip_score"])).scores
    assert stages == sorted(stages)  # all that compares, then all that refits
    assert set(scores) == {"brevity", "clip_score", "doubt"} | set(["neighbour_influence"] * trained)
    harm = findings().scores["neighbour_influence"] if trained else 0
    np.testing.assert_allclose(scores["doubt"], harm + scores["brevity"])


def test_an_unknown_detector_is_said_with_those_that_are_known():
    with pytest.raises(EcifError, match=r"^detector='magic' is not available\. Use one of calibrated, .*_influence$"):
        result_of(run_detectors(inputs(), ["clip_score", "magic"]))


def test_the_names_of_detectors_are_read_without_torch():
    """Forms and ``--help`` read them."""
    code = """if True:
        import sys
        from fiftyone_ecif.misalignment.detectors import DETECTORS
        assert DETECTORS.table()
        assert not {"torch", "open_clip", "fiftyone", "scipy"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_detector_says_what_it_is():
    for name, detector in DETECTORS.items():
        assert detector.name == name
        assert detector.says
        assert type(detector).__doc__
        assert set(detector.needs) <= set(DETECTORS) - {name}


def test_global_influence_is_minus_the_influence():
    given = np.linspace(-1, 1, PAIRS) ** 3
    np.testing.assert_array_equal(alone("global_influence", replace(inputs(), influence=given)), -given)
    with pytest.raises(EcifError, match="needs a target"):
        alone("global_influence", inputs())


def test_a_model_that_never_saw_the_pairs_is_asked_only_what_it_knows(fits):
    of = replace(inputs(), gradients=None, theta=inputs().objective.scope.start)
    names = [name for name in DETECTORS if not DETECTORS[name].refits]
    simple = result_of(run_detectors(of, names))
    assert set(simple.scores) == {name for name in names if not DETECTORS[name].needs_training}
    assert fits == []


def test_heads_in_closed_form_are_made_twice_the_second_time_mostly_of_pairs_that_are_not_suspicious(monkeypatch):
    made = []

    def watched(images, texts, weights, ridge):
        made.append((images, weights, ridge * len(images) / images.shape[1]))
        return canonical_heads(images, texts, weights, ridge)

    monkeypatch.setattr(gathering, "canonical_heads", watched)
    given = inputs()
    found = result_of(run_detectors(given, ["calibrated"]))
    folds = len(made) // 2
    assert [ridge for *_, ridge in made] == pytest.approx([made[0][-1]] * len(made))  # by pairs to a feature
    assert all((weights == 1).all() for _, weights, _ in made[:folds])
    weights = torch.cat([weights for _, weights, _ in made[folds:]]).numpy()
    pairs = len(found.scores["calibrated"])  # each is in the heads of all folds but its own
    np.testing.assert_allclose(np.sort(weights), np.repeat(np.linspace(0, 1, pairs), folds - 1), atol=1e-6)
    score = {row.tobytes(): score for row, score in zip(given.batches.images[:].float().numpy(),
                                                        found.judgement.score, strict=True)}  # fmt: skip
    of_each = [score[row.tobytes()] for images, *_ in made[folds:] for row in images.numpy()]
    assert np.corrcoef(weights, of_each)[0, 1] < -0.8


def test_features_are_freed_before_pairs_are_measured(monkeypatch):
    alive, directions, measure = [], gathering._directions, signals.PairSpace.measure

    def watched(features):
        found = directions(features)
        alive.append(ref(found))
        return found

    def measured(space, image, caption):
        assert [found for found in alive if found() is not None] == []
        return measure(space, image, caption)

    monkeypatch.setattr(gathering, "_directions", watched)
    monkeypatch.setattr(signals.PairSpace, "measure", measured)
    result_of(run_detectors(inputs(), ["calibrated"]))
    assert len(alive) == 2  # of images and of captions


def test_embeddings_are_held_once(monkeypatch):
    spaces, start = [], signals.PairSpace.__init__

    def watched(space, *of):
        assert [found for found in spaces if found() is not None] == []
        spaces.append(ref(space))
        start(space, *of)

    monkeypatch.setattr(signals.PairSpace, "__init__", watched)
    result_of(run_detectors(inputs(), ["calibrated"]))
    assert len(spaces) > 10  # of the weights as loaded, of refits, and of heads in closed form twice


def test_many_rows_in_parts_are_as_few(monkeypatch):
    for module in (embeddings, neighbour_influence):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(signals, "_ROWS", 7)
    again = result_of(run_detectors(replace(inputs()), [name for name in findings().scores if name in DETECTORS]))
    for name, expected in findings().scores.items():
        if name != "calibrated":  # which goes by ranks
            np.testing.assert_allclose(again.scores[name], expected, atol=2e-3, err_msg=name)
    by_rank = np.array([name.startswith(CANONICAL) for name in again.evidence.names])  # of suspicion are these weighed
    for found, expected in (
        (again.evidence.pairs, findings().evidence.pairs),
        (again.evidence.decoys, findings().evidence.decoys),
    ):
        np.testing.assert_allclose(found[:, ~by_rank], expected[:, ~by_rank], atol=2e-3)
        for one, other in zip(found[:, by_rank].T, expected[:, by_rank].T, strict=True):
            assert np.corrcoef(one, other)[0, 1] > 0.9999


@pytest.mark.parametrize(("pairs", "batch_size"), [(2, 2), (3, 2), (4, 4), (20, 10)], ids=lambda value: str(value))
@each_kind
def test_a_handful_of_pairs(kind, pairs, batch_size):
    found = findings(kind, pairs=pairs, wrong=0, batch_size=batch_size, copies=False)
    for name, values in found.scores.items():
        assert values.shape == (pairs,), name
        assert np.isfinite(values).all(), name
    assert 0 <= found.judgement.rate.low <= found.judgement.rate.high <= 1


def test_a_pair_without_a_gradient_says_nothing():
    gradients = np.eye(4, 3, dtype=np.float32)  # the last is zero
    near = [torch.tensor([[1, 3], [0, 3], [0, 3], [0, 1]])]
    found = neighbour_influence.neighbour_influence(gradients, np.eye(3), near)
    np.testing.assert_allclose(found, np.zeros(4), atol=1e-7)
    same = neighbour_influence.neighbour_influence(np.ones((4, 3), np.float32), np.eye(3), near)
    np.testing.assert_allclose(same, np.ones(4), rtol=1e-6)


def test_fewer_neighbours_than_wanted_are_used_as_they_are():
    space = EmbeddingSpace(torch.eye(3), torch.eye(3), torch.arange(3))
    near = space.neighbours
    assert isinstance(near[0], Neighbours)
    assert near[0].rows.shape == near[1].rows.shape == (3, 2)
    a, b = space.disagreement(5)
    expected = math.exp(-0.1)  # at distance one of neighbours that fit
    torch.testing.assert_close(a, torch.full((3,), expected))
    torch.testing.assert_close(b, torch.full((3,), expected))
