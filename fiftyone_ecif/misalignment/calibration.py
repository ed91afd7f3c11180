"""Weighing signals by how well they tell decoys from pairs."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, ndtri

RIDGE = 0.005  # what a weight costs, to the mean loss of a row


class NormalScores:
    """Values as normal scores among reference values, column by column.

    Args:
        reference: shape ``(n, S)``.
    """

    def __init__(self, reference: np.ndarray) -> None:
        self._sorted = np.sort(reference, axis=0)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """What the ranks would be drawn from a standard normal distribution, shape of the values, float32."""
        scores = np.empty(values.shape, dtype=np.float32)
        count = len(self._sorted)
        for column, known in enumerate(self._sorted.T):
            place = sum(np.searchsorted(known, values[:, column], side) for side in ("left", "right")) / 2
            scores[:, column] = ndtri(np.clip(place / count, 0.5 / count, 1 - 0.5 / count))
        return scores


def fit_weights(signals: np.ndarray, wrong: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A logistic regression of what is wrong on signals, with a ridge and no weight below zero.

    The pairs that are not known to be wrong hold some that are. That changes the height of the
    odds, not their order (Elkan and Noto 2008; Menon et al. 2015).

    Args:
        signals: normal scores, shape ``(n, S)``.
        wrong: whether a row is known to be wrong, shape ``(n,)``.
        share: how much a row counts, shape ``(n,)``.

    Returns:
        the weight of each signal and, last, the constant; shape ``(S + 1,)``
    """
    share = share / share.sum()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = signals @ weights[:-1] + weights[-1]
        value = share @ (np.logaddexp(0, odds) - wrong * odds) + RIDGE * (weights[:-1] @ weights[:-1])
        slope = share * (expit(odds) - wrong)
        return value, np.append(signals.T @ slope + 2 * RIDGE * weights[:-1], slope.sum())

    start = np.append(np.full(signals.shape[1], 0.1), -1.0)
    bounds = [(0, None)] * signals.shape[1] + [(None, None)]
    found: np.ndarray = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return found
