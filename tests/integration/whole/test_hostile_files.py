"""Files that are damaged, or made to do harm: refused with a sentence; nothing is run, read or allocated for them."""

import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fiftyone_ecif import EcifError
from fiftyone_ecif.api.fine_tuning import fit_steps
from fiftyone_ecif.bench.misalignment.pairs import read_folder
from fiftyone_ecif.demo import training
from fiftyone_ecif.models.checkpoint import load_adapters, load_preprocessing
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.runs.influence import slice_names
from fiftyone_ecif.settings.fine_tuning import FitSettings
from fiftyone_ecif.store.files import cache_folder
from fiftyone_ecif.store.tables import FORMAT, Store

ROWS = np.arange(12.0).reshape(6, 2)


@pytest.fixture
def table():
    store = Store("hostile-store")
    yield store.table("rows")
    store.delete()


@pytest.fixture
def secret(tmp_path):
    """A file outside of the cache that nobody must read through the store."""
    path = tmp_path / "secret.h5"
    with h5py.File(path, "w") as file:
        file["x"] = ROWS
    (tmp_path / "secret.raw").write_bytes(ROWS.tobytes())
    return path


def part(table, **attributes):
    """An open part with what the store puts into each, for a test to add what it likes."""
    table.folder.mkdir(parents=True, exist_ok=True)
    file = h5py.File(table.folder / "0.h5", "w", libver="latest")
    file.attrs.update({"format": FORMAT, "rows": 6} | attributes)
    return file


def plain(file, data=ROWS, name="x", **options):
    file.create_dataset(name, data=data, **({"fletcher32": True} | options))


def external_link(file, secret):
    file["x"] = h5py.ExternalLink(str(secret), "x")


def soft_link(file, secret):
    plain(file, name="y")
    file["x"] = h5py.SoftLink("/y")


def group(file, secret):
    plain(file.create_group("x"))


def virtual(file, secret):
    layout = h5py.VirtualLayout(ROWS.shape, ROWS.dtype)
    layout[:] = h5py.VirtualSource(str(secret), "x", ROWS.shape)
    file.create_virtual_dataset("x", layout)


def raw_storage(file, secret):
    file.create_dataset("x", ROWS.shape, ROWS.dtype, external=str(secret.with_suffix(".raw")))


def text(file, secret):
    plain(file, np.array([b"ab"] * 6))


def variable_length(file, secret):
    file.create_dataset("x", (6,), h5py.string_dtype())


def ragged(file, secret):
    file.create_dataset("x", (6,), h5py.vlen_dtype(np.float32))


def reference(file, secret):
    file.create_dataset("x", (6,), h5py.ref_dtype)


def compound(file, secret):
    plain(file, np.zeros(6, dtype=[("a", "f4"), ("b", "i4")]))


def array_type(file, secret):
    file.create_dataset("x", (6,), np.dtype(("f4", (3,))), fletcher32=True)


def scalar(file, secret):
    file["x"] = 1.0


def nothing(file, secret):
    file["x"] = h5py.Empty("f4")


def short(file, secret):
    plain(file, ROWS[:5])


def huge(file, secret):
    file.create_dataset("x", (6, 1 << 40), "f8", chunks=(6, 1 << 10), fletcher32=True)


def bomb(file, secret):
    plain(file, np.zeros((6, 1 << 20)), compression="gzip")


def compressed(file, secret):
    plain(file, np.random.default_rng(0).random((6, 100)), compression="gzip")


def no_checksum(file, secret):
    plain(file, fletcher32=False)


def rows_of_text(file, secret):
    plain(file)
    file.attrs["rows"] = "6"


def many_rows(file, secret):
    plain(file)
    file.attrs["rows"] = [6, 6]


def no_format(file, secret):
    plain(file)
    del file.attrs["format"]


