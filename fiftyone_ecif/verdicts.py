"""What a person said of pairs: two tags. No heavy imports: forms read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import EcifError

if TYPE_CHECKING:
    from .audits import MisalignmentResults
    from .review import Review

ALIGNED, MISALIGNED = "aligned", "misaligned"
LEAST = 2  # of each, for something to be learned


class Verdicts(NamedTuple):
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


def count_verdicts(dataset: Any, key: str) -> Verdicts:
    """What was said so far of the pairs that run ``key`` scored."""
    from .samples import every_sample

    scored = every_sample(dataset).exists(f"{key}_misalignment")
    counts = scored.count_sample_tags()
    both = scored.match_tags([ALIGNED, MISALIGNED], all=True)
    return Verdicts(counts.get(ALIGNED, 0), counts.get(MISALIGNED, 0), len(both))


def say(dataset: Any, sample: str, verdict: str | None) -> None:
    """Tags one pair as a person says, or takes back what was said.

    Args:
        dataset: a FiftyOne dataset.
        sample: its id.
        verdict: ``"aligned"``, ``"misaligned"``, or None for neither.
    """
    from .samples import every_sample

    view = every_sample(dataset).select(sample)
    view.untag_samples([ALIGNED, MISALIGNED])
    if verdict is not None:
        view.tag_samples(verdict)


def check_mark(tag: str | None) -> None:
    """Checks that a tag that is given by a score is none of a person's.

    Raises:
        EcifError: if it is
    """
    if tag in (ALIGNED, MISALIGNED):
        raise EcifError(
            f"The tag {tag!r} is reserved for what a person says of a pair. Choose another, such as 'suspect'"
        )


def review_or_propose(results: MisalignmentResults, count: int = 20) -> tuple[Verdicts, Review | None, list[str]]:
    """Refits a run to what was said, if that is enough, and proposes pairs to look at next.

    Args:
        results: of :func:`fiftyone_ecif.compute_misalignment`.
        count (20): how many pairs to propose.

    Returns:
        what was said, what was learned from it, and sample ids

    Raises:
        EcifError: if a pair has both tags and there are enough others, or the run's store was deleted
    """
    from .review import propose_pairs, review_misalignment

    verdicts = count_verdicts(results.samples._dataset, results.key)
    if verdicts.enough:
        review = review_misalignment(results, count)
        return verdicts, review, review.proposals
    return verdicts, None, propose_pairs(results, count)
