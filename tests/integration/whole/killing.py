"""Runs jobs in processes that are killed, for test_kills.py: imports once, then forks a process for each job.

Reads a JSON object a line from stdin: ``job``, ``dataset`` and options of the job; ``event``, the number of the event
at which the process kills itself, and ``seconds``, after which it is killed from outside. Events are steps of the
job, and what comes before and after each file that is put in its place and each write to the database. Answers with
``signal`` and, of a job that was not killed, ``events`` (what each was), ``seconds`` or ``error``.
"""

import json
import os
import select
import signal
import sys
import time
import traceback

import pymongo.monitoring

WRITES = ("insert", "update", "delete", "findAndModify", "createIndexes", "bulkWrite")


class Events(pymongo.monitoring.CommandListener):
    """Counts events, and kills the process at one of them."""

    def __init__(self):
        self.seen, self.last, self.counts = [], None, False

    def happens(self, what):
        if self.counts:
            self.seen.append(what)
            if len(self.seen) == self.last:
                os.kill(os.getpid(), signal.SIGKILL)

    def started(self, event):
        if event.command_name in WRITES:
            self.happens(f"before {event.command_name}")

    def succeeded(self, event):
        if event.command_name in WRITES:
            self.happens(f"after {event.command_name}")

    def failed(self, event):
        pass


events = Events()
pymongo.monitoring.register(events)  # before FiftyOne makes its client

import fiftyone as fo  # noqa: E402

from fiftyone_ecif.api import influence as api  # noqa: E402
from fiftyone_ecif.api import misalignment  # noqa: E402
from fiftyone_ecif.api.fine_tuning import fit_steps  # noqa: E402
from fiftyone_ecif.models import features, fine_tuning  # noqa: E402
from fiftyone_ecif.models.dual_encoder import DualEncoder  # noqa: E402
from fiftyone_ecif.settings.fine_tuning import FitSettings  # noqa: E402
from fiftyone_ecif.settings.influence import InfluenceSettings  # noqa: E402
from fiftyone_ecif.settings.job import JobSettings  # noqa: E402
from fiftyone_ecif.settings.misalignment import MisalignmentSettings  # noqa: E402

features._PART = DualEncoder.batch_size = 24  # several writes to the store
fine_tuning._SAVE_EVERY = 0.0
replace = os.replace


def counted_replace(source, target):
    events.happens(f"before replacing {os.path.basename(target)}")
    replace(source, target)
    events.happens(f"after replacing {os.path.basename(target)}")


os.replace = counted_replace


def steps_of(job, dataset, model, pretrained, path, overwrite, seed):
    """The job as a generator."""
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    if job == "score":
        settings = InfluenceSettings(model=model, pretrained=pretrained, batch_size=24, fit=True, seed=seed)
        return api.influence_steps(train, val, settings, JobSettings(num_workers=0, overwrite=overwrite))
    if job == "detect":
        settings = MisalignmentSettings(model=model, pretrained=pretrained, batch_size=24, seed=seed)
        return misalignment.misalignment_steps(train, settings, JobSettings(num_workers=0, overwrite=overwrite))
    settings = FitSettings(model=model, pretrained=pretrained, epochs=2, batch_size=24, seed=seed)
    return fit_steps(train, path, settings, device="cpu", overwrite=overwrite)


def work(order, answer):
    """Does the job in this process and says how it went."""
    start = time.monotonic()
    try:
        dataset = fo.load_dataset(order.pop("dataset"))
        events.last = order.pop("event", None)
        events.counts = True
        for step in steps_of(order.pop("job"), dataset, **order):
            events.happens(step.stage)
        events.counts = False
        told = {"events": events.seen, "seconds": time.monotonic() - start}
    except BaseException:
        told = {"error": traceback.format_exc()}
    os.write(answer, json.dumps(told).encode())


def main():
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        seconds = order.pop("seconds", None)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            work(order, writing)
            os._exit(0)
        os.close(writing)
        if seconds is not None and not select.select([reading], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
        told = b""
        while piece := os.read(reading, 1 << 16):
            told += piece
        os.close(reading)
        _, status = os.waitpid(child, 0)
        died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps({"signal": died, **json.loads(told or b"{}")}), flush=True)


if __name__ == "__main__":
    main()
