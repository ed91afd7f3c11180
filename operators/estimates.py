"""How long jobs take on this machine, judging by those that ran, or by the size of the model."""

from __future__ import annotations

import contextlib
import json
import time
from functools import cache
from typing import Any

import numpy as np

from fiftyone_ecif.models.libraries import library_of
from fiftyone_ecif.store.files import atomic_path, cache_folder

_ENCODING = ("Encoding images", "Encoding captions", "Recognising images")
_LOADING = "Loading the model"
# for a first guess: what towers reach of the pace of a matrix product, seconds to read a pair, seconds of all that is
# done with its features, and how often a pair goes through the towers where their own parameters are in scope
_REACHED, _READING, _FEATURES, _DEEP_PASSES = 0.8, 3e-3, 1e-3, 200


class Watch:
    """Times the stages of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.encoded = 0
        self._stage, self._since = "", time.monotonic()

    def see(self, step: Any) -> None:
        """Takes note of a :class:`fiftyone_ecif.progress.Progress`."""
        now = time.monotonic()
        stage = self._stage or step.stage
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._stage, self._since = step.stage, now
        if step.stage == _ENCODING[0]:
            self.encoded = max(self.encoded, step.total)


def remember(kind: str, pairs: int, watch: Watch) -> None:
    """Keeps what a job took, in the cache folder.

    Args:
        kind: of the job, with all that its pace depends on.
        pairs: that it was about.
        watch: that saw it.
    """
    paces = _read()
    encoding = sum(watch.seconds.get(stage, 0.0) for stage in _ENCODING)
    loading = watch.seconds.get(_LOADING, 0.0)
    pace = paces.get(kind, {})
    pace |= {"load": loading, "pair": (sum(watch.seconds.values()) - encoding - loading) / max(pairs, 1)}
    if watch.encoded:
        pace["encode"] = encoding / watch.encoded
    place = cache_folder() / "estimates.json"
    with contextlib.suppress(OSError), atomic_path(place, shared=True) as temporary:  # not worth a failure
        temporary.write_text(json.dumps(paces | {kind: pace}))


def estimate(kind: str, pairs: int, model: str, scope: str) -> str:
    """What a job will take, in a sentence.

    Args:
        kind: of the job, as it was remembered.
        pairs: that it is about.
        model: that scores them.
        scope: of the model's parameters.
    """
    pace = _read().get(kind)
    if not pace:
        return _guess(pairs, model, scope)
    said = f"Takes about {_span(pace['load'] + pairs * pace['pair'])}"
    if "encode" in pace:
        said += f", and up to {_span(pairs * pace['encode'])} more for what is not encoded yet"
    return f"{said}, judging by the last such run on this machine"


def _guess(pairs: int, model: str, scope: str) -> str:
    size = library_of(model).multiplications(model)
    if size is None:
        return "How long that takes is not known yet: no such run ended on this machine"
    passes = 1 if scope.startswith("heads") else _DEEP_PASSES
    span = _span(pairs * (passes * size / (_REACHED * _multiplications_a_second()) + _READING + _FEATURES))
    return f"A first guess from the size of the model, without a GPU: about {span}. No such run ended on this machine"


@cache
def _multiplications_a_second() -> float:
    """Of this machine's processors, in a product of matrices."""
    matrix = np.ones((1024, 1024), dtype=np.float32)
    matrix @ matrix  # the first one starts the threads
    start = time.perf_counter()
    for _ in range(3):
        matrix @ matrix
    return 3 * len(matrix) ** 3 / (time.perf_counter() - start)


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
