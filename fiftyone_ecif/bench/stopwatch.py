"""Seconds of several ways to do one thing, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def side_by_side(repeats: int, ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each way, in turns, so that what else the machine does strikes all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}
