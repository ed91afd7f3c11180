"""Learning from a person who looks at some pairs which of the others are misaligned."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.active_learning import auroc_with_interval, propose
from fiftyone_ecif.misalignment.judgement import judge
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

    The pairs tagged ``aligned`` and ``misaligned`` are further rows of the regression that weighs the run's
    signals, and tell more of the share of wrong captions. ``{brain_key}_misalignment`` of every pair becomes its
    **probability** of being misaligned by that, 0 or 1 for a tagged pair; reasons and noise rate follow. Tag more
    and do it again as often as you like: each time starts from the run's own evidence.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many pairs to propose.
        seed (0): of the proposals and the bootstrap.

    Raises:
        EcifError: if a pair has both tags, or there are not two pairs of each
            kind among those of the run
    """
    labels = read_labels(results)
    judgement = judge(results.evidence(), labels)
    probability, known = judgement.probability, labels >= 0
    auroc, low, high = auroc_with_interval(judgement.score[known], labels[known] == 1, seed)
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
    results.diagnostics |= {
        "noise_rate": list(judgement.rate),
        "power": judgement.power,
        "weights": judgement.weights,
        "review": {**review._asdict(), "proposals": len(review.proposals)},
    }
    columns = {"misalignment": probability.tolist(), "reason": judgement.reasons}
    written = {f"{results.key}_{name}": dict(zip(results.ids, values, strict=True)) for name, values in columns.items()}
    write_scores(results, written)
    return review


def propose_pairs(results: MisalignmentResults, count: int = 20, seed: int = 0) -> list[str]:
    """Sample ids to look at while too few are tagged to learn from.

    Most of them where the probability says least, and some from everywhere; none that is tagged already, or deleted.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many.
        seed (0): of those from everywhere.
    """
    probability = judge(results.evidence()).probability
    said = set(every_sample(results.samples._dataset).match_tags([ALIGNED, MISALIGNED]).values("id"))
    known = np.array([sample in said for sample in results.ids]) | _gone(results)
    return [results.ids[row] for row in propose(probability, known, count, seed)]


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
