"""What a person said of pairs: two tags. No heavy imports: forms read it."""

from __future__ import annotations

from typing import Any, NamedTuple

from fiftyone_ecif.errors import EcifError

ALIGNED, MISALIGNED = "aligned", "misaligned"
LEAST = 2  # of each, for something to be learned


class ReviewCounts(NamedTuple):
    """How many pairs of a run have which tag.

    Attributes:
        aligned: said to belong together.
        misaligned: said not to.
        both: said to do both, which cannot be.
    """

    aligned: int
    misaligned: int
    both: int

    @property
    def enough(self) -> bool:
        """Whether something can be learned from them."""
        return min(self.aligned, self.misaligned) >= LEAST


def count_review_tags(dataset: Any, key: str) -> ReviewCounts:
    """What was said so far of the pairs that run ``key`` scored."""
    from fiftyone_ecif.samples.pairs import every_sample

    scored = every_sample(dataset).exists(f"{key}_misalignment")
    counts = scored.count_sample_tags()
    both = scored.match_tags([ALIGNED, MISALIGNED], all=True)
    return ReviewCounts(counts.get(ALIGNED, 0), counts.get(MISALIGNED, 0), len(both))


def set_review_tag(dataset: Any, sample: str, tag: str | None) -> None:
    """Tags one pair as a person says, or takes back what was said.

    Args:
        dataset: a FiftyOne dataset.
        sample: its id.
        tag: ``"aligned"``, ``"misaligned"``, or None for neither.
    """
    from fiftyone_ecif.samples.pairs import every_sample

    view = every_sample(dataset).select(sample)
    view.untag_samples([ALIGNED, MISALIGNED])
    if tag is not None:
        view.tag_samples(tag)


def check_score_tag(tag: str | None) -> None:
    """Checks that a tag that is given by a score is none of a person's.

    Raises:
        EcifError: if it is
    """
    if tag in (ALIGNED, MISALIGNED):
        raise EcifError(
            f"The tag {tag!r} is reserved for what a person says of a pair. Choose another, such as 'suspect'"
        )
