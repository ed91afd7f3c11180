"""Learning from labels of some pairs which of the others are misaligned, and what to look at next."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, ndtri
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.fusion import normal_scores

_SLOPE = 2.0  # of the first guess, in log odds for a standard deviation of the score
_RIDGE = 10.0  # what a weight costs
_ELSEWHERE = 0.25  # share of the proposals that are drawn from everywhere
_DRAWS = 1000


def first_guess(scores: np.ndarray, noise_rate: float) -> np.ndarray:
    """Probabilities before anything is known, one half at the estimated noise rate, shape ``(N,)``."""
    rate = min(max(noise_rate, 0.02), 0.5)
    guess: np.ndarray = expit(_SLOPE * (normal_scores(scores) - ndtri(1 - rate)))
    return guess


def refit(signals: Mapping[str, np.ndarray], guess: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probability that each pair is misaligned, learned from some, shape ``(N,)``.

    The log odds are a linear function of those of the guess and of the signals,
    with a ridge penalty for being another one than the guess alone, so that few
    labels change little. No weight is below zero: every signal is higher for
    worse pairs, but among pairs that were picked because the guess is in doubt,
    signals that it was made of seem to speak against one another.

    Args:
        signals: scores by detector, shape ``(N,)`` each.
        guess: probabilities before anything was learned, shape ``(N,)``.
        labels: 0, 1, or -1 where nothing is known, shape ``(N,)``.
    """
    start = logit(guess)
    spread = start.std() or 1.0
    columns = [normal_scores(signals[name]) for name in sorted(signals)]
    inputs = np.stack([*columns, (start - start.mean()) / spread, np.ones(len(guess))], axis=1)
    bounds = [(0, None)] * len(signals) + [(-spread, None), (None, None)]  # of what is added to the guess
    ridge = np.array([_RIDGE] * len(signals) + [_RIDGE, 0.1])
    known = labels >= 0
    seen, truth = inputs[known], labels[known]

    def penalised_loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = start[known] + seen @ weights
        loss = (np.logaddexp(0, odds) - truth * odds).sum() + ridge @ weights**2 / 2
        return loss, seen.T @ (expit(odds) - truth) + ridge * weights

    weights = minimize(penalised_loss, np.zeros(len(ridge)), jac=True, method="L-BFGS-B", bounds=bounds).x
    probability: np.ndarray = expit(start + inputs @ weights)
    return probability


def propose(probability: np.ndarray, known: np.ndarray, count: int, seed: int = 0) -> list[int]:
    """Rows to look at next: the most uncertain, and a few from everywhere.

    Args:
        probability: of being misaligned, shape ``(N,)``.
        known: which rows need no look any more, bool, shape ``(N,)``.
        count: how many.
        seed (0): of those from everywhere.

    Raises:
        EcifError: if ``count`` is below 1
    """
    if count < 1:
        raise EcifError(f"count={count} must be at least 1")
    left = np.flatnonzero(~known)
    uncertain = left[np.argsort(np.abs(probability[left] - 0.5), kind="stable")][: round(count * (1 - _ELSEWHERE))]
    others = np.setdiff1d(left, uncertain)
    drawn = np.random.default_rng(seed).permutation(others)[: count - len(uncertain)]
    return [int(row) for row in (*uncertain, *drawn)]


def held_out_auroc(
    signals: Mapping[str, np.ndarray], guess: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """AUROC on the labelled pairs, each judged by a fit to others, with a bootstrap interval."""
    known = np.flatnonzero(labels >= 0)
    truth, judged = labels[known], np.empty(len(known))
    folds = StratifiedKFold(min(5, int(np.bincount(truth).min())), shuffle=True, random_state=seed)
    for _, held in folds.split(known, truth):
        others = labels.copy()
        others[known[held]] = -1
        judged[held] = refit(signals, guess, others)[known[held]]
    generator = np.random.default_rng(seed)
    draws = [generator.integers(len(truth), size=len(truth)) for _ in range(_DRAWS)]
    values = [roc_auc_score(truth[rows], judged[rows]) for rows in draws if 0 < truth[rows].sum() < len(rows)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(roc_auc_score(truth, judged)), float(low), float(high)
