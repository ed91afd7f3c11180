"""Learning from a person who looks at some pairs which of the others are misaligned."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, ndtri
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from .audits import MisalignmentResults
from .detectors import normal_scores
from .errors import EcifError
from .samples import every_sample
from .verdicts import ALIGNED, LEAST, MISALIGNED
from .writing import write_scores

_SLOPE = 2.0  # of the first guess, in log odds for a standard deviation of the score
_RIDGE = 10.0  # what a weight costs
_ELSEWHERE = 0.25  # share of the proposals that are drawn from everywhere
_DRAWS = 1000


class Review(NamedTuple):
    """What a review led to.

    Attributes:
        aligned: pairs tagged so.
        misaligned: likewise.
        auroc: of pairs that were tagged, each judged by the others, in [0, 1].
        auroc_low: of its 95 % bootstrap interval.
        auroc_high: likewise.
        expected: how many of all pairs are misaligned, by the sum of their probabilities.
        proposals: sample ids to look at next, uncertain ones and some from everywhere.
    """

    aligned: int
    misaligned: int
    auroc: float
    auroc_low: float
    auroc_high: float
    expected: float
    proposals: list[str]


def review_misalignment(
    results: MisalignmentResults,
    count: int = 20,
    *,
    seed: int = 0,
) -> Review:
    """Refits a run's score to the pairs that a person has tagged, and proposes what to look at next.

    A logistic regression on the scores of all detectors of the run starts from
    the run's own score and learns from the pairs tagged ``aligned`` and
    ``misaligned``. ``{brain_key}_misalignment`` of every pair becomes its
    **probability** of being misaligned; that of a tagged pair is 0 or 1. Tag more
    and do it again as often as you like: each time starts from the detectors.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many pairs to propose.
        seed (0): of the proposals and the bootstrap.

    Raises:
        EcifError: if a pair has both tags, or there are not two pairs of each
            kind among those of the run
    """
    labels = read_labels(results)
    signals = results.detector_scores()
    guess = first_guess(signals[results.config.detector], results.noise_rate.rate)
    probability = refit(signals, guess, labels)
    known = labels >= 0
    probability[known] = labels[known]
    auroc, low, high = _confidence(signals, guess, labels, seed)
    gone = _gone(results)
    proposals = propose(probability, known | gone, count, seed)
    review = Review(
        int((labels == 0).sum()),
        int((labels == 1).sum()),
        auroc,
        low,
        high,
        float(probability[~gone].sum()),
        [results.ids[row] for row in proposals],
    )
    results.config.reviewed = datetime.now(timezone.utc).isoformat()
    results.diagnostics["review"] = {**review._asdict(), "proposals": len(review.proposals)}
    values = zip(results.ids, probability.tolist(), strict=True)
    write_scores(results, {f"{results.key}_misalignment": dict(values)})
    return review


def propose_pairs(results: MisalignmentResults, count: int = 20, seed: int = 0) -> list[str]:
    """Sample ids to look at while too few are tagged to learn from.

    Most of them around the estimated noise rate, where the score says least, and
    some from everywhere; none that is tagged already, or deleted.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many.
        seed (0): of those from everywhere.
    """
    scores = results.detector_scores()[results.config.detector]
    said = set(every_sample(results.samples._dataset).match_tags([ALIGNED, MISALIGNED]).values("id"))
    known = np.array([sample in said for sample in results.ids]) | _gone(results)
    return [results.ids[row] for row in propose(first_guess(scores, results.noise_rate.rate), known, count, seed)]


def _gone(results: MisalignmentResults) -> np.ndarray:
    """Which pairs are no longer in the dataset, bool, shape ``(N,)``."""
    there = set(every_sample(results.samples._dataset).select(results.ids).values("id"))
    return np.array([sample not in there for sample in results.ids])


def first_guess(scores: np.ndarray, noise_rate: float) -> np.ndarray:
    """Probabilities before anything is known, one half at the estimated noise rate, shape ``(N,)``."""
    rate = min(max(noise_rate, 0.02), 0.5)
    guess: np.ndarray = expit(_SLOPE * (normal_scores(scores) - ndtri(1 - rate)))
    return guess


def read_labels(results: MisalignmentResults) -> np.ndarray:
    """What a person said of each pair: 0 = aligned, 1 = misaligned, -1 = nothing; shape ``(N,)``.

    Raises:
        EcifError: as :func:`review_misalignment`
    """
    tags = dict(zip(*every_sample(results.samples._dataset).select(results.ids).values(["id", "tags"]), strict=True))
    labels = np.full(len(results.ids), -1)
    for row, sample in enumerate(results.ids):
        said = {ALIGNED, MISALIGNED} & set(tags.get(sample) or ())
        if len(said) == 2:
            raise EcifError(f"Sample {sample} is tagged {ALIGNED!r} and {MISALIGNED!r}. Take one of the two away")
        if said:
            labels[row] = int(said == {MISALIGNED})
    for label, tag in ((0, ALIGNED), (1, MISALIGNED)):
        if (labels == label).sum() < LEAST:
            raise EcifError(
                f"At least {LEAST} pairs of run {results.key!r} must be tagged {tag!r}, there are "
                f"{(labels == label).sum()}. Look at some more pairs"
            )
    return labels


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


def _confidence(
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
