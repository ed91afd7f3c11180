"""Seconds of several ways to do one thing, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def side_by_side(
    repeats: int,
    ways: Mapping[str, Callable[[], Any]],
    prepare: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each way, in turns, so that what else the machine does strikes all alike.

    Args:
        repeats: how often.
        ways: what to do.
        prepare: done before each, and not timed.
        clock (time.perf_counter): what to read; ``time.process_time`` counts the
            work of this process only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            prepare()
            start = clock()
            way()
            seconds[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}
