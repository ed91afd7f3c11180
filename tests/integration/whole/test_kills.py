"""Jobs that are killed at random moments leave whole results or none, and end alike when they are run again.

``pytest tests/test_kills.py --kills 60`` kills sixty times, by default it is eight.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fiftyone_ecif import list_runs
from fiftyone_ecif.demo import training
from fiftyone_ecif.store.tables import Store

JOBS = ("score", "replace", "detect", "fit")
KEYS = {"score": "ecif", "replace": "ecif", "detect": "audit"}


@pytest.fixture(scope="module")
def worker():
    """Sends an order to the process that forks jobs, and gives its answer."""
    script = Path(__file__).with_name("killing.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # one thread adds up in one order
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def send(**order):
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return receive()

    def receive():
        for line in process.stdout:
            if line.startswith(('"', "{")):
                return json.loads(line)
        raise RuntimeError("the worker died")

    assert receive() == "ready"
    yield send
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def trials(worker, made, tmp_path_factory):
    """For each job what it says of itself when nobody kills it, and a function that does one trial of it."""
    options = {"model": training.MODEL, "pretrained": made[1]}
    folder = tmp_path_factory.mktemp("kills")

    def order(job, dataset, overwrite, seed=0, **more):
        path = str(folder / f"{dataset.name}.pt")
        kind = "score" if job == "replace" else job
        return worker(job=kind, dataset=dataset.name, path=path, overwrite=overwrite, seed=seed, **options, **more)

    def found(job, dataset):
        if job == "fit":
            return torch.load(folder / f"{dataset.name}.pt", weights_only=True)
        dataset.reload()
        fields = sorted(name for name in dataset.get_field_schema() if name.startswith(KEYS[job]))
        return {name: dataset.sort_by("filepath").values(name) for name in fields}

    def same(job, dataset, expected):
        values = found(job, dataset)
        if job == "fit":
            return values.keys() == expected.keys() and all(
                torch.equal(values[name], expected[name]) for name in values
            )
        return values == expected

    def start(job):
        dataset = made[0].clone()
        if job == "replace":
            assert order(job, dataset, False, seed=1)["signal"] == 0
        return dataset

    whole = {}
    for job in JOBS:
        dataset = start(job)
        before = found(job, dataset) if job == "replace" else None
        told = order(job, dataset, job == "replace")
        assert "error" not in told, told
        whole[job] = {**told, "before": before, "after": found(job, dataset)}
        dataset.delete()

    def trial(job, kill):
        dataset, expected = start(job), whole[job]
        told = order(job, dataset, job == "replace", **kill)
        assert "error" not in told, told
        if told["signal"]:
            assert told["signal"] == signal.SIGKILL
            if job != "fit":
                dataset.reload()
                runs = list_runs(dataset)  # finishes what was begun to be written
                if job == "replace" and same(job, dataset, expected["before"]):
                    assert runs[0].scored == 72
                elif runs or job == "replace":
                    assert runs[0].scored == 72
                    assert same(job, dataset, expected["after"])
                else:
                    assert found(job, dataset) == {}
            again = order(job, dataset, True)
            assert (again["signal"], again.get("error")) == (0, None)
        assert same(job, dataset, expected["after"])
        if job != "fit":
            assert [run.scored for run in list_runs(dataset)] == [72]
            assert not list(Store(str(dataset._doc.id)).folder.glob("writing/*.json"))
        dataset.delete()
        return bool(told["signal"])

    return whole, trial


def test_the_events_cover_what_is_written(trials):
    whole, _ = trials
    for job in JOBS:
        told = " ".join(whole[job]["events"])
        assert "before replacing" in told
        assert job == "fit" or "before update" in told


def test_killed_jobs_leave_nothing_half_and_end_alike(trials, pytestconfig):
    whole, trial = trials
    draw, kills = random.Random(20), pytestconfig.getoption("kills")
    killed = {job: 0 for job in JOBS}
    for number in range(kills):
        job = JOBS[number % len(JOBS)]
        events = whole[job]["events"]
        writing = [place for place, event in enumerate(events, 1) if "replacing" in event or "before" in event]
        kill = (
            {"event": draw.choice(writing[-len(writing) // 2 :])},
            {"event": draw.randint(1, len(events))},
            {"seconds": draw.uniform(0.05, 0.95) * whole[job]["seconds"]},
        )[number // len(JOBS) % 3]
        print(f"{number + 1}: {job} at {kill}")
        killed[job] += trial(job, kill)
    print(f"killed: {killed}")
    assert sum(killed.values()) > 0.8 * kills  # a job can end before its time comes
