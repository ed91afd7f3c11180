"""How long jobs take on this machine, judging by those that ran, or by the size of the model."""

from __future__ import annotations

import contextlib
import json
import time
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from fiftyone_ecif.models.libraries import library_of
from fiftyone_ecif.progress import STAGES, Progress
from fiftyone_ecif.store.files import atomic_path, cache_folder

_ENCODING = ("Encoding images", "Encoding captions", "Recognising images")
_LOADING = "Loading the model"
_ROUND = ("Fitting", "Solving", "Computing gradients", "Scoring")  # what each partition goes through
_SURE = 0.05  # of a stage, from which on its own pace says when it ends
# for a first guess: what towers reach of the pace of a matrix product, seconds to load a model, to read a pair, and for
# each stage of what is done with its features, and how often a pair goes through the towers where their own parameters
# are in scope
_REACHED, _LOAD, _READING, _FEATURES, _DEEP_PASSES = 0.8, 5.0, 3e-3, 2e-4, 200


class Plan(NamedTuple):
    """A job that is to be run.

    Attributes:
        kind: of the job, with all that its pace depends on but the number of partitions.
        pairs: that it is about.
        model: that scores them.
        scope: of the model's parameters.
        partitions: how often they are scored.
    """

    kind: str
    pairs: int
    model: str
    scope: str
    partitions: int = 1


class Course:
    """Where a job is on its way, and how long it still takes.

    Args:
        plan: the job.

    Attributes:
        plan: likewise.
        seconds: that its stages took so far.
        encoded: pairs that were not encoded before.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seconds: dict[str, float] = {}
        self.encoded = 0
        self._share = 0.0
        self._step: Progress | None = None
        self._expected, self._is_known = _expected(plan), bool(_pace(plan.kind))
        self._now = self._since = self._round_since = self._first_round = time.monotonic()

    def see(self, step: Progress) -> None:
        """Takes note of a step."""
        now = time.monotonic()
        before = self._step or step
        self.seconds[before.stage] = self.seconds.get(before.stage, 0.0) + now - self._now
        if step.stage in _ROUND and before.stage not in _ROUND:
            self._first_round = self._round_since = now
        if step.partition != before.partition:
            self._round_since = now
        if (step.stage, step.partition) != (before.stage, before.partition):
            self._since = now
        if step.stage == _ENCODING[0]:
            self.encoded = max(self.encoded, step.total)
        self._now, self._step = now, step

    @property
    def rate(self) -> float | None:
        """Steps of the stage a second, once that can be told."""
        step, seconds = self._step, self._now - self._since
        return step.done / seconds if step is not None and step.done and step.total > 1 and seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds until the whole job ends, None where that cannot be told yet."""
        step = self._step
        if step is None:
            return None
        parts = [self._rest_of_stage(step), *(self._expects(stage) for stage in _after(step.stage))]
        rounds = step.partitions - step.partition if step.stage in _ROUND else self.plan.partitions - 1
        if rounds and (step.stage in _ROUND or _ROUND[0] in _after(step.stage)):
            parts.append(self._seconds_of_round(step.partition - 1, rounds))
        return _total(parts)

    @property
    def share(self) -> float:
        """How much of the whole job is done, in [0, 1]; it never falls."""
        left, spent = self.left, sum(self.seconds.values())
        if left is not None and spent + left > 0:
            self._share = max(self._share, spent / (spent + left))
        return min(self._share, 0.99)

    def _rest_of_stage(self, step: Progress) -> float | None:
        seconds, share = self._now - self._since, step.done / step.total if step.total else 1.0
        if share >= 1:
            return 0.0
        if share >= _SURE and seconds > 0:
            return seconds * (1 - share) / share
        expected = self._expects(step.stage)
        return None if expected is None else max(expected - seconds, 0.0)

    def _seconds_of_round(self, done: int, left: int) -> float | None:
        """Of some partitions, judging by those that are done or by the last such job; one alone says too little."""
        if done:
            return left * (self._round_since - self._first_round) / done
        return left * sum(self._expected.get(stage, 0.0) for stage in _ROUND) if self._is_known else None

    def _expects(self, stage: str) -> float | None:
        expected = self._expected.get(stage, None if stage in _ENCODING else 0.0)
        images, captions = _ENCODING[:2]
        if stage == captions and expected is not None and self._expected.get(images):
            taken = self.seconds.get(images, 0.0)  # captions take as much longer than expected as images did
            return expected * max(taken / self._expected[images], 0.01) if taken else expected
        return expected


