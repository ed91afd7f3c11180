"""Acting on scores: selecting, tagging and exporting pairs."""

from __future__ import annotations

import math
from typing import Any

import fiftyone.core.fields as fof
from fiftyone import ViewField

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import each_once, every_sample
from fiftyone_ecif.samples.review_tags import check_score_tag

#: Which end of a score each direction means: of influence, then of misalignment.
DIRECTIONS = {"harmful": "lowest", "valuable": "highest", "suspicious": "highest"}
#: The sign that a score must have for that; a pair that helps is not harmful, however few do more harm.
SIGNS = {"harmful": -1, "valuable": 1}


def score_fields(samples: Any) -> list[str]:
    """The top-level float fields of a collection."""
    return list(samples.get_field_schema(ftype=fof.FloatField))


def select_by_influence(
    samples: Any,
    field: str,
    direction: str = "harmful",
    *,
    count: int | None = None,
    share: float | None = None,
    threshold: float | None = None,
) -> Any:
    """The most harmful or most valuable pairs, the extreme ones first, each sample once.

    Args:
        samples: a FiftyOne dataset or view.
        field: a score, such as ``ecif_influence``. Samples without one are
            never selected.
        direction ("harmful"): ``"harmful"`` (lowest scores, below zero),
            ``"valuable"`` (highest scores, above zero) or, of misalignment,
            ``"suspicious"`` (highest).
        count (None): how many at most.
        share (None): which share of the scored samples at most, in (0, 1].
        threshold (None): harmful: scores below it; otherwise: scores above it.

    Returns:
        a view

    Raises:
        EcifError: unless exactly one of the three limits is given and usable,
            and the field holds scores
    """
    if direction not in DIRECTIONS:
        raise EcifError(f"direction={direction!r} must be one of {', '.join(DIRECTIONS)}")
    if not isinstance(samples.get_field(field), fof.FloatField):
        raise EcifError(
            f"There is no score field {field!r}. Score fields: {', '.join(score_fields(samples)) or 'none'}"
        )
    limits = {"count": count, "share": share, "threshold": threshold}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        raise EcifError(f"Give one of count, share and threshold, got {', '.join(given) or 'none'}")
    # NaN exists, and sorts below all numbers
    scored = each_once(samples).exists(field).match(ViewField(field) > -math.inf)
    lowest = DIRECTIONS[direction] == "lowest"
    right = scored
    if sign := SIGNS.get(direction):
        right = scored.match(ViewField(field) * sign > 0)
    ordered = right.sort_by(field, reverse=not lowest)
    if threshold is not None:
        if not math.isfinite(threshold):
            raise EcifError(f"threshold={threshold} must be a number")
        return ordered.match(ViewField(field) < threshold if lowest else ViewField(field) > threshold)
    if share is not None:
        if not 0 < share <= 1:
            raise EcifError(f"share={share} must be in (0, 1]")
        count = whole_pairs(share, len(scored))
        if not count:
            raise EcifError(f"None of these samples has a score in {field!r}")
    if count is None or count < 1:
        raise EcifError(f"count={count} must be at least 1")
    return ordered.limit(min(count, len(scored)))


def tag_by_influence(
    samples: Any,
    field: str = "ecif_influence",
    tag: str | None = None,
    direction: str = "harmful",
    *,
    count: int | None = None,
    share: float | None = None,
    threshold: float | None = None,
) -> Any:
    """Tags the most harmful or most valuable pairs.

    Doing it twice changes nothing; ``view.untag_samples(tag)`` takes it back.

    Args:
        samples: a FiftyOne dataset or view.
        field ("ecif_influence"): the score.
        tag (None): by default the direction.
        direction ("harmful"): which end, see :func:`select_by_influence`.
        count (None): how many.
        share (None): which share of the scored samples.
        threshold (None): where to cut.

    Returns:
        a view of the tagged samples, the extreme ones first

    Raises:
        EcifError: as :func:`select_by_influence`, or if the tag is reserved for
            what a person says
    """
    check_score_tag(tag)
    selected = select_by_influence(samples, field, direction, count=count, share=share, threshold=threshold)
    # a tag may end the samples' own view
    selected = every_sample(samples._dataset).select(selected.values("id"), ordered=True)
    selected.tag_samples(tag or direction)
    return selected


def whole_pairs(share: float, pairs: int) -> int:
    """How many pairs a share of them is, rounded up."""
    return math.ceil(share * pairs * (1 - 1e-12))  # 0.07 * 100 is a little more than 7
