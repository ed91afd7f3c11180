"""How long work reports where it is.

Work that takes long is a generator: it yields a :class:`Progress` every now and
then and returns its result. Whoever drives it shows the progress its own way,
and stops it by closing it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
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
    """``done`` of ``total`` steps of a stage, which each partition goes through anew.

    Attributes:
        stage: one of :data:`STAGES`, or a name of its own.
        done: steps.
        total: steps.
        partition: which one is at work, from 1.
        partitions: how many there are.
    """

    stage: str
    done: int
    total: int
    partition: int = 1
    partitions: int = 1


def piece(work: Generator[Progress, None, T], number: int, count: int) -> Generator[Progress, None, T]:
    """One of several equal pieces of work, whose steps count as steps of all of them.

    Args:
        work: the piece.
        number: which one, from 0.
        count: of the pieces.

    Returns:
        what the work returns
    """
    return (
        yield from _changed(
            work, lambda step: step._replace(done=number * step.total + step.done, total=count * step.total)
        )
    )


def partition(work: Generator[Progress, None, T], number: int, count: int) -> Generator[Progress, None, T]:
    """The work on one of several partitions, from 1; returns what it returns."""
    return (yield from _changed(work, lambda step: step._replace(partition=number, partitions=count)))


def _changed(
    work: Generator[Progress, None, T], change: Callable[[Progress], Progress]
) -> Generator[Progress, None, T]:
    try:
        while True:
            yield change(next(work))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        work.close()


def result_of(work: Generator[Any, None, Any]) -> Any:
    """What a generator of progress returns."""
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value