HOSTILE = {
    external_link: "x is a link",
    soft_link: "x is a link",
    group: "x is a link or a group",
    virtual: "x lies in another file",
    raw_storage: "x lies in another file",
    text: r"x holds \|S2",
    variable_length: "x holds object",
    ragged: "x holds object",
    reference: "x holds object",
    compound: "x holds",
    array_type: "shape|holds|filters|claims",
    scalar: r"shape \(\)",
    nothing: "shape None|has no",
    short: r"shape \(5, 2\), the part has 6 rows",
    huge: "claims 52776558133248 bytes in a file of",
    bomb: "claims 50331648 bytes in a file of",
    compressed: "filters",
    no_checksum: r"filters \[\]",
    rows_of_text: "rows is no whole number",
    many_rows: "rows is no whole number",
    no_format: "locate attribute",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_hostile_part_is_refused(make, table, secret):
    with part(table) as file:
        make(file, secret)
    tracemalloc.start()
    with pytest.raises(EcifError, match=r"is damaged \(.*(" + HOSTILE[make] + r").*\. Delete .* and run again"):
        table.read("0", "x")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_plain_part_made_the_same_way_is_read(table, secret):
    """So the tests above fail for the reason that they name."""
    with part(table) as file:
        plain(file)
        plain(file, np.array([b"a" * 32] * 6), name="key")
    found = table.read("0", "x", "key")
    assert (found["x"] == ROWS).all()
    with part(table) as file:
        plain(file, name="key")
    with pytest.raises(EcifError, match="key holds float64"):
        table.read("0", "key")


def test_parts_that_do_not_fit_together_are_refused(table):
    table.write("0", {"x": np.ones((2, 3))})
    table.write("1", {"x": np.ones((2, 4))})
    with pytest.raises(EcifError, match="is damaged"):
        table.read_all("x")


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "pipe", "folder"])
def test_a_part_that_is_no_file_is_refused_unopened(kind, table, tmp_path):
    other = Store("hostile-store").table("other")
    other.write("0", {"x": ROWS})
    if kind == "link to a folder":
        moved = tmp_path / "elsewhere"
        other.folder.rename(moved)
        table.folder.symlink_to(moved)
    else:
        table.folder.mkdir(parents=True)
        path = table.folder / "0.h5"
        if kind == "link to a file":
            path.symlink_to(other.folder / "0.h5")
        else:
            os.mkfifo(path) if kind == "pipe" else path.mkdir()
    assert table.parts() == ["0"]
    start = time.monotonic()
    with pytest.raises(EcifError, match="no plain file"):
        table.read("0", "x")
    assert time.monotonic() - start < 5  # nobody waits for what comes out of a pipe


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".hidden", "", "x\0y", "é/../.."])
def test_names_from_a_database_cannot_leave_the_cache(name, table):
    """Names of stores and tables are in the records of runs, which come with a dataset that somebody shares."""
    with pytest.raises(EcifError, match="not a name"):
        Store("hostile-store", name)
    with pytest.raises(EcifError, match="not a name"):
        Store("hostile-store").table(name)
    with pytest.raises(EcifError, match="not a name of a part"):
        table.read(name, "x")
    with pytest.raises(EcifError, match="not a name of a part"):
        table.write(name, {"x": ROWS})
    with pytest.raises(EcifError, match="not a name for a slice"):
        slice_names({name: None} if name else {"a b": None})


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.fixture
def evil(tmp_path):
    """Bytes that torch.load and pickle would run, and the file that says that they did."""
    proof = tmp_path / "proof"
    torch.save({"state": Evil(proof), "digest": Evil(proof)}, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert proof.exists()  # it does bite
    proof.unlink()
    yield {"torch": (tmp_path / "evil.pt").read_bytes(), "pickle": pickle.dumps(Evil(proof))}
    assert not proof.exists()


@pytest.mark.parametrize("format", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.safetensors", "model.npz", "model.npy"])
def test_a_malicious_checkpoint_runs_nothing(format, name, evil, tmp_path):
    path = tmp_path / name
    path.write_bytes(evil[format])
    with pytest.raises(EcifError, match=r"could not load model|cannot be read|holds objects of Python"):
        OpenClipEncoder(training.MODEL, str(path), "cpu")


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "pytorch_model.bin"])
def test_a_malicious_model_folder_runs_nothing(name, evil, tmp_path):
    import open_clip

    folder = tmp_path / "model"
    folder.mkdir()
    settings = {"model_cfg": open_clip.get_model_config(training.MODEL), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    (folder / name).write_bytes(evil["torch"])
    with pytest.raises(EcifError, match="could not load model"):
        OpenClipEncoder(f"local-dir:{folder}", None, "cpu")


@pytest.mark.parametrize("format", ["torch", "pickle"])
def test_malicious_files_beside_a_checkpoint_run_nothing(format, evil, made, tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(Path(made[1]).read_bytes())
    for name, said in (("adapters", "adapters .* cannot be read"), ("preprocessing.json", "cannot be used")):
        extra = weights.with_name(f"model.pt.{name}")
        extra.write_bytes(evil[format])
        with pytest.raises(EcifError, match=said):
            OpenClipEncoder(training.MODEL, str(weights), "cpu")
        extra.unlink()
    assert OpenClipEncoder(training.MODEL, str(weights), "cpu").adapters is None


@pytest.mark.parametrize("format", ["torch", "pickle"])
def test_a_malicious_saved_state_runs_nothing(format, evil, dataset, made, tmp_path):
    (tmp_path / "tuned.pt.resume").write_bytes(evil[format])
    settings = FitSettings(model=training.MODEL, pretrained=made[1])
    with pytest.raises(EcifError, match=r"tuned\.pt\.resume is damaged"):
        list(fit_steps(dataset.match_tags("train"), tmp_path / "tuned.pt", settings, device="cpu"))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"A.w": torch.ones(2, 3)},
        {"A.w": torch.ones(2, 3), "B.w": torch.ones(3, 4)},
        {"A.w": torch.ones(2), "B.w": torch.ones(2)},
        {"A.w": torch.ones(2, 3), "B.w": torch.full((3, 2), torch.nan)},
        {"A.w": torch.ones(2, 3), "B.w": torch.ones(3, 2), "C.w": torch.ones(1)},
        {"A.w": torch.ones(2, 3), "B.w": torch.ones(3, 2), "A.v": torch.ones(1, 3), "B.v": torch.ones(3, 1)},
        {"A.w": torch.ones(2, 3, dtype=torch.int32), "B.w": torch.ones(3, 2, dtype=torch.int32)},
    ],
)
def test_adapters_that_are_none_are_refused(parts, tmp_path):
    (tmp_path / "model.pt").touch()
    save_file(parts, tmp_path / "model.pt.adapters")
    with pytest.raises(EcifError, match=r"adapters .* cannot be read"):
        load_adapters(str(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "{",
        '{"image_mean": "x"}',
        '{"image_mean": [0.5, 0.5]}',
        '{"image_mean": [NaN, 0, 0]}',
        '{"image_std": [0, 1, 1]}',
        '{"image_std": [true, 1, 1]}',
        '{"image_interpolation": "os.system"}',
        '{"image_resize_mode": null}',
        '{"image_resize_mode": ["squash"]}',
        "[" * 100_000,
    ],
)
def test_a_preprocessing_that_is_none_is_refused(said, tmp_path):
    (tmp_path / "model.pt").touch()
    (tmp_path / "model.pt.preprocessing.json").write_text(said)
    with pytest.raises(EcifError, match=r"model\.pt\.preprocessing\.json, which says how .* Delete it"):
        load_preprocessing(str(tmp_path / "model.pt"))


