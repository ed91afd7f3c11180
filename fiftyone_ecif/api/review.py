"""Learning from a person who looks at some pairs which of the others are misaligned."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.active_learning import first_guess, held_out_auroc, propose, refit
from fiftyone_ecif.runs.misalignment import MisalignmentResults
from fiftyone_ecif.runs.writing import write_scores
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.samples.review_tags import ALIGNED, LEAST, MISALIGNED, ReviewCounts, count_review_tags


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
    auroc, low, high = held_out_auroc(signals, guess, labels, seed)
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
    results.record(reviewed=datetime.now(timezone.utc).isoformat())
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


def review_or_propose(results: MisalignmentResults, count: int = 20) -> tuple[ReviewCounts, Review | None, list[str]]:
    """Refits a run to what was said, if that is enough, and proposes pairs to look at next.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many pairs to propose.

    Returns:
        what was said, what was learned from it, and sample ids

    Raises:
        EcifError: if a pair has both tags and there are enough others, or the run's store was deleted
    """
    from fiftyone_ecif.api.review import propose_pairs, review_misalignment

    tags = count_review_tags(results.samples._dataset, results.key)
    if tags.enough:
        review = review_misalignment(results, count)
        return tags, review, review.proposals
    return tags, None, propose_pairs(results, count)