def remember(course: Course, pairs: int) -> None:
    """Keeps what a job took, in the cache folder.

    Args:
        course: of the job.
        pairs: that it was about in the end.
    """
    plan, paces = course.plan, _read()
    pace = paces.get(plan.kind, {})
    pace["stages"] = {
        stage: seconds / (plan.partitions if stage in _ROUND else 1) / max(pairs, 1)
        for stage, seconds in course.seconds.items()
        if stage not in (*_ENCODING, _LOADING)
    }
    pace["load"] = course.seconds.get(_LOADING, 0.0)
    if course.encoded:
        pace["encode"] = [course.seconds.get(stage, 0.0) / course.encoded for stage in _ENCODING]
    place = cache_folder() / "estimates.json"
    with contextlib.suppress(OSError), atomic_path(place, shared=True) as temporary:  # not worth a failure
        temporary.write_text(json.dumps(paces | {plan.kind: pace}))


def estimate(plan: Plan) -> str:
    """What a job will take, in a sentence."""
    pace = _pace(plan.kind)
    expected = _expected(plan)
    if not pace:
        total = _total([expected.get(stage) for stage in _ENCODING])
        if total is None:
            return "How long that takes is not known yet: no such run ended on this machine"
        span = _span(total + _work(expected, plan.partitions))
        return (
            f"A first guess from the size of the model, without a GPU: about {span}. "
            "No such run has ended on this machine yet"
        )
    said = f"Takes about {_span(_work(expected, plan.partitions) + expected[_LOADING])}"
    if "encode" in pace:
        more = sum(expected[stage] for stage in _ENCODING)
        said += f", and up to {_span(more)} more for what is not encoded yet"
    return f"{said}, judging by the last such run on this machine"


def say_left(seconds: float) -> str:
    """The time that remains, in words."""
    return "a moment left" if seconds < 1 else f"about {_span(seconds)} left"


def _work(expected: dict[str, float], partitions: int) -> float:
    """Seconds of all that is done with features."""
    once = sum(seconds for stage, seconds in expected.items() if stage not in (*_ENCODING, *_ROUND, _LOADING))
    return once + partitions * sum(expected.get(stage, 0.0) for stage in _ROUND)


def _expected(plan: Plan) -> dict[str, float]:
    """Seconds of the stages as far as they can be told; of the partitioned ones, for one partition."""
    pace = _pace(plan.kind)
    if pace:
        found = {stage: seconds * plan.pairs for stage, seconds in pace["stages"].items()}
        return (
            found
            | {_LOADING: pace["load"]}
            | {
                stage: seconds * plan.pairs
                for stage, seconds in zip_longest(_ENCODING, pace.get("encode", ()), fillvalue=0.0)
            }
        )
    found = dict.fromkeys((*_ROUND, "Writing fields"), _FEATURES * plan.pairs) | {_LOADING: _LOAD}
    size = library_of(plan.model).multiplications(plan.model)
    if size is not None:
        once = size / (_REACHED * _multiplications_a_second())
        half = plan.pairs * once / 2
        found |= dict(zip(_ENCODING, (half + _READING * plan.pairs, half, 0.0), strict=True))
        if not plan.scope.startswith("heads"):
            found["Solving"] += (_DEEP_PASSES - 1) * plan.pairs * once
    return found


def _after(stage: str) -> tuple[str, ...]:
    """The stages that can come after one, each once."""
    return STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()


def _total(parts: list[float | None]) -> float | None:
    """The sum; None if a part is not known."""
    return None if None in parts else sum(part for part in parts if part is not None)


@cache
def _multiplications_a_second() -> float:
    """Of this machine's processors, in a product of matrices."""
    matrix = np.ones((1024, 1024), dtype=np.float32)
    matrix @ matrix  # the first one starts the threads
    start = time.perf_counter()
    for _ in range(3):
        matrix @ matrix
    return 3 * len(matrix) ** 3 / (time.perf_counter() - start)


def _pace(kind: str) -> dict[str, Any]:
    found = _read().get(kind)
    return found if isinstance(found, dict) and "stages" in found else {}  # not of an older version


def _read() -> dict[str, Any]:
    try:
        found = json.loads((cache_folder() / "estimates.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
