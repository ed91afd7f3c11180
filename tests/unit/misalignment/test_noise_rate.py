"""The share of wrong pairs from decoys, where it is known."""

import numpy as np
import pytest
from scipy.stats import norm

from fiftyone_ecif.misalignment.noise_rate import TOO_WIDE, Mixture, NoiseRate

APART = 3.0
PRIOR = (0.8, 0.15, 0.05)


def scores(rate, pairs=3000, seed=0, apart=APART):
    """Log odds of normal scores, right pairs around 0 and wrong ones around ``apart``."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(pairs) < rate
    found = generator.normal(size=pairs) + apart * wrong
    decoys = [generator.normal(size=pairs) + apart * nearer for nearer in (1.0, 0.8, 0.6)]
    return found, wrong, decoys


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.4])
def test_the_interval_holds_the_truth_and_the_rate_is_near_it(rate):
    for seed in range(3):
        found, wrong, decoys = scores(rate, seed=seed)
        told = Mixture(found, decoys, PRIOR).rate
        assert told.low <= wrong.mean() <= told.high
        assert abs(told.rate - wrong.mean()) < 0.03 + 0.2 * rate


def test_the_probability_is_bayes_where_the_decoys_are_what_is_wrong():
    found, wrong, decoys = scores(0.2, pairs=20_000)
    mixture = Mixture(found, decoys, (1.0, 0.0, 0.0))
    density = 0.2 * norm.pdf(found - APART)
    expected = density / (density + 0.8 * norm.pdf(found))
    np.testing.assert_allclose(mixture.probability(found), expected, atol=0.1)
    assert abs(mixture.probability(found).mean() - wrong.mean()) < 0.02


def test_the_probability_rises_with_the_score():
    found, _, decoys = scores(0.2)
    probability = Mixture(found, decoys, PRIOR).probability(np.sort(found))
    assert (np.diff(probability) >= 0).all()
    assert 0 <= probability.min() < probability.max() <= 1


def test_where_decoys_look_like_pairs_nothing_is_told():
    found, _, decoys = scores(0.2, pairs=300, apart=0.2)
    told = Mixture(found, decoys, PRIOR).rate
    assert not told.told
    assert "cannot be told" in str(told)


def test_labels_narrow_it_down_however_they_were_chosen():
    found, wrong, decoys = scores(0.4, pairs=400, apart=1.5)
    mixture = Mixture(found, decoys, PRIOR)
    before = mixture.rate
    chosen = np.argsort(np.abs(mixture.probability(found) - 0.5))[:100]
    mixture.learn(found[chosen], wrong[chosen])
    after = mixture.rate
    assert after.high - after.low < 0.8 * (before.high - before.low)
    assert after.low <= 0.4 <= after.high


def test_no_labels_change_nothing():
    found, _, decoys = scores(0.2)
    mixture = Mixture(found, decoys, PRIOR)
    before = mixture.rate
    mixture.learn(np.empty(0), np.empty(0, dtype=bool))
    assert mixture.rate == pytest.approx(before)


def test_scores_that_do_not_vary_are_no_error():
    told = Mixture(np.ones(20), [np.ones(20)] * 3, PRIOR).rate
    assert 0 <= told.low <= told.rate <= told.high <= 1


def test_it_says_what_it_means():
    assert str(NoiseRate(0.2, 0.1, 0.3)) == "About 20% of the captions are wrong (10% to 30%)"
    assert not NoiseRate(0.2, 0.0, TOO_WIDE).told


def test_what_is_expected_can_change_and_what_was_said_stays():
    found, wrong, decoys = scores(0.2, apart=1.5)
    changed, other = Mixture(found, decoys, PRIOR), Mixture(found, decoys, (0, 0, 1))
    for mixture in (changed, other):
        mixture.learn(found[:40], wrong[:40])
    assert changed.rate != other.rate
    changed.expect((0, 0, 3))
    np.testing.assert_allclose(changed.rate, other.rate)
    np.testing.assert_allclose(changed.probability(found), other.probability(found))


def test_labels_against_all_that_is_likely_leave_numbers():
    found, _, decoys = scores(0.0, pairs=20_000)
    mixture = Mixture(found, decoys, (1.0, 0.0, 0.0))
    chosen = np.argsort(found)[:3000]
    with np.errstate(over="raise", invalid="raise"):
        mixture.learn(found[chosen], np.ones(len(chosen), dtype=bool))
    assert np.isfinite(mixture.rate).all()
