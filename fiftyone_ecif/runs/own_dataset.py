"""A dataset as an object that nobody else of this process has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def own_dataset(dataset: Any) -> Iterator[Any]:
    """A dataset to record runs on, with a document of its own; in the end the shared one is reloaded.

    FiftyOne has one object for all who load a dataset. The App reloads it at any time, which gives it another
    document, and then FiftyOne records a run on the one that was dropped, or trips over it (``ReferenceError``).

    Args:
        dataset: a FiftyOne dataset, as the others see it.
    """
    try:
        yield type(dataset)._make_instance(dataset.name, False, _virtual=True)
    finally:
        dataset.reload()
