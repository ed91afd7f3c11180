"""A soak: scoring, tracing and deleting on one dataset, over and over. Memory and disk must not grow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from fiftyone.core.odm import get_db_conn

from fiftyone_ecif.api.influence import compute_influence
from fiftyone_ecif.api.tracing import mark_traces, trace
from fiftyone_ecif.demo.training import MODEL
from fiftyone_ecif.runs.cache import cache_size
from fiftyone_ecif.runs.manage import delete_run

_KEY = "soak"
_MIB = 1 << 20


def soak(
    dataset: Any, checkpoint: str, rounds: int, report: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Scores, traces and deletes again and again, in batches of their own each time, and measures after each round.

    Args:
        dataset: with pairs tagged ``train`` and ``val``.
        checkpoint: of a model for them.
        rounds: how often, at least 4.
        report: given the rounds done and all of them.

    Returns:
        ``rounds``; ``resident_mib``, ``cache_bytes`` and ``database_bytes`` (of documents), each
        with its value after the first round, after the last, and its ``slope`` a
        round over the second half (least squares)
    """
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    process, database = psutil.Process(), get_db_conn()
    measured: dict[str, list[float]] = {"resident_mib": [], "cache_bytes": [], "database_bytes": []}
    for number in range(rounds):
        results = compute_influence(
            train,
            model=MODEL,
            pretrained=checkpoint,
            target=val,
            brain_key=_KEY,
            seed=number,
            fit=True,
            num_workers=0,
            progress=False,
        )
        mark_traces(results, trace(results, count=3, limit=10, progress=False))
        delete_run(dataset, _KEY)
        del results
        gc.collect()
        measured["resident_mib"].append(process.memory_info().rss / _MIB)
        measured["cache_bytes"].append(cache_size(dataset))
        measured["database_bytes"].append(database.command("dbStats")["dataSize"])
        report(number + 1, rounds)
    return {"rounds": rounds} | {name: _course(values) for name, values in measured.items()}


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"{result['rounds']} rounds",
        "",
        "| what | first round | last round | slope a round |",
        "|---|---|---|---|",
    ]
    for name, course in result.items():
        if name != "rounds":
            lines.append(f"| {name} | {course['first']:,.1f} | {course['last']:,.1f} | {course['slope']:+,.3f} |")
    return "\n".join(lines)


def _course(values: list[float]) -> dict[str, float]:
    second = np.array(values[len(values) // 2 :])
    slope = float(np.polyfit(np.arange(len(second)), second, 1)[0])
    return {"first": float(values[0]), "last": float(values[-1]), "slope": slope}
