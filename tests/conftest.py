"""Tests run on a database, plugins folder and cache of their own, never the user's."""

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from fiftyone_ecif.database import mongod

HOME = Path(tempfile.mkdtemp(prefix="ecif-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)  # before FiftyOne's, so that its database ends first
for name in ("FIFTYONE_CONFIG_PATH", "FIFTYONE_APP_CONFIG_PATH"):
    os.environ.pop(name, None)
os.environ |= {
    "FIFTYONE_PLUGINS_DIR": str(HOME / "plugins"),
    "FIFTYONE_DEFAULT_DATASET_DIR": str(HOME / "datasets"),
    "FIFTYONE_ECIF_CACHE_DIR": str(HOME / "cache"),
    "FIFTYONE_DO_NOT_TRACK": "1",
    "FIFTYONE_SHOW_PROGRESS_BARS": "false",
}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the other cores are the other workers'
for folder in ("database", "plugins/@ecif"):
    (HOME / folder).mkdir(parents=True)
ROOT = Path(__file__).resolve().parent.parent
(HOME / "plugins/@ecif/fiftyone-ecif").symlink_to(ROOT)


def _start_database():
    """Starts a database and has FiftyOne use it; left alone, it joins any that the user has running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = mongod() or pytest.exit("FiftyOne came without mongod. Run: python -m fiftyone_ecif.database")
    command = [program, "--dbpath", HOME / "database", "--port", port, "--bind_ip", "127.0.0.1", "--nounixsocket"]
    database = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    atexit.register(database.wait)
    atexit.register(database.terminate)
    os.environ["FIFTYONE_DATABASE_URI"] = f"mongodb://127.0.0.1:{port}"


_start_database()

import fiftyone as fo  # noqa: E402
from PIL import Image  # noqa: E402

from fiftyone_ecif import digits, training  # noqa: E402
from fiftyone_ecif.progress import follow  # noqa: E402

PAIRS, VALIDATION = 72, 24


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A small demo set in FiftyOne and the checkpoint of a model trained on it."""
    folder = tmp_path_factory.mktemp("pairs")
    samples = []
    for number, pair in enumerate(digits.make_pairs(PAIRS, noise=0.25, seed=3, validation=VALIDATION)):
        path = folder / f"{number:03d}.png"
        Image.fromarray(pair.image).save(path)
        samples.append(fo.Sample(filepath=str(path), tags=[pair.split], caption=pair.caption, spoiled=pair.spoiled))
    dataset = fo.Dataset()
    dataset.add_sample_field("spoiled", fo.StringField)
    dataset.add_samples(samples, progress=False)
    train = dataset.match_tags("train")
    checkpoint = folder / "model.pt"
    paths = [Path(path) for path in train.values("filepath")]
    follow(training.train(paths, train.values("caption"), checkpoint, steps=60, seed=0), progress=False)
    return dataset, str(checkpoint)


@pytest.fixture
def dataset(made):
    """A copy of the small demo set, deleted afterwards."""
    copy = made[0].clone()
    yield copy
    if not copy.deleted:
        copy.delete()


@pytest.fixture
def score(made):
    """``compute_influence`` with the small model and quiet defaults."""
    from fiftyone_ecif import compute_influence

    def run(samples, target, **options):
        defaults = {"model": training.MODEL, "pretrained": made[1], "num_workers": 0, "batch_size": 24}
        return compute_influence(samples, target=target, **(defaults | options))

    return run


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=8, help="how often test_kills.py kills a job")
