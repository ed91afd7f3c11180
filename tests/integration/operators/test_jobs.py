"""Jobs in the background: seen, stopped, and their end shown by whoever looks next."""

import time
from datetime import datetime, timedelta, timezone

import pytest
from fiftyone.operators.executor import ExecutionContext, Executor

from fiftyone_ecif.api.progress_bar import explain
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.progress import Progress
from operators import jobs
from operators.estimates import Plan
from operators.wording import in_words


def context(dataset, **params):
    return ExecutionContext(request_params={"dataset_name": dataset.name, "params": params}, executor=Executor())


def asked(ctx):
    return [(request.operator_uri, request.params) for request in ctx.executor._requests]


def wait_for(condition):
    for _ in range(200):
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def steps(count, closed):
    try:
        for done in range(count):
            yield Progress("Scoring", done, count)
            time.sleep(0.02)
        return "all"
    finally:
        closed.append(True)


def work(ctx, job, count=3, closed=None):
    result = yield from jobs.with_progress(
        ctx, job, Plan("a job", count, "RN50", "heads"), steps(count, [] if closed is None else closed)
    )
    yield ctx.ops.set_view(view=ctx.dataset.limit(2))
    yield ctx.ops.notify(f"Did {result}", variant="success")


def test_at_once(dataset):
    ctx = context(dataset)
    said = [message.body for message in jobs.run_job(ctx, "compute_influence", "a job", work)]
    assert [request.operator_uri for request in said][-2:] == ["set_view", "notify"]
    assert not jobs.has_jobs(ctx)


def test_in_the_background(dataset):
    ctx = context(dataset, background=True)
    said = [message.body.operator_uri for message in jobs.run_job(ctx, "compute_influence", "a job", work)]
    assert said == ["open_panel", "notify"]
    panel = context(dataset)
    wait_for(lambda: jobs.has_jobs(panel) and not jobs.running_jobs(panel))
    assert asked(panel) == []
    assert jobs.show_finished_jobs(panel)
    assert [uri for uri, _ in asked(panel)] == ["set_view", "notify"]
    assert asked(panel)[1][1]["message"] == "Did all"
    assert not jobs.has_jobs(panel)
    assert not jobs.show_finished_jobs(panel)


def test_a_panel_that_opens_long_after_does_not_move_the_grid(dataset, monkeypatch):
    list(jobs.run_job(context(dataset, background=True), "compute_influence", "a job", work))
    panel = context(dataset)
    wait_for(lambda: jobs.has_jobs(panel) and not jobs.running_jobs(panel))
    monkeypatch.setattr(jobs, "_FRESH", -1)
    jobs.show_finished_jobs(panel, moving=False)
    assert [uri for uri, _ in asked(panel)] == ["notify"]


def test_a_job_is_stopped(dataset):
    closed = []
    list(
        jobs.run_job(
            context(dataset, background=True),
            "compute_influence",
            "a job",
            lambda ctx, job: work(ctx, job, count=10_000, closed=closed),
        )
    )
    panel = context(dataset)
    (key,) = wait_for(lambda: jobs.running_jobs(panel))
    wait_for(lambda: jobs.running_jobs(panel)[key]["label"].startswith("Scoring: "))
    assert jobs.running_jobs(panel)[key]["name"] == "a job"
    assert closed == []
    jobs.stop_job(panel, key)
    wait_for(lambda: not jobs.running_jobs(panel))
    assert closed == [True]
    jobs.show_finished_jobs(panel)
    assert [params["message"] for uri, params in asked(panel)] == [jobs.KEPT]
    assert jobs._entries(panel) == {}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EcifError("Mend it"), "Mend it"),
        (MemoryError("none left"), in_words(explain(MemoryError("none left")))),
        (ZeroDivisionError("by zero"), f"ZeroDivisionError: by zero. {jobs._UNFORESEEN}"),
    ],
)
@pytest.mark.parametrize("background", [False, True])
def test_failures_are_told(dataset, error, message, background):
    def fail(ctx, job):
        yield jobs.report(ctx, "Starting", 0.0)
        raise error

    ctx = context(dataset, background=background)
    list(jobs.run_job(ctx, "compute_influence", "a job", fail))
    if background:
        panel = context(dataset)
        wait_for(lambda: jobs.has_jobs(panel) and not jobs.running_jobs(panel))
        jobs.show_finished_jobs(panel)
        ctx = panel
    assert [params["message"] for uri, params in asked(ctx) if uri == "notify"] == [message]


def test_a_job_of_a_dead_process_is_not_running(dataset, monkeypatch):
    ctx = context(dataset)
    job = jobs.Job(ctx, "a job")
    assert len(jobs.running_jobs(ctx)) == 1
    monkeypatch.setattr(jobs.psutil, "pid_exists", lambda process: False)
    assert jobs.running_jobs(ctx) == {}
    assert not jobs.has_jobs(ctx)
    job.end()


def test_the_end_of_a_job_waits_for_a_day(dataset):
    ctx = context(dataset)
    job = jobs.Job(ctx, "a job")
    expires = lambda: ctx.store(jobs._STORE).get_metadata(job._key)["expires_at"]  # noqa: E731
    first = expires()
    time.sleep(0.01)
    job.tell("Scoring", 0.5)
    assert expires() > first
    job.end([{"operator": "notify", "params": {"message": "Done"}}])
    left = expires() - datetime.now(timezone.utc).replace(tzinfo=None)
    assert timedelta(hours=23) < left < timedelta(hours=25)
