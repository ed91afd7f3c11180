"""What operators that run long share: progress and failures as the App shows them, and calls from Python."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import fiftyone.operators as foo
from fiftyone.operators.executor import ExecutionError

from fiftyone_ecif.errors import EcifError

logger = logging.getLogger(__name__)


def run_job(ctx: Any, job: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    """Runs a job, and shows a failure: an exception inside a generator would never reach the user."""
    try:
        yield report(ctx, "Starting", 0.0)
        yield from job(ctx)
    except Exception as error:
        if ctx.delegated:
            raise
        message = str(error)
        if not isinstance(error, EcifError):
            logger.exception("%s failed", job.__module__.rpartition(".")[2])
            message = f"{type(error).__name__}: {error}"
        yield ctx.ops.set_progress(label=f"Failed: {message}", progress=1)
        yield ctx.ops.notify(message, variant="error")


def with_progress(ctx: Any, work: Any) -> Generator[Any, None, Any]:
    """Shows the job's progress, at most twice a second, with rate and remaining time."""
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
            yield report(ctx, label, overall)
    except StopIteration as end:
        return end.value
    finally:
        work.close()


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
