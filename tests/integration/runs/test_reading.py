"""Results of runs are read whole, also by threads of the App that read them at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from gridfs import GridOut

from fiftyone_ecif.runs.reading import read_results


def test_threads_that_read_at_once_all_get_the_whole(dataset, score, monkeypatch):
    results = score(dataset.match_tags("train"), dataset.match_tags("val"))
    read, start = GridOut.read, threading.Barrier(4)

    def slowly(file, *size):
        time.sleep(0.05)
        return read(file, *size)

    def read_at_once(_):
        start.wait()
        return read_results(dataset, "ecif").ids

    read_results(dataset, "ecif")  # which opens the file
    monkeypatch.setattr(GridOut, "read", slowly)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read_at_once, range(4))) == [results.ids] * 4
