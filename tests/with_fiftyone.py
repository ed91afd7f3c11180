"""FiftyOne on a database of its own, and a small scored world; for tests that need them.

Importing this starts the database, as FiftyOne looks for one when it is imported.
"""

import atexit
import os
import socket
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from forking import forked_python

from fiftyone_ecif.install.database import mongod

HOME = Path(os.environ["FIFTYONE_ECIF_TESTS_DIR"])
ROOT = Path(__file__).resolve().parents[1]
PAIRS, VALIDATION = 72, 24


def _start_database():
    """Starts a database and has FiftyOne use it; left alone, it joins any that the user has running."""
    (HOME / "database").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = mongod() or pytest.exit("FiftyOne came without mongod. Run: python -m fiftyone_ecif.install.database")
    command = [program, "--dbpath", HOME / "database", "--port", port, "--bind_ip", "127.0.0.1", "--nounixsocket"]
    database = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    atexit.register(database.wait)
    atexit.register(database.terminate)
    os.environ["FIFTYONE_DATABASE_URI"] = f"mongodb://127.0.0.1:{port}"


(HOME / "plugins/@ecif").mkdir(parents=True)
(HOME / "plugins/@ecif/fiftyone-ecif").symlink_to(ROOT)
_start_database()

import fiftyone as fo  # noqa: E402
from PIL import Image  # noqa: E402

from fiftyone_ecif.demo import scenes, training  # noqa: E402
from fiftyone_ecif.progress import result_of  # noqa: E402


@pytest.fixture(scope="session")
def python():
    """The command of a Python that starts at once, in a process of its own."""
    with forked_python(HOME) as command:
        yield command


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id):
    """Images, pairs and the checkpoint of a model trained on them: once for all workers."""
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    folder = shared / "pairs"
    pairs = scenes.make_pairs(PAIRS, noise=0.25, seed=3, validation=VALIDATION)
    paths = [folder / f"{number:03d}.png" for number in range(len(pairs))]
    with FileLock(shared / "pairs.lock"):
        if not (folder / "model.pt").is_file():
            folder.mkdir(exist_ok=True)
            for path, pair in zip(paths, pairs, strict=True):
                Image.fromarray(pair.image).save(path)
            captions = [pair.caption for pair in pairs[:PAIRS]]
            result_of(training.train(paths[:PAIRS], captions, folder / "model.pt", steps=60, seed=0))
    return list(zip(paths, pairs, strict=True)), folder / "model.pt"


@pytest.fixture(scope="session")
def made(trained):
    """A small demo set in FiftyOne and the checkpoint of a model trained on it."""
    dataset = fo.Dataset()
    dataset.add_sample_field("spoiled", fo.StringField)
    dataset.add_samples(
        [
            fo.Sample(filepath=str(path), tags=[pair.split], caption=pair.caption, spoiled=pair.spoiled)
            for path, pair in trained[0]
        ],
        progress=False,
    )
    return dataset, str(trained[1])


@pytest.fixture
def dataset(made):
    """A copy of the small demo set, deleted afterwards."""
    copy = made[0].clone()
    yield copy
    if not copy.deleted:
        copy.delete()


@pytest.fixture(scope="session")
def score(made):
    """``compute_influence`` with the small model and quiet defaults."""
    from fiftyone_ecif import compute_influence

    def run(samples, target, **options):
        defaults = {"model": training.MODEL, "pretrained": made[1], "num_workers": 0, "batch_size": 24}
        return compute_influence(samples, target=target, **(defaults | options))

    return run


@pytest.fixture
def grouped(made):
    """Each image in a slice of its own for two cameras, of which the other has another caption."""
    dataset = fo.Dataset()
    dataset.add_group_field("group", default="left")
    samples = []
    for sample in made[0]:
        group = fo.Group()
        for slice_, caption in (("left", "nothing"), ("right", sample.caption)):
            element = {"group": group.element(slice_), "tags": sample.tags, "caption": caption}
            samples.append(fo.Sample(sample.filepath, **element))
    dataset.add_samples(samples, progress=False)
    yield dataset
    dataset.delete()
