"""What operators that run long share: progress, failures and stopping as the App shows them, and calls from Python."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any
from uuid import uuid4

import fiftyone.operators as foo
import psutil
from fiftyone.operators.executor import ExecutionError

from fiftyone_ecif.api.progress_bar import explain
from fiftyone_ecif.errors import EcifError

from .estimates import Course, Plan, remember, say_left
from .memory import keep_entered, keep_outcome
from .view_fields import fields_of_runs
from .wording import in_words

logger = logging.getLogger(__name__)

_STORE = "fiftyone_ecif_jobs"  # of FiftyOne's execution stores, which all processes on a dataset share
_STOP = "stop "  # what the key of a request starts with
_FORGET = 900  # seconds after which a job that said nothing is taken for dead
_FRESH = 60  # seconds in which who started a job still expects the grid to change
_REMEMBER = 86400  # seconds that the end of a job waits for someone to see it
KEPT = "Stopped. What was computed so far is kept: run it again to go on from there"

_PERCENT = ("Fitting", "Solving")  # stages whose steps are no things to count
_UNFORESEEN = "This is a fault of the plugin or of what it uses: `fiftyone-ecif doctor` looks for the latter"


class StoppedError(Exception):
    """The user stopped the job."""


def has_jobs(ctx: Any) -> bool:
    """Whether there is a job on the dataset that runs, or has ended unseen."""
    return ctx.dataset is not None and bool(_entries(ctx))


def running_jobs(ctx: Any) -> dict[str, dict[str, Any]]:
    """Jobs on the dataset by their id: ``name``, ``label`` and ``progress`` in [0, 1] as last reported."""
    return {key: job for key, job in _entries(ctx).items() if "progress" in job}


def _is_dead(job: dict[str, Any]) -> bool:
    """Whether the process that ran it is gone, as far as this machine can tell."""
    return bool(job["host"] == socket.gethostname() and not psutil.pid_exists(job["process"]))


def stop_job(ctx: Any, job: str) -> None:
    """Asks a job to stop, which it does at its next step."""
    ctx.store(_STORE).set(_STOP + job, True, ttl=_FORGET)


def show_finished_jobs(ctx: Any, moving: bool = True) -> bool:
    """Does in the App what jobs in the background wanted done at their end; whether there were any.

    Args:
        ctx: of the panel.
        moving (True): whether also to bring something to the grid long after the end.
    """
    finished = {key: job for key, job in _entries(ctx).items() if "asked" in job}
    for key, job in finished.items():
        ctx.store(_STORE).delete(key)
        fresh = moving or time.time() - job["ended"] < _FRESH
        for request in job["asked"]:
            if fresh or request["operator"] == "notify":
                ctx.trigger(request["operator"], request["params"])
    return bool(finished)


def _entries(ctx: Any) -> dict[str, dict[str, Any]]:
    store = ctx.store(_STORE)
    found = {key: store.get(key) for key in store.list_keys() if not key.startswith(_STOP)}
    for key in [key for key, entry in found.items() if entry and "progress" in entry and _is_dead(entry)]:
        store.delete(key)
        del found[key]
    return {key: entry for key, entry in found.items() if entry}  # one can go meanwhile


class Job:
    """A job that others can see and stop.

    Args:
        ctx: of the operator.
        name: what it is called.
    """

    def __init__(self, ctx: Any, name: str) -> None:
        self._store, self._key, self._name = ctx.store(_STORE), uuid4().hex, name
        self.tell("Starting", 0.0)

    def tell(self, label: str, progress: float) -> None:
        """Says how far it is, in [0, 1]."""
        told = {"name": self._name, "label": label, "progress": progress}
        self._set({**told, "host": socket.gethostname(), "process": os.getpid()}, _FORGET)

    @property
    def is_to_stop(self) -> bool:
        """Whether someone asked for that."""
        return bool(self._store.has(_STOP + self._key))

    def end(self, asked: list[dict[str, Any]] | None = None) -> None:
        """Takes it from the list.

        Args:
            asked (None): what the App is to do when somebody looks next.
        """
        if asked is None:
            self._store.delete(self._key)
        else:
            self._set({"asked": asked, "ended": time.time()}, _REMEMBER)
        self._store.delete(_STOP + self._key)

    def _set(self, entry: dict[str, Any], seconds: int) -> None:
        self._store.set(self._key, entry, ttl=seconds)
        self._store.update_ttl(self._key, seconds)  # which setting leaves as it was


def run_job(ctx: Any, operator: str, name: str, work: Callable[[Any, Job], Iterator[Any]]) -> Iterator[Any]:
    """Runs a job: at once with a progress bar, or in the background, where the panel shows it.

    The progress bar of the App covers everything until the job ends, and cannot be
    stopped from there.

    Args:
        ctx: of the operator, whose parameter ``background`` says which.
        operator: its name.
        name: of the job.
        work: does it, given the context and the job.
    """
    job = Job(ctx, name)
    keep_entered(ctx)
    if not ctx.delegated:
        yield ctx.ops.open_panel("influence_panel", layout="horizontal")
    if ctx.delegated or not ctx.params.get("background"):
        try:
            yield from _run_and_remember(ctx, operator, name, job, work)
        finally:
            job.end()
        return
    Thread(target=_run_in_background, args=(ctx, operator, name, job, work), daemon=True).start()
    yield ctx.ops.notify("Running in the background. The Influence panel shows how far it is", variant="info")


def _run_in_background(ctx: Any, operator: str, name: str, job: Job, work: Callable[[Any, Job], Iterator[Any]]) -> None:
    """Runs a job and leaves what it asks of the App to the panel."""
    requests = [message.body for message in _run_and_remember(ctx, operator, name, job, work)]
    asked = [{"operator": request.operator_uri, "params": request.params} for request in requests]
    job.end([request for request in asked if request["operator"] != "set_progress"])


def _run_and_remember(
    ctx: Any, operator: str, name: str, job: Job, work: Callable[[Any, Job], Iterator[Any]]
) -> Iterator[Any]:
    """Runs a job, and keeps what it said at its end for the panel."""
    said, failed = "It ended before it was done", True
    try:
        for message in _run(ctx, job, work):
            if message is not None and message.body.operator_uri == "notify":
                said, failed = message.body.params["message"], message.body.params["variant"] != "success"
            yield message
        if ctx.delegated:  # it has nobody to notify
            said, failed = "It is done", False
    except Exception as error:  # of a delegated job, which FiftyOne records
        said, failed = in_words(error), True
        raise
    finally:
        keep_outcome(ctx, operator, name, said, failed)


def _run(ctx: Any, job: Job, work: Callable[[Any, Job], Iterator[Any]]) -> Iterator[Any]:
    """Runs a job, and shows a failure: an exception inside a generator would never reach the user."""
    try:
        yield report(ctx, "Starting", 0.0)
        yield from work(ctx, job)
    except StoppedError:
        if ctx.delegated:
            raise
        yield ctx.ops.set_progress(label=KEPT, progress=1)
        yield ctx.ops.notify(KEPT, variant="warning")
    except Exception as error:
        if ctx.delegated:
            raise
        error = explain(error) or error
        message = in_words(error)
        if not isinstance(error, EcifError):
            logger.exception("%s failed", work.__module__.rpartition(".")[2])
            message = f"{type(error).__name__}: {error}. {_UNFORESEEN}"
        yield ctx.ops.set_progress(label=f"Failed: {message}", progress=1)
        yield ctx.ops.notify(message, variant="error")


def with_progress(ctx: Any, job: Job, plan: Plan, steps: Any) -> Generator[Any, None, Any]:
    """Shows the job's progress, at most twice a second, with its pace and the time that the whole of it still takes.

    Args:
        ctx: of the operator.
        job: that it is.
        plan: what it is about.
        steps: a generator of :class:`fiftyone_ecif.progress.Progress`.

    Returns:
        what ``steps`` returns

    Raises:
        StoppedError: if the user stops it
    """
    course, shown, last = Course(plan), None, 0.0
    try:
        while True:
            step = next(steps)
            course.see(step)
            now = time.monotonic()
            if step.stage == shown and now - last < 0.5 and (step.partitions > 1 or step.done < step.total):
                continue
            shown, last = step.stage, now
            label = _say(step, course)
            job.tell(label, course.share)
            yield report(ctx, label, course.share)
            if job.is_to_stop:
                raise StoppedError(KEPT)
    except StopIteration as end:
        remember(course, plan.pairs)
        return end.value
    finally:
        steps.close()


def _say(step: Any, course: Course) -> str:
    """Where a job is, in a line."""
    said = step.stage
    if step.stage in _PERCENT and step.total > 1:
        said += f": {step.done / step.total:.0%} of the way"
    elif step.total > 1:
        said += f": {step.done:,} of {step.total:,}"
        if course.rate:
            said += f" ({course.rate:,.0f} a second)" if course.rate >= 1 else f" ({60 * course.rate:,.1f} a minute)"
    if step.partitions > 1:
        said = f"Partition {step.partition:,} of {step.partitions:,}. {said}"
    return said if course.left is None else f"{said}, {say_left(course.left)}"


def report(ctx: Any, label: str, progress: float) -> Any:
    """One state of the progress bar."""
    if ctx.delegated:
        ctx.set_progress(progress=progress, label=label)
        return None
    return ctx.ops.set_progress(label=label, progress=progress)


def thumbnail_fields(key: str, config: Any) -> list[str]:
    """What the thumbnails say of a run: the rank, as many influences look alike when they are rounded."""
    ends = ("misalignment", "reason") if config.type == "misalignment" else ("rank",)
    return [f"{key}_{end}" for end in ends]


def thumbnails_of(dataset: Any, field: str) -> list[str]:
    """What the thumbnails say where pairs were chosen by a score: the caption, and what the run says that wrote it."""
    configs = {key: dataset.get_brain_info(key).config for key in dataset.list_brain_runs(method="ecif")}
    for key, config in configs.items():
        if field in config.fields(key):
            return [config.caption_field, *thumbnail_fields(key, config)]
    return [field]


def set_thumbnails(ctx: Any, *fields: str) -> Any:
    """Has the thumbnails show these fields, in place of what other runs wrote there."""
    ours = fields_of_runs(ctx.dataset)
    kept = [name for name in ctx.active_fields or [] if name not in ours]
    return ctx.ops.set_active_fields(list(dict.fromkeys([*kept, *fields])))


def show(ctx: Any, view: Any, *fields: str) -> Iterator[Any]:
    """Brings a view to the grid, with these fields on the thumbnails in place of what other runs wrote there."""
    yield ctx.ops.reload_dataset()
    colours = ctx.dataset.app_config.color_scheme
    if colours is not None:  # else the App takes note of new colours only when the page is loaded anew
        yield ctx.trigger("set_color_scheme", {"fields": [dict(field) for field in colours.fields or []]})
    yield set_thumbnails(ctx, *fields)
    yield ctx.ops.set_view(view=view)


def call(uri: str, samples: Any, delegate: bool, params: dict[str, Any]) -> Any:
    """Runs an operator from Python on a dataset or view.

    Raises:
        EcifError: if the form refuses a value, or the job fails
    """
    params = {name: value for name, value in params.items() if value is not None}
    place = {"view": samples.view(), "dataset": samples._dataset}
    try:
        with ThreadPoolExecutor(1) as alone:  # in a notebook's event loop FiftyOne would return before it is done
            result = alone.submit(foo.execute_operator, uri, place, params=params, request_delegation=delegate).result()
    except ExecutionError as error:
        found = re.fullmatch(r"Validation error\. Path: (.*?)\. Reason: (.*)", str(error), re.DOTALL)
        if not found:
            raise
        raise EcifError(f"{found[2]} ({found[1]})") from error
    for request in result.executor.to_json()["requests"]:
        if request["operator_uri"] == "notify" and request["params"]["variant"] == "error":
            raise EcifError(request["params"]["message"])
    return result
