"""Learning from a person who looks at some pairs which of the others are misaligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from .audits import MisalignmentResults
from .detectors import ranked
from .errors import EcifError
from .samples import write_scores

ALIGNED, MISALIGNED = "aligned", "misaligned"
_PRIOR = 3.0  # how much the label-free score is trusted beside the other signals
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
    aligned_tag: str = ALIGNED,
    misaligned_tag: str = MISALIGNED,
    seed: int = 0,
) -> Review:
    """Refits a run's score to the pairs that a person has tagged, and proposes what to look at next.

    A logistic regression on the scores of all detectors of the run learns from
    the tagged pairs. ``{brain_key}_misalignment`` of every pair becomes its
    **probability** of being misaligned; that of a tagged pair is 0 or 1. Tag more
    and do it again as often as you like: each time starts from the detectors.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many pairs to propose.
        aligned_tag ("aligned"): the tag of pairs that belong together.
        misaligned_tag ("misaligned"): the tag of pairs that do not.
        seed (0): of the proposals and the bootstrap.

    Raises:
        EcifError: if a pair has both tags, or there are not two pairs of each
            kind among those of the run
    """
    labels = read_labels(results, aligned_tag, misaligned_tag)
    signals = results.detector_scores()
    probability = refit(signals, results.config.detector, labels)
    known = labels >= 0
    probability[known] = labels[known]
    auroc, low, high = _confidence(signals, results.config.detector, labels, seed)
    proposals = propose(probability, known, count, seed)
    review = Review(
        int((labels == 0).sum()),
        int((labels == 1).sum()),
        auroc,
        low,
        high,
        float(probability.sum()),
        [results.ids[row] for row in proposals],
    )
    results.config.reviewed = True
    field = f"{results.key}_misalignment"
    described = results.config.fields(results.key)[field]
    dataset = results.samples._dataset
    write_scores(dataset, {field: dict(zip(results.ids, probability.tolist(), strict=True))}, {field: described})
    written = dataset.get_field(field)
    written.description = described.description
    written.save()
    results.diagnostics["review"] = {**review._asdict(), "proposals": len(review.proposals)}
    results.save_config()
    results.save()
    return review


def propose_pairs(results: MisalignmentResults, count: int = 20, seed: int = 0) -> list[str]:
    """Sample ids to look at first, before anything was tagged.

    Half of the pairs around the estimated noise rate, where the score says
    least, and the rest from everywhere.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many.
        seed (0): of those from everywhere.
    """
    scores = results.detector_scores()[results.config.detector]
    rows = propose(first_guess(scores, results.noise_rate.rate), np.zeros(len(scores), dtype=bool), count, seed)
    return [results.ids[row] for row in rows]


def first_guess(scores: np.ndarray, noise_rate: float) -> np.ndarray:
    """Probabilities that are one half at the estimated noise rate, shape ``(N,)``."""
    rate = min(max(noise_rate, 0.02), 0.5)
    guess: np.ndarray = 1 / (1 + np.exp(-10 * (ranked(scores) - (1 - rate))))
    return guess


def read_labels(results: MisalignmentResults, aligned_tag: str, misaligned_tag: str) -> np.ndarray:
    """What a person said of each pair: 0 = aligned, 1 = misaligned, -1 = nothing; shape ``(N,)``.

    Raises:
        EcifError: as :func:`review_misalignment`
    """
    dataset = results.samples._dataset
    tags = dict(zip(*dataset.select(results.ids).values(["id", "tags"]), strict=True))
    labels = np.full(len(results.ids), -1)
    for row, sample in enumerate(results.ids):
        said = {aligned_tag, misaligned_tag} & set(tags.get(sample) or ())
        if len(said) == 2:
            raise EcifError(
                f"Sample {sample} is tagged {aligned_tag!r} and {misaligned_tag!r}. Take one of the two away"
            )
        if said:
            labels[row] = int(said == {misaligned_tag})
    for label, tag in ((0, aligned_tag), (1, misaligned_tag)):
        if (labels == label).sum() < 2:
            raise EcifError(
                f"At least 2 pairs of run {results.key!r} must be tagged {tag!r}, there are {(labels == label).sum()}. "
                "Look at some more pairs"
            )
    return labels


def refit(signals: Mapping[str, np.ndarray], detector: str, labels: np.ndarray) -> np.ndarray:
    """The probability that each pair is misaligned, learned from some, shape ``(N,)``.

    Args:
        signals: scores by detector, shape ``(N,)`` each.
        detector: the one that is trusted most before anything is learned.
        labels: 0, 1, or -1 where nothing is known, shape ``(N,)``.
    """
    inputs = _inputs(signals, detector)
    known = labels >= 0
    model = _regression().fit(inputs[known], labels[known])
    probability: np.ndarray = model.predict_proba(inputs)[:, 1]
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


def _inputs(signals: Mapping[str, np.ndarray], detector: str) -> np.ndarray:
    """Normal scores of all signals; the trusted one is larger, so that regularisation holds it back less."""
    columns = []
    for name in sorted(signals):
        normal = ndtri((ranked(signals[name]) * len(signals[name]) - 0.5) / len(signals[name]))
        columns.append(normal * (_PRIOR if name == detector else 1.0))
    return np.stack(columns, axis=1)


def _regression() -> Any:
    return LogisticRegression(C=0.1, max_iter=1000)


def _confidence(
    signals: Mapping[str, np.ndarray], detector: str, labels: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """AUROC on the labelled pairs, each judged by a fit to others, with a bootstrap interval."""
    inputs = _inputs(signals, detector)[labels >= 0]
    truth = labels[labels >= 0]
    folds = StratifiedKFold(min(5, int(np.bincount(truth).min())), shuffle=True, random_state=seed)
    judged = cross_val_predict(_regression(), inputs, truth, cv=folds, method="predict_proba")[:, 1]
    generator = np.random.default_rng(seed)
    draws: Sequence[np.ndarray] = [generator.integers(len(truth), size=len(truth)) for _ in range(_DRAWS)]
    values = [roc_auc_score(truth[rows], judged[rows]) for rows in draws if 0 < truth[rows].sum() < len(rows)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(roc_auc_score(truth, judged)), float(low), float(high)
