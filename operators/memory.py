"""What forms and panel remember of a dataset: what was entered last, and how the last job ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

_STORE = "fiftyone_ecif_memory"  # of FiftyOne's execution stores
_ENTERED, _OUTCOME, _TRACE, _WISH = "entered", "outcome", "trace ", "wish"
_FRESH = 60  # seconds in which the panel follows a wish
_ASKED_AGAIN = ("model", "pretrained", "caption_field", "target", "fit")  # what is filled in from the last job


def keep_entered(ctx: Any) -> None:
    """Remembers what was entered for a job, whether or not it succeeds."""
    before = ctx.store(_STORE).get(_ENTERED) or {}
    entered = {name: ctx.params[name] for name in _ASKED_AGAIN if ctx.params.get(name) is not None}
    ctx.store(_STORE).set(_ENTERED, {**before, **entered, "when": time.time()})


def entered_before(ctx: Any) -> dict[str, Any]:
    """What forms start with on this dataset: from the last job, or the last run where that is newer."""
    found = ctx.store(_STORE).get(_ENTERED) or {}
    runs = [ctx.dataset.get_brain_info(key) for key in ctx.dataset.list_brain_runs(method="ecif")]
    newest = max(runs, key=lambda run: run.timestamp, default=None)
    if newest is not None and newest.timestamp.timestamp() > found.get("when", 0.0):
        config = newest.config
        found = found | {name: getattr(config, name) for name in ("model", "pretrained", "caption_field")}
    return {name: value for name, value in found.items() if name in _ASKED_AGAIN and value is not None}


def keep_outcome(ctx: Any, operator: str, name: str, text: str, failed: bool) -> None:
    """Remembers how a job ended, until someone takes note of it.

    Args:
        ctx: of its operator.
        operator: that ran it.
        name: of the job.
        text: what there is to say.
        failed: whether it came to nothing.
    """
    entered = {name: value for name, value in ctx.params.items() if _is_plain(value)} if failed else {}
    told = {"operator": operator, "name": name, "text": text, "failed": failed, "when": time.time()}
    ctx.store(_STORE).set(_OUTCOME, {**told, "entered": entered})


def last_outcome(ctx: Any) -> dict[str, Any] | None:
    """How the last job ended: ``operator``, ``name``, ``text``, ``failed``, ``when`` and what was ``entered``."""
    found: dict[str, Any] | None = ctx.store(_STORE).get(_OUTCOME)
    return found


def dismiss_outcome(ctx: Any) -> None:
    """Forgets how the last job ended."""
    ctx.store(_STORE).delete(_OUTCOME)


def wish(ctx: Any, key: str, page: str) -> None:
    """Asks the panel to turn to a page of a run, where there is something to see."""
    ctx.store(_STORE).set(_WISH, {"key": key, "page": page}, ttl=_FRESH)


def has_wish(ctx: Any) -> bool:
    """Whether the panel is asked to turn somewhere."""
    return ctx.dataset is not None and bool(ctx.store(_STORE).get(_WISH))


def take_wish(ctx: Any) -> dict[str, str] | None:
    """Where the panel is asked to turn, once."""
    found: dict[str, str] | None = ctx.store(_STORE).get(_WISH)
    if found:
        ctx.store(_STORE).delete(_WISH)
    return found


def keep_trace(ctx: Any, run: str, traces: Sequence[Any]) -> None:
    """Remembers what was traced last with a run.

    Args:
        ctx: of the operator.
        run: what stays of it when it is renamed.
        traces: of :func:`fiftyone_ecif.trace`.
    """
    told = [
        {"id": one.id, "loss": one.loss, "mistake": one.mistake}
        | {name: [found._asdict() for found in getattr(one, name)] for name in ("retrieved", "culprits", "helpers")}
        for one in traces
    ]
    ctx.store(_STORE).set(_TRACE + run, told)


def last_trace(ctx: Any, run: str) -> list[dict[str, Any]]:
    """What was traced last with a run: of each ``id``, ``loss``, ``mistake``, ``retrieved``, ``culprits``, ``helpers``.

    What was kept by an older version says nothing of what was retrieved.
    """
    found: list[dict[str, Any]] = ctx.store(_STORE).get(_TRACE + run) or []
    return [{"retrieved": [], **one} for one in found]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
