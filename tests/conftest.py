"""Tests run with a cache and plugins folder of their own, never the user's. Three tiers:

* ``unit``: neither FiftyOne nor a database; seconds.
* ``integration``: with FiftyOne, on a database of their own.
* ``browser``: the App in a real browser.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="ecif-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for name in ("FIFTYONE_CONFIG_PATH", "FIFTYONE_APP_CONFIG_PATH"):
    os.environ.pop(name, None)
os.environ |= {
    "FIFTYONE_PLUGINS_DIR": str(HOME / "plugins"),
    "FIFTYONE_DEFAULT_DATASET_DIR": str(HOME / "datasets"),
    "FIFTYONE_ECIF_CACHE_DIR": str(HOME / "cache"),
    "FIFTYONE_ECIF_TESTS_DIR": str(HOME),
    "FIFTYONE_DO_NOT_TRACK": "1",
    "FIFTYONE_SHOW_PROGRESS_BARS": "false",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the other cores are the other workers'


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=8, help="how often test_kills.py kills a job")
