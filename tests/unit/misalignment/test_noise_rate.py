"""Estimates of the noise rate on mixtures whose rate is known."""

import numpy as np
import pytest

from fiftyone_ecif.misalignment.noise_rate import share_of_upper_mode, share_that_fits_like_random


def shares(rate, pairs, seed=0):
    """What misaligned and aligned pairs look like: uniform, and near one."""
    random = np.random.default_rng(seed)
    wrong = random.random(pairs) < rate
    return np.where(wrong, random.random(pairs), random.beta(30, 1, pairs))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.4, 0.9])
def test_the_share_of_uniform_values_is_found(rate):
    found = [share_that_fits_like_random(shares(rate, 4000, seed)) for seed in range(20)]
    assert np.mean([one.rate for one in found]) == pytest.approx(rate, abs=0.02)
    assert np.mean([one.low <= rate <= one.high for one in found]) >= 0.8  # of 95 %
    assert all(0 <= one.low <= one.rate <= one.high <= 1 for one in found)


def test_the_interval_narrows_with_more_pairs():
    widths = [one.high - one.low for one in (share_that_fits_like_random(shares(0.3, n)) for n in (200, 20_000))]
    assert widths[1] < widths[0] / 5


def test_no_noise_is_about_none():
    assert share_that_fits_like_random(shares(0, 4000)).high < 0.03
    few = share_that_fits_like_random(np.ones(10))
    assert few[:2] == (0, 0)
    assert few.high > 0.5  # ten pairs do not tell


def test_nothing_but_noise_is_all_and_no_more():
    assert share_that_fits_like_random(np.zeros(10)) == (1, 1, 1)
    found = share_that_fits_like_random(shares(1, 4000))
    assert found.rate > 0.85
    assert found.high <= 1


def test_a_seed_fixes_the_interval():
    scores = np.random.default_rng(0).normal(size=300)
    assert share_of_upper_mode(scores, 3) == share_of_upper_mode(scores, 3)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_the_weight_of_the_upper_of_two_clear_modes_is_found(rate):
    random = np.random.default_rng(0)
    wrong = random.random(1500) < rate
    scores = np.where(wrong, random.normal(5, 1, 1500), random.normal(-5, 1, 1500))
    found = share_of_upper_mode(scores)
    assert found.rate == pytest.approx(wrong.mean(), abs=0.01)
    assert found.low <= wrong.mean() <= found.high
    assert found.high - found.low < 0.1
    lower = share_of_upper_mode(-scores)
    assert lower.rate == pytest.approx(1 - wrong.mean(), abs=0.01)


def test_a_part_of_many_pairs_is_enough():
    random = np.random.default_rng(0)
    scores = np.concatenate([random.normal(5, 1, 3000), random.normal(-5, 1, 9000)])
    assert share_of_upper_mode(scores).rate == pytest.approx(0.25, abs=0.03)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_handful_of_scores_or_equal_ones_is_no_error():
    for scores in (np.array([0.0, 1.0]), np.zeros(40)):
        rate, low, high = share_of_upper_mode(scores)
        assert 0 <= low <= high <= 1
        assert 0 <= rate <= 1
