"""A cache that is empty and goes away."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def fresh_cache(folder: Path) -> Iterator[None]:
    """Makes a folder the cache for a while, so that nothing is found there and nothing left behind."""
    name = "FIFTYONE_ECIF_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
