"""How many captions are wrong, and how probably each: without labels, from decoys.

A score is known for the pairs and for decoys, which are wrong. If a share ``r`` of the pairs is wrong and
their scores are distributed as the decoys', then ``decoys / pairs``, as densities, is ``h / r``, where ``h``
is the probability that a pair of that score is wrong; it cannot grow beyond ``1 / r``, and where it stops
growing is what tells ``r`` (mixture proportion estimation: Blanchard, Lee and Scott 2010). With ``h`` a
logistic function of the score this is a logistic regression of decoys against pairs with one more
parameter (Ward et al. 2009).

What decoys the wrong pairs resemble is not known for sure, so each kind stands for a hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

#: Width of an interval from which on a rate is not told.
TOO_WIDE = 0.4
_RATES = np.concatenate([[0.002, 0.005], np.arange(1, 61) / 100])
DOUBT = 3.0  # how much less probable high rates are beforehand: (1 - r) to this power
_LEAST = 0.01  # what is no more than this is 0
_BINS = 40
TEMPER = 5.0  # what likelihoods are divided by, as the logistic form is not exact
_SLOPE_PENALTY = 0.01
_LEVEL = 0.025  # of each end of an interval
_NEGLIGIBLE = 1e-4  # weight of a hypothesis that is left out


class NoiseRate(NamedTuple):
    """An estimated share of misaligned pairs.

    Attributes:
        rate: its mean, in [0, 1].
        low: of its 95 % interval, over what kinds of mistakes there may be too.
        high: likewise.
    """

    rate: float
    low: float
    high: float

    def unbounded(self) -> NoiseRate:
        """The same where there may be any number of wrong pairs more that are not seen."""
        return self._replace(high=max(self.high, self.low + TOO_WIDE, float(_RATES[-1])))

    @property
    def told(self) -> bool:
        """Whether the interval is narrow enough to say anything."""
        return self.high - self.low < TOO_WIDE

    def __str__(self) -> str:
        if self.told:
            return f"About {self.rate:.0%} of the captions are wrong ({self.low:.0%} to {self.high:.0%})"
        return f"How many captions are wrong cannot be told: {self.low:.0%} to {self.high:.0%} may be"


class Mixture:
    """What is known of the share of wrong pairs and of each pair, by the scores of pairs and of decoys.

    Args:
        scores: of the pairs, higher = more suspicious, shape ``(N,)``.
        decoys: of each kind of decoys.
        prior: of each kind.
    """

    def __init__(self, scores: np.ndarray, decoys: Sequence[np.ndarray], prior: Sequence[float] | np.ndarray) -> None:
        self._spread = float(np.concatenate([scores, *decoys]).std()) or 1.0
        fits = [_profile(scores / self._spread, kind / self._spread) for kind in decoys]
        width = np.gradient(_RATES) * (1 - _RATES) ** DOUBT
        weights = [np.exp((likelihood - likelihood.max()) / TEMPER) * width for likelihood, _ in fits]
        self._of_rates = np.stack([weight / weight.sum() for weight in weights])
        self._lines = np.concatenate([lines for _, lines in fits])
        self._rates = np.tile(_RATES, len(fits))
        self._said = np.zeros(len(self._rates))  # log likelihood of what a person said
        self.expect(prior)

    def expect(self, prior: Sequence[float] | np.ndarray) -> None:
        """Changes how probable each kind of mistakes is beforehand, in numbers that need not add up to one."""
        weights = (np.asarray(prior)[:, None] * self._of_rates).flatten()
        said = np.where(weights > 0, self._said, -np.inf)
        weights = weights * np.exp(said - said.max())
        self._weights = weights / weights.sum()
        self._prior = prior

    def learn(self, scores: np.ndarray, wrong: np.ndarray) -> None:
        """Takes in what a person said of some pairs, however they were chosen, by Bayes' rule.

        Args:
            scores: of these pairs.
            wrong: whether they are misaligned, shape ``(n,)``.
        """
        for score, bad in zip(scores, wrong, strict=True):
            odds = self._lines @ np.array([1.0, score / self._spread])
            self._said += log_expit(odds if bad else -odds)
        self.expect(self._prior)

    @property
    def rate(self) -> NoiseRate:
        """The share of wrong pairs."""
        order = np.argsort(self._rates, kind="stable")
        below = np.cumsum(self._weights[order])
        low, high = (float(self._rates[order][np.searchsorted(below, at)]) for at in (_LEVEL, 1 - _LEVEL))
        return NoiseRate(float(self._weights @ self._rates), 0.0 if low <= _LEAST else low, high)

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """That each pair is wrong, rising with its score, shape ``(n,)``."""
        total = np.zeros(len(scores))
        for weight, line in zip(self._weights, self._lines, strict=True):
            if weight > _NEGLIGIBLE:
                total += weight * expit(line[0] + line[1] * scores / self._spread)
        probability: np.ndarray = total / self._weights[self._weights > _NEGLIGIBLE].sum()
        return probability


def _profile(scores: np.ndarray, decoys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The likelihood of each rate, and the line that ``logit h`` is of the score there, ``(62,)`` and ``(62, 2)``.

    Scores are binned; the decoys count as many as the pairs.
    """
    both = np.concatenate([scores, decoys])
    edges = np.unique(np.quantile(both, np.linspace(0, 1, _BINS + 1)[1:-1]))
    places = np.searchsorted(edges, both)
    count = np.bincount(places, minlength=len(edges) + 1)
    middle = np.bincount(places, weights=both, minlength=len(count)) / count.clip(1)
    of_pairs = np.bincount(places[: len(scores)], minlength=len(count)).astype(float)
    of_decoys = (count - of_pairs) * len(scores) / len(decoys)
    line, found, lines = np.array([-2.0, 2.0]), [], []
    for rate in _RATES:

        def loss(at: np.ndarray, rate: float = rate) -> tuple[float, np.ndarray]:
            inner = at[0] + at[1] * middle
            odds = log_expit(inner) - np.log(rate)  # that one of this score is a decoy
            value = -(of_decoys * log_expit(odds) + of_pairs * log_expit(-odds)).sum() + _SLOPE_PENALTY * at[1] ** 2
            slope = (of_pairs * expit(odds) - of_decoys * expit(-odds)) * expit(-inner)
            return value, np.array([slope.sum(), slope @ middle + 2 * _SLOPE_PENALTY * at[1]])

        best = minimize(loss, line, jac=True, method="L-BFGS-B", bounds=[(-30, 30), (0, 30)])
        line = best.x
        found.append(-best.fun)
        lines.append(line)
    return np.array(found), np.array(lines)
