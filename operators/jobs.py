"""What operators that run long share: progress, failures and stopping as the App shows them, and calls from Python."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Generator, Iterator
from threading import Thread
from typing import Any
from uuid import uuid4

import fiftyone.operators as foo
from fiftyone.operators.executor import ExecutionError

from fiftyone_ecif.errors import EcifError

logger = logging.getLogger(__name__)

_STORE = "fiftyone_ecif_jobs"  # of FiftyOne's execution stores, which all processes on a dataset share
_STOP = "stop "  # what the key of a request starts with
_FORGET = 900  # seconds after which a job that said nothing is taken for dead
_REMEMBER = 86400  # seconds that the end of a job waits for someone to see it
KEPT = "Stopped. What was computed so far is kept: run it again to go on from there"


class StoppedError(Exception):
    """The user stopped the job."""


def running_jobs(ctx: Any) -> dict[str, dict[str, Any]]:
    """Jobs on the dataset by their id: ``name``, ``label`` and ``progress`` in [0, 1] as last reported."""
    return {key: job for key, job in _entries(ctx).items() if "progress" in job}


def stop_job(ctx: Any, job: str) -> None:
    """Asks a job to stop, which it does at its next step."""
    ctx.store(_STORE).set(_STOP + job, True, ttl=_FORGET)


def show_finished_jobs(ctx: Any) -> bool:
    """Does in the App what jobs in the background wanted done at their end; whether there were any."""
    finished = {key: job["asked"] for key, job in _entries(ctx).items() if "asked" in job}
    for key, asked in finished.items():
        ctx.store(_STORE).delete(key)
        for request in asked:
            ctx.trigger(request["operator"], request["params"])
    return bool(finished)


def _entries(ctx: Any) -> dict[str, dict[str, Any]]:
    store = ctx.store(_STORE)
    found = {key: store.get(key) for key in store.list_keys() if not key.startswith(_STOP)}
    return {key: entry for key, entry in found.items() if entry}  # one can go meanwhile


def run_job(ctx: Any, job: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """Runs a job: at once with a progress bar, or in the background, where the panel shows it.

    The progress bar of the App covers everything until the job ends, and cannot be
    stopped.
    """
    if ctx.delegated or not ctx.params.get("background"):
        yield from _run(ctx, job)
        return
    before = set(_entries(ctx))
    Thread(target=_run_in_background, args=(ctx, job), daemon=True).start()
    patience = time.monotonic() + 5  # until there is something for the panel to show
    while not set(_entries(ctx)) - before and time.monotonic() < patience:
        time.sleep(0.1)
    yield ctx.ops.open_panel("influence_panel", layout="horizontal")
    yield ctx.ops.notify("Running in the background. The Influence panel shows how far it is", variant="info")


def _run_in_background(ctx: Any, job: Callable[[Any], Iterator[Any]]) -> None:
    """Runs a job and leaves what it asks of the App to the panel."""
    requests = [message.body for message in _run(ctx, job) if message is not None]
    asked = [
        {"operator": request.operator_uri, "params": request.params}
        for request in requests
        if request.operator_uri != "set_progress"
    ]
    ctx.store(_STORE).set(uuid4().hex, {"asked": asked}, ttl=_REMEMBER)


def _run(ctx: Any, job: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """Runs a job, and shows a failure: an exception inside a generator would never reach the user."""
    try:
        yield report(ctx, "Starting", 0.0)
        yield from job(ctx)
    except StoppedError:
        if ctx.delegated:
            raise
        yield ctx.ops.set_progress(label=KEPT, progress=1)
        yield ctx.ops.notify(KEPT, variant="warning")
    except Exception as error:
        if ctx.delegated:
            raise
        message = str(error)
        if not isinstance(error, EcifError):
            logger.exception("%s failed", job.__module__.rpartition(".")[2])
            message = f"{type(error).__name__}: {error}"
        yield ctx.ops.set_progress(label=f"Failed: {message}", progress=1)
        yield ctx.ops.notify(message, variant="error")


def with_progress(ctx: Any, work: Any, name: str) -> Generator[Any, None, Any]:
    """Shows the job's progress, at most twice a second, with rate and remaining time.

    Args:
        ctx: of the operator.
        work: a generator of :class:`fiftyone_ecif.progress.Progress`.
        name: of the job, for who wants to stop it.

    Returns:
        what ``work`` returns

    Raises:
        StoppedError: if the user stops it
    """
    store, job = ctx.store(_STORE), uuid4().hex
    stage, since, last, overall = None, 0.0, 0.0, 0.0
    try:
        while True:
            step = next(work)
            now = time.monotonic()
            if step.stage != stage:
                stage, since = step.stage, now
            elif now - last < 0.5 and step.done < step.total:
                continue
            last = now
            label = f"{step.stage}: {step.done:,} of {step.total:,}" if step.total > 1 else step.stage
            if step.done and step.total > 1 and now > since:
                rate = step.done / (now - since)
                label += f" ({rate:,.0f} a second, {(step.total - step.done) / rate:,.0f} s left)"
            overall = max(overall, step.overall)  # a solve can start again
            store.set(job, {"name": name, "label": label, "progress": overall}, ttl=_FORGET)
            yield report(ctx, label, overall)
            if store.has(_STOP + job):
                raise StoppedError(KEPT)
    except StopIteration as end:
        return end.value
    finally:
        work.close()
        store.delete(job)
        store.delete(_STOP + job)


def report(ctx: Any, label: str, progress: float) -> Any:
    """One state of the progress bar."""
    if ctx.delegated:
        ctx.set_progress(progress=progress, label=label)
        return None
    return ctx.ops.set_progress(label=label, progress=progress)


def show(ctx: Any, view: Any, *fields: str) -> Iterator[Any]:
    """Brings a view to the grid, with these fields on the thumbnails beside those that are there."""
    yield ctx.ops.reload_dataset()
    yield ctx.ops.set_active_fields(list(dict.fromkeys([*ctx.active_fields, *fields])))
    yield ctx.ops.set_view(view=view)


def call(uri: str, samples: Any, delegate: bool, params: dict[str, Any]) -> Any:
    """Runs an operator from Python on a dataset or view.

    Raises:
        EcifError: if the form refuses a value, or the job fails
    """
    params = {name: value for name, value in params.items() if value is not None}
    place = {"view": samples.view(), "dataset": samples._dataset}
    try:
        result = foo.execute_operator(uri, place, params=params, request_delegation=delegate)
    except ExecutionError as error:
        found = re.fullmatch(r"Validation error\. Path: (.*?)\. Reason: (.*)", str(error), re.DOTALL)
        if not found:
            raise
        raise EcifError(f"{found[2]} ({found[1]})") from error
    for request in result.executor.to_json()["requests"]:
        if request["operator_uri"] == "notify" and request["params"]["variant"] == "error":
            raise EcifError(request["params"]["message"])
    return result
