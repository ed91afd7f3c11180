"""What is made of evidence whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fiftyone_ecif.misalignment import judgement
from fiftyone_ecif.misalignment.calibration import NormalScores, fit_weights
from fiftyone_ecif.misalignment.evidence import CANONICAL, FITTED, KINDS, LOADED, WORDS, Evidence
from fiftyone_ecif.misalignment.judgement import judge

PAIRS, FOLDS = 1500, 5
NAMES = tuple(f"{model}:{name}" for model in (LOADED, FITTED, CANONICAL) for name in ("distance", "image_agreement"))
APART = (2.0, 0.0, 0.0, 1.0, 1.5, 0.0)  # how far each signal sees a wrong pair from a right one


def make(rate=0.2, seed=0, apart=APART, pairs=PAIRS):
    generator = np.random.default_rng(seed)
    wrong = generator.random(pairs) < rate
    kind = np.repeat(np.arange(len(KINDS)), pairs)
    nearer = np.array([1.0, 0.7, 0.4])[kind]
    signals = generator.normal(size=(pairs, len(NAMES))) + np.outer(wrong, apart)
    decoys = generator.normal(size=(len(kind), len(NAMES))) + np.outer(nearer, apart)
    fold, decoy_fold = (generator.integers(FOLDS, size=count) for count in (pairs, len(kind)))
    evidence = Evidence(
        NAMES, signals.astype(np.float32), decoys.astype(np.float32), kind, fold, decoy_fold, np.ones(pairs, dtype=bool)
    )
    return evidence, wrong


def test_signals_are_weighed_by_what_they_tell():
    evidence, wrong = make()
    found = judge(evidence)
    assert found.weights["loaded:distance"] > found.weights["canonical:distance"] > 0.2
    assert max(found.weights[name] for name, apart in zip(NAMES, APART, strict=True) if not apart) < 0.1
    best = max(roc_auc_score(wrong, column) for column in evidence.pairs.T)
    ideal = roc_auc_score(wrong, evidence.pairs @ APART)
    assert best + 0.02 < roc_auc_score(wrong, found.score) > ideal - 0.01


def test_the_self_report_is_how_well_wrong_pairs_are_really_found():
    evidence, wrong = make()
    found = judge(evidence)
    assert found.power["random"] == pytest.approx(roc_auc_score(wrong, found.score), abs=0.05)
    assert found.power["random"] > found.power["similar"] > found.power["subtle"] > 0.6


def test_the_rate_and_the_probability():
    evidence, wrong = make()
    found = judge(evidence)
    assert found.rate.low <= wrong.mean() <= found.rate.high
    assert abs(found.probability.mean() - wrong.mean()) < 0.05
    np.testing.assert_array_equal(np.argsort(found.probability, kind="stable"), np.argsort(found.score, kind="stable"))


@pytest.fixture
def any_kind(monkeypatch):
    """Nothing is said of what kind of mistakes there are."""
    monkeypatch.setattr(judgement.KindsOfMistakes, "shares", lambda *_: np.full(len(KINDS), 1 / len(KINDS)))


def test_pairs_that_are_probably_wrong_count_less_among_the_right_ones(any_kind):
    evidence, wrong = make(rate=0.4)
    right = {name: getattr(evidence, name)[~wrong] for name in ("pairs", "fold", "sampled")}
    clean, found = (judge(each).weights["loaded:distance"] for each in (replace(evidence, **right), evidence))
    assert found == pytest.approx(clean, rel=0.15)


def test_subtle_mistakes_are_known_by_what_they_look_like(monkeypatch):
    evidence, wrong = make(rate=0.3)
    subtle = np.random.default_rng(7).choice(np.flatnonzero(evidence.kind == KINDS.index("subtle")), wrong.sum())
    evidence.pairs[wrong] = evidence.decoys[subtle] + 0.01 * np.random.default_rng(8).normal(
        size=(len(subtle), len(NAMES))
    )
    told = judge(evidence).rate.rate
    monkeypatch.setattr(judgement, "SAID", 0.0)
    assert abs(told - wrong.mean()) < abs(judge(evidence).rate.rate - wrong.mean()) - 0.02


def mistakes_like_subtle_decoys():
    """Of the first signal random decoys speak, of the second subtle ones and all mistakes."""
    evidence, wrong = make(apart=np.zeros(len(NAMES)))
    for place, kinds in ((0, ("random", "similar")), (1, ("subtle",))):
        evidence.decoys[np.isin(evidence.kind, [KINDS.index(kind) for kind in kinds]), place] += 3
    evidence.pairs[wrong, 1] += 3
    return evidence, wrong


def test_decoys_that_are_like_the_mistakes_count_more():
    evidence, wrong = mistakes_like_subtle_decoys()
    weights = judge(evidence).weights
    assert weights[NAMES[1]] > 3 * weights[NAMES[0]]
    assert roc_auc_score(wrong, judge(evidence).score) > roc_auc_score(wrong, evidence.pairs[:, 1]) - 0.02


def test_decoys_of_each_kind_count_the_same_where_nothing_is_known_of_the_mistakes(any_kind):
    weights = judge(mistakes_like_subtle_decoys()[0]).weights
    assert weights[NAMES[1]] < 2 * weights[NAMES[0]]


@pytest.mark.filterwarnings("error")
def test_a_review_that_finds_every_pair_wrong():
    evidence, _ = make(pairs=40)
    assert (judge(evidence, np.ones(40, dtype=int)).probability == 1).all()


def test_a_pair_is_judged_by_weights_that_have_not_seen_its_fold():
    evidence, _ = make()
    changed = replace(evidence, pairs=evidence.pairs.copy())
    inside = evidence.fold == 2
    changed.pairs[inside] = np.random.default_rng(1).permutation(changed.pairs[inside])  # other pairs of that fold
    before, after = judge(evidence), judge(changed)
    lookup = {tuple(row): score for row, score in zip(evidence.pairs[inside], before.score[inside], strict=True)}
    for row, score in zip(changed.pairs[inside], after.score[inside], strict=True):
        assert lookup[tuple(row)] == pytest.approx(score, abs=1e-9)


def test_what_weights_say_that_know_the_pairs_by_heart_is_left_out():
    evidence, wrong = make(rate=0.3)
    knows = evidence.pairs.copy()
    knows[wrong, 0] -= APART[0]  # a wrong pair looks right to the weights as loaded, a decoy does not
    found = judge(replace(evidence, pairs=knows, seen=True))
    assert set(found.weights) == {name for name in NAMES if name.startswith(CANONICAL)}
    trusting = judge(replace(evidence, pairs=knows))
    assert roc_auc_score(wrong, found.score) > roc_auc_score(wrong, trusting.score) + 0.1


def test_no_share_is_told_of_pairs_that_weights_were_fitted_to_before_a_review():
    evidence, wrong = make(apart=(0.0, 0.0, 0.0, 0.0, 4.0, 0.0))  # heads without the pair tell well
    assert judge(evidence).rate.told
    knowing = replace(evidence, seen=True)
    found = judge(knowing)
    assert not found.rate.told
    assert found.rate.low == judge(evidence).rate.low
    labels = np.full(PAIRS, -1)
    labels[:100] = wrong[:100]
    assert judge(knowing, labels).rate.told


def test_labels_teach_what_decoys_cannot():
    evidence, wrong = make(apart=(0.5, 0.0, 0.0, 0.0, 0.5, 0.0), rate=0.3)
    real = evidence.pairs.copy()
    real[wrong, 1] += 2.0  # real mistakes show in a signal in which decoys do not
    evidence = replace(evidence, pairs=real)
    labels = np.full(PAIRS, -1)
    chosen = np.random.default_rng(0).permutation(PAIRS)[:750]
    labels[chosen] = wrong[chosen]
    before, after = judge(evidence), judge(evidence, labels)
    left = labels < 0
    gain = roc_auc_score(wrong[left], after.score[left]) - roc_auc_score(wrong[left], before.score[left])
    assert gain > 0.03
    np.testing.assert_array_equal(after.probability[chosen], wrong[chosen])


def test_reasons_are_the_weighted_signals_in_words():
    evidence, _ = make()
    found = judge(evidence)
    words = {reason for reasons in found.reasons if reasons for reason in reasons.split(", ")}
    assert words == {WORDS["distance"], WORDS["image_agreement"]}
    worst, best = found.score.argmax(), found.score.argmin()
    assert found.reasons[worst].split(", ")[0] == WORDS["distance"]
    assert found.reasons[best] is None


def test_pairs_beside_the_sample_are_judged_too():
    evidence, wrong = make()
    beside = np.arange(PAIRS) < 1000
    kept = np.random.default_rng(0).random(len(evidence.decoys)) < 0.6
    part = replace(
        evidence,
        sampled=beside,
        decoys=evidence.decoys[kept],
        kind=evidence.kind[kept],
        decoy_fold=evidence.decoy_fold[kept],
    )
    found = judge(part)
    assert roc_auc_score(wrong[~beside], found.score[~beside]) == pytest.approx(
        roc_auc_score(wrong, judge(evidence).score), abs=0.02
    )


def test_evidence_comes_back_from_its_tables():
    evidence, _ = make(pairs=50)
    tables = evidence.tables()
    again = Evidence.from_tables(evidence.names, tables["pairs"], tables["decoys"], seen=True)
    assert again.seen
    for name in ("pairs", "decoys", "kind", "fold", "decoy_fold", "sampled"):
        np.testing.assert_array_equal(getattr(again, name), getattr(evidence, name))


def test_normal_scores_go_by_the_place_among_the_reference():
    reference = np.arange(100.0)[:, None]
    found = NormalScores(reference)(np.array([[49.5], [-5.0], [500.0], [10.0]]))
    assert found[0, 0] == pytest.approx(0.0, abs=1e-6)
    assert found[1, 0] == -found[2, 0] < -2.5
    assert found[3, 0] == pytest.approx(-1.254, abs=0.01)  # the 10.5th of 100


def test_no_weight_is_below_zero_and_the_loss_is_at_its_minimum():
    generator = np.random.default_rng(0)
    signals = generator.normal(size=(400, 3))
    wrong = (signals @ [1.0, -1.0, 0.0] + generator.normal(size=400) > 0).astype(float)
    weights = fit_weights(signals, wrong, np.ones(400))
    assert weights[0] > 0.3
    assert weights[1] == 0

    def loss(at):
        odds = signals @ at[:-1] + at[-1]
        return np.mean(np.logaddexp(0, odds) - wrong * odds) + 0.005 * at[:-1] @ at[:-1]

    for _ in range(50):
        other = weights + 0.05 * generator.normal(size=4)
        other[:-1] = other[:-1].clip(0)
        assert loss(other) >= loss(weights) - 1e-7
