"""Reading the results of runs."""

from __future__ import annotations

import threading
from typing import Any

_ONE_AT_A_TIME = threading.Lock()


def read_results(dataset: Any, key: str, cache: bool = False) -> Any:
    """The results of a run; None if it was stopped before they were written.

    All who load a dataset share one open file of the results. Two threads of the App that read it at once would each
    get a part of it, or nothing.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.
        cache (False): whether those that were read last will do.
    """
    with _ONE_AT_A_TIME:
        # without the view, which may name a field that is gone
        return dataset.load_brain_results(key, cache=cache, load_view=False)
