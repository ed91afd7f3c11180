"""Scoring from a synthetic store, beside reading the bytes of its files."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fiftyone_ecif.bench.speed.embedding import fresh_cache
from fiftyone_ecif.bench.speed.stopwatch import side_by_side
from fiftyone_ecif.influence.gradient_store import read_effects, stored_influence, stored_products
from fiftyone_ecif.store.tables import Store, Table

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
        for start in range(0, pairs, _PART):
            _write(store.table("gradients"), start, min(_PART, pairs - start), random)
        store.table("projected-curvature").write("hessian", {"matrix": np.eye(_RANK)})
        effects = {"length": random.random(pairs) + 1, "own": random.random(pairs)}
        store.table("effects").write("hessian-0.0", effects)
        files = sorted(store.table("gradients").folder.glob("*.h5"))
        one, many = random.standard_normal((1, _RANK)), random.standard_normal((_QUERIES, _RANK))
        images = random.standard_normal((_QUERIES, _EMBEDDING)).astype(np.float32)
        rows = []
        for state, prepare in (("cold", _forget), ("warm", _read)):
            found = side_by_side(
                repeats,
                {
                    "read": lambda: _read(files),
                    "new target": lambda: stored_influence(store, "hessian", 0.0, one, pairs),
                },
                partial(prepare, files),
            )
            size = {"read": sum(path.stat().st_size for path in files), "new target": pairs * (2 * _RANK * 4 + 8)}
            rows += [
                {"what": what, "files": state, "pairs": pairs, "seconds": each, "mb_per_s": size[what] / each / 1e6}
                for what, each in found.items()
            ]
        start_time = time.perf_counter()
        _trace(store, many, images, pairs)
        rows.append(
            {
                "what": f"trace of {_QUERIES}",
                "files": "warm",
                "pairs": pairs,
                "seconds": time.perf_counter() - start_time,
            }
        )
    return rows


def _write(table: Table, start: int, count: int, random: np.random.Generator) -> None:
    gradients = random.standard_normal((2, count, _RANK), dtype=np.float32)
    images = random.standard_normal((count, _EMBEDDING), dtype=np.float32)
    row = np.arange(start, start + count)
    columns = {"row": row, "image": images, "positive": gradients[0], "negative": gradients[1]}
    table.write(f"{start:09d}", columns)


def _trace(store: Store, gradients: np.ndarray, images: np.ndarray, pairs: int) -> None:
    """What :func:`fiftyone_ecif.trace` does between reading the queries and naming samples."""
    lengths = read_effects(store, "hessian", 0.0, pairs)["length"]
    influence = stored_influence(store, "hessian", 0.0, gradients, pairs)
    similarity = stored_products(store, images, pairs, "image")
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
