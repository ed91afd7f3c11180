"""How long jobs take on this machine, judging by those that ran."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

from fiftyone_ecif.store import cache_folder

_ENCODING = ("Encoding images", "Encoding captions")
_LOADING = "Loading the model"


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
    place = cache_folder() / "pace.json"
    with contextlib.suppress(OSError):  # an estimate is not worth a failure
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        temporary.write_text(json.dumps(paces | {kind: pace}))
        os.replace(temporary, place)


def estimate(kind: str, pairs: int) -> str:
    """What a job of a kind will take, in a sentence."""
    pace = _read().get(kind)
    if not pace:
        return "How long that takes is not known yet: no such run ended on this machine"
    said = f"Takes about {_span(pace['load'] + pairs * pace['pair'])}"
    if "encode" in pace:
        said += f", and up to {_span(pairs * pace['encode'])} more for what is not encoded yet"
    return f"{said}, judging by the last such run on this machine"


def _read() -> dict[str, Any]:
    try:
        found = json.loads((cache_folder() / "pace.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
