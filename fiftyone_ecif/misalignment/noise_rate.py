"""How many captions are wrong, estimated without labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from sklearn.mixture import GaussianMixture

_LEVEL = 0.1
_MIXTURE_DRAWS, _MIXTURE_PAIRS = 50, 5000


class NoiseRate(NamedTuple):
    """An estimated share of misaligned pairs.

    Attributes:
        rate: in [0, 1].
        low: of its 95 % interval, which knows of chance only and not of the estimator's bias.
        high: likewise.
    """

    rate: float
    low: float
    high: float


def share_that_fits_like_random(share_below: np.ndarray) -> NoiseRate:
    """The share of captions that fit their image no better than a random one would.

    A misaligned pair is as similar as a random image and caption, so the share of
    random others that are less similar is uniform for it; for an aligned pair it
    is near 1. The count below a low level therefore tells how many are misaligned
    (Storey's estimator of the share of true nulls, 2002, at level 0.1). Swaps
    between captions that resemble each other are not random, so the estimate is
    then too low.

    Args:
        share_below: for each pair, the share of random others that fit no better,
            by a model that was not trained on the pair; shape ``(N,)``.
    """
    below = int((share_below <= _LEVEL).sum())
    interval = binomtest(below, len(share_below)).proportion_ci(method="wilson")
    rates = (share / _LEVEL for share in (below / len(share_below), interval.low, interval.high))
    return NoiseRate(*(float(min(rate, 1.0)) for rate in rates))


def share_of_upper_mode(scores: np.ndarray, seed: int = 0) -> NoiseRate:
    """The weight of the higher of two normal distributions that scores are a mixture of.

    For models that were trained on the pairs as a whole: they know misaligned
    pairs by heart, so nothing looks like random. Rough: two modes are found also
    where there is one.

    Args:
        scores: higher = more suspicious, shape ``(N,)``.
        seed (0): of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    size = min(len(scores), _MIXTURE_PAIRS)
    first = GaussianMixture(2, n_init=3, random_state=0).fit(generator.choice(scores, size, replace=False)[:, None])
    weights = []
    for _ in range(_MIXTURE_DRAWS):
        again = GaussianMixture(2, means_init=first.means_, random_state=0)
        weights.append(_upper_weight(again.fit(generator.choice(scores, size)[:, None])))
    low, high = np.quantile(weights, [0.025, 0.975])
    return NoiseRate(_upper_weight(first), float(low), float(high))


def _upper_weight(mixture: GaussianMixture) -> float:
    return float(mixture.weights_[mixture.means_.ravel().argmax()])
