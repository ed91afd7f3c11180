"""How long work reports where it is.

Work that takes long is a generator: it yields a :class:`Progress` every now and
then and returns its result. Whoever drives it shows the progress its own way,
and stops it by closing it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

#: The stages of a scoring job, in order.
STAGES = (
    "Reading pairs",
    "Loading the model",
    "Recognising images",
    "Encoding images",
    "Encoding captions",
    "Fitting",
    "Solving",
    "Computing gradients",
    "Scoring",
    "Comparing pairs",
    "Refitting",
    "Comparing pairs again",
    "Writing fields",
)


class Progress(NamedTuple):
    """``done`` of ``total`` steps of a stage."""

    stage: str
    done: int
    total: int

    @property
    def overall(self) -> float:
        """The share of the whole job, in [0, 1], all stages weighing the same."""
        share = self.done / self.total if self.total else 1.0
        return (STAGES.index(self.stage) + share) / len(STAGES)


def result_of(work: Generator[Any, None, Any]) -> Any:
    """What a generator of progress returns."""
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value
