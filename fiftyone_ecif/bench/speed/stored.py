"""Scoring from a synthetic store, beside reading the bytes of its files."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fiftyone_ecif.bench.speed.caches import fresh_cache
from fiftyone_ecif.bench.speed.stopwatch import side_by_side
from fiftyone_ecif.influence.gradient_store import Effects, GradientStore, PairRows
from fiftyone_ecif.store.tables import Store

Row = dict[str, Any]
_RANK = 512  # as the heads have it: two times 16 by 16
_EMBEDDING = 512
_PART = 2048  # rows
_QUERIES = 100
_BLOCK = 1 << 23  # bytes
_BEST = 10  # pairs of each kind that a trace names


def rescore(pairs: int, repeats: int) -> list[Row]:
    """Seconds and MB/s of one new target and of a trace of 100 queries, and of reading the same bytes."""
    with tempfile.TemporaryDirectory(prefix="ecif-store-") as name, fresh_cache(Path(name)):
        store = Store("speed")
        store.ensure_writable()
        random = np.random.default_rng(0)
        kept = GradientStore(store, pairs)
        for start in range(0, pairs, _PART):
            kept.write_pairs(start, [_rows(start, min(_PART, pairs - start), random)])
        kept.write_curvature(np.eye(_RANK))
        kept.write_effects(Effects(random.random(pairs) + 1, random.random(pairs)))
        files = sorted(store.folder.glob("gradients/*.h5"))
        one, many = random.standard_normal((1, _RANK)), random.standard_normal((_QUERIES, _RANK))
        images = random.standard_normal((_QUERIES, _EMBEDDING)).astype(np.float32)
        rows = []
        for state, prepare in (("cold", _forget), ("warm", _read)):
            found = side_by_side(
                repeats,
                {
                    "read": lambda: _read(files),
                    "new target": lambda: kept.influence(one),
                },
                partial(prepare, files),
            )
            size = {"read": sum(path.stat().st_size for path in files), "new target": pairs * (2 * _RANK * 4 + 8)}
            rows += [
                {"what": what, "files": state, "pairs": pairs, "seconds": each, "mb_per_s": size[what] / each / 1e6}
                for what, each in found.items()
            ]
        start_time = time.perf_counter()
        _trace(kept, many, images)
        rows.append(
            {
                "what": f"trace of {_QUERIES}",
                "files": "warm",
                "pairs": pairs,
                "seconds": time.perf_counter() - start_time,
            }
        )
    return rows


def _rows(start: int, count: int, random: np.random.Generator) -> PairRows:
    gradients = random.standard_normal((2, count, _RANK), dtype=np.float32)
    images = random.standard_normal((count, _EMBEDDING), dtype=np.float32)
    row, none = np.arange(start, start + count), np.zeros(count)
    return PairRows(row, row, images, none, none, gradients[0], gradients[1])


def _trace(store: GradientStore, gradients: np.ndarray, images: np.ndarray) -> None:
    """What :func:`fiftyone_ecif.trace` does between reading the queries and naming samples."""
    lengths = store.effects().length
    influence = store.influence(gradients)
    similarity = store.similarity(images)
    for one, like in zip(influence, similarity, strict=True):
        relative = one / lengths
        for values in (relative, -relative, -like):
            best = np.argpartition(values, _BEST)[:_BEST]
            best[np.argsort(values[best])]


def _read(files: list[Path]) -> None:
    buffer = bytearray(_BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _forget(files: list[Path]) -> None:
    """Has the system read the files from the disk the next time."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