@pytest.mark.parametrize("path", ["../secret.raw", "/etc/passwd", "link.png", ""])
def test_a_table_of_pairs_names_no_file_elsewhere(path, secret, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "link.png").symlink_to(secret)
    (folder / "pairs.csv").write_text(f"filepath,caption\n{path},words\n")
    with pytest.raises(EcifError, match="line 2: there is no file"):
        read_folder(folder, "pairs")


FULL = """
import resource, signal, sys
import numpy as np
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.tables import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
table = Store("full-store").table("rows")
table.write("0", {"x": np.ones((10, 10))})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # as if the disk were full then
try:
    table.write("1", {"x": np.ones((1000, 1000))})
except EcifError as error:
    print(error)
print(table.parts(), sorted(path.name for path in table.folder.iterdir()), table.read("0", "x")["x"].sum())
Store("full-store").delete()
"""


def test_a_write_that_the_disk_cannot_take_is_said_and_leaves_nothing():
    """A real failure of a real write, in a process of its own: HDF5 itself says nothing of it and crashes later."""
    ran = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    said, left = ran.stdout.splitlines()
    assert said.startswith("The store cannot be written (")
    assert said.endswith("set FIFTYONE_ECIF_CACHE_DIR to another folder; then run again")
    assert left == "['0'] ['0.h5'] 100.0"


def test_nothing_in_the_store_is_pickled(dataset, score):
    """All that a run keeps is numbers in HDF5."""
    score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True)
    home = cache_folder() / f"format-{FORMAT}" / str(dataset._doc.id)
    kept = [path for path in home.rglob("*") if path.is_file() and path.name[0] != "."]
    assert {path.suffix for path in kept} == {".h5"}
    for path in kept:
        with h5py.File(path) as file:
            assert all(column.dtype.kind in "biufS" for column in file.values())
