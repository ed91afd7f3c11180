"""What goes wrong while a job runs ends in a clear error or a right result, never a wrong number on a sample."""

import gc
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import fiftyone as fo
import numpy as np
import pytest
import torch
from bson.errors import InvalidStringData
from click.testing import CliRunner
from fiftyone.core.brain import BrainMethod
from fiftyone.core.odm import RunDocument, get_db_conn
from forking import forked_python
from PIL import Image

from fiftyone_ecif import EcifError, delete_run, export_pairs, list_runs, review_misalignment, staleness, trace
from fiftyone_ecif.api import preparation
from fiftyone_ecif.api.influence import influence_steps
from fiftyone_ecif.api.misalignment import compute_misalignment
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.api.tracing import mark_traces
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.demo import training
from fiftyone_ecif.install.database import mongod
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.store import tables as store
from fiftyone_ecif.store.tables import Store

FIELDS = ("ecif_influence", "ecif_positive", "ecif_negative", "ecif_rank")


@pytest.fixture
def train(dataset):
    return dataset.match_tags("train")


@pytest.fixture
def val(dataset):
    return dataset.match_tags("val")


@pytest.fixture
def steps(dataset, made):
    """A scoring job to look into while it runs."""

    def run(**options):
        settings = InfluenceSettings(model=training.MODEL, pretrained=made[1], batch_size=24, **options)
        return influence_steps(
            dataset.match_tags("train"), dataset.match_tags("val"), settings, JobSettings(num_workers=0)
        )

    return run


def until(work, stage):
    """Drives work to a stage."""
    for step in work:
        if step.stage == stage:
            return
    raise AssertionError(f"no stage {stage}")


def scores_of(dataset):
    dataset.reload()
    return {name: dataset.sort_by("filepath").values(name) for name in FIELDS if dataset.has_sample_field(name)}


def everything_in(dataset, key="ecif"):
    """What a run is in the database, and its fields."""
    dataset.reload()
    results = dataset.load_brain_results(key, cache=False)
    info = dataset.get_brain_info(key)
    fields = {name: dataset.get_field(name).description for name in FIELDS if dataset.has_sample_field(name)}
    run = info.timestamp, info.config.serialize(), results.serialize(), dataset.load_brain_view(key)._serialize(False)
    return run, fields, scores_of(dataset)


class Killed(BaseException):
    """Stands for the end of a process; test_kills.py kills real ones."""


def die_when(monkeypatch, name, number):
    """Ends the job at the ``number``-th call of a method that writes to the dataset."""
    original, calls = getattr(fo.Dataset, name), []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(fo.Dataset, name, dies)


def fail_when(monkeypatch, name, number):
    """Fails the ``number``-th call of a method that writes to the dataset."""
    original, calls = getattr(fo.Dataset, name), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise ValueError("too large")
        return original(*args, **kwargs)

    monkeypatch.setattr(fo.Dataset, name, fails)


# Fields, all or none


@pytest.mark.parametrize("number", [3, 6])
def test_a_half_replaced_run_is_finished_when_runs_are_listed(number, dataset, train, val, score, monkeypatch):
    score(train, val, seed=1)
    old = scores_of(dataset)
    with monkeypatch.context() as patch:
        die_when(patch, "set_values", number)
        with pytest.raises(Killed):
            score(train, val, overwrite=True)
    half = scores_of(dataset)
    (run,) = list_runs(dataset)
    assert run.scored == 72
    found = scores_of(dataset)
    for name in FIELDS:  # at no time old beside new
        kept, fresh = np.array(half[name], float), np.array(found[name], float)
        is_old, is_new = kept == np.array(old[name], float), kept == fresh
        assert not ((is_old & ~is_new).any() and (is_new & ~is_old).any())
    score(train, val, brain_key="other")
    assert found["ecif_influence"] == dataset.sort_by("filepath").values("other_influence")


@pytest.mark.parametrize("name", ["add_sample_field", "create_index"])
def test_a_job_that_was_killed_while_it_wrote_can_be_run_again_as_it_was(name, dataset, train, val, score, monkeypatch):
    with monkeypatch.context() as patch:
        die_when(patch, name, 2)
        with pytest.raises(Killed):
            score(train, val)
    score(train, val)  # the key is not taken by its own first try
    with pytest.raises(EcifError, match="is taken"):
        score(train, val)
    assert [run.scored for run in list_runs(dataset)] == [72]
    assert dataset.count("ecif_influence") == dataset.count("ecif_rank") == 72


def test_a_dataset_that_takes_no_more_indexes_is_scored(dataset, train, val, score):
    """MongoDB allows 64."""
    taken = len(dataset._sample_collection.index_information())
    for number in range(64 - taken):
        dataset.add_sample_field(f"own_{number}", fo.FloatField)
        dataset.create_index(f"own_{number}")
    score(train, val)
    assert [run.scored for run in list_runs(dataset)] == [72]
    assert dataset.count("ecif_influence") == 72
    delete_run(dataset, "ecif")


@pytest.fixture
def read_only(dataset):
    """Makes a field read-only."""

    def make(name):
        field = dataset.get_field(name)
        field.read_only = True
        field.save()

    return make


def test_a_read_only_field_is_refused_before_work(dataset, train, val, score, read_only, monkeypatch):
    score(train, val, seed=1)
    before = everything_in(dataset)
    read_only("ecif_positive")
    monkeypatch.setattr(preparation, "load_encoder", None)
    with pytest.raises(EcifError, match=r"'ecif_positive' is read-only. Allow writing"):
        score(train, val, overwrite=True)
    assert everything_in(dataset) == before


def test_a_field_that_turns_read_only_meanwhile_costs_nothing_that_is_there(
    dataset, train, val, score, read_only, monkeypatch
):
    results = score(train, val, seed=1)
    before = everything_in(dataset)
    original = fo.Dataset.set_values

    def late(self, *args, **kwargs):
        if not dataset.get_field("ecif_negative").read_only:
            read_only("ecif_negative")
            self.reload()
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fo.Dataset, "set_values", late)
        with pytest.raises(EcifError, match=r"Run 'ecif' cannot be written .*ecif_negative.* as it was"):
            score(train, val, overwrite=True)
    assert everything_in(dataset) == before
    assert dataset.load_brain_results("ecif") is results
    assert results.key == "ecif"


@pytest.mark.parametrize("number", range(1, 9))
def test_a_run_that_cannot_be_replaced_is_as_it_was(number, dataset, train, val, score, monkeypatch):
    """The ``number``-th write of values fails, as where MongoDB refuses a document."""
    score(train, val, seed=1, n_partitions=2)
    before = everything_in(dataset)
    with monkeypatch.context() as patch:
        fail_when(patch, "set_values", number)
        with pytest.raises(EcifError, match=r"Run 'ecif' cannot be written \(too large\). What was there before"):
            score(train.limit(50), val, overwrite=True)
    assert everything_in(dataset) == before
    assert not list(Store(str(dataset._doc.id)).folder.glob("writing/*.json"))
    score(train, val, overwrite=True)
    assert [run.scored for run in list_runs(dataset)] == [72]


@pytest.mark.parametrize("number", range(1, 5))
def test_a_new_run_that_cannot_be_written_leaves_nothing(number, dataset, train, val, score, monkeypatch):
    with monkeypatch.context() as patch:
        fail_when(patch, "set_values", number)
        with pytest.raises(EcifError, match="too large"):
            score(train, val)
    assert dataset.list_brain_runs() == []
    assert scores_of(dataset) == {}
    assert get_db_conn()["runs"].count_documents({"_dataset_id": dataset._doc.id}) == 0
    score(train, val)


def test_results_that_cannot_be_written_cost_nothing_that_is_there(dataset, train, val, score, monkeypatch):
    score(train, val, seed=1)
    before = everything_in(dataset)
    save, calls = BrainMethod.save_run_results, []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("too large")
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BrainMethod, "save_run_results", staticmethod(fails))
        with pytest.raises(EcifError, match="too large"):
            score(train.limit(50), val, overwrite=True)
    assert everything_in(dataset) == before


def test_traces_that_cannot_be_written_cost_nothing_that_is_there(dataset, train, val, score, monkeypatch):
    results = score(train, val)
    traces = trace(results, limit=1)
    before = everything_in(dataset)
    with monkeypatch.context() as patch:
        fail_when(patch, "set_values", 1)
        with pytest.raises(EcifError, match="too large"):
            mark_traces(results, traces)
    assert everything_in(dataset) == before
    assert not dataset.has_sample_field("ecif_trace")


def test_a_half_written_run_that_cannot_be_finished_is_taken_back(dataset, train, val, score, monkeypatch, caplog):
    score(train, val, seed=1)
    before = everything_in(dataset)
    with monkeypatch.context() as patch:
        die_when(patch, "set_values", 6)
        with pytest.raises(Killed):
            score(train, val, overwrite=True)
    with monkeypatch.context() as patch:
        fail_when(patch, "set_values", 6)
        assert [run.scored for run in list_runs(dataset)] == [72]
    assert "cannot be finished" in caplog.text
    assert everything_in(dataset) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"), [(RunDocument, "save"), (fo.Dataset, "save"), (fo.Dataset, "add_sample_field")]
)
def test_the_app_may_reload_the_dataset_while_a_run_is_written(
    owner, name, overwrite, dataset, train, val, score, monkeypatch
):
    """It does so in another thread; here before and after each call of a method of FiftyOne's."""
    if overwrite:
        score(train, val, seed=1)
    original, calls = getattr(owner, name), []

    def reloads(*args, **kwargs):
        calls.append(1)
        dataset.reload()
        gc.collect()
        found = original(*args, **kwargs)
        dataset.reload()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, reloads)
        results = score(train, val, overwrite=overwrite, n_partitions=2)
    assert calls
    assert [run.scored for run in list_runs(dataset)] == [72]
    assert dataset.load_brain_results("ecif") is results
    assert dataset.count("ecif_influence") == 72
    assert get_db_conn()["runs"].count_documents({"_dataset_id": dataset._doc.id}) == 1


def test_a_job_that_was_killed_as_it_registered_leaves_no_second_record(dataset, train, val, score, monkeypatch):
    """Else its tables would count as used for ever."""
    with monkeypatch.context() as patch:
        save = RunDocument.save

        def dies(*args, **kwargs):
            save(*args, **kwargs)
            raise Killed

        patch.setattr(RunDocument, "save", dies)
        with pytest.raises(Killed):
            score(train, val)
    runs = get_db_conn()["runs"]
    assert runs.count_documents({"_dataset_id": dataset._doc.id}) == 1
    assert [run.scored for run in list_runs(dataset)] == [72]
    (run,) = runs.find({"_dataset_id": dataset._doc.id})
    assert run["_id"] == dataset._doc.brain_methods["ecif"].id


@pytest.mark.parametrize("error", [MemoryError("none left"), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_said(error):
    def work():
        yield Progress("Solving", 0, 1)
        raise error

    with pytest.raises(EcifError, match=f"not enough memory .{error}.. Use a smaller batch_size"):
        follow(work(), progress=False)


def test_a_run_of_another_machine_that_was_stopped_is_seen_as_such(dataset, train, val, score, monkeypatch):
    """Where what was to be written is not at hand, the missing results tell."""
    with monkeypatch.context() as patch:
        die_when(patch, "set_values", 2)
        with pytest.raises(Killed):
            score(train, val)
    shutil.rmtree(Store(str(dataset._doc.id)).inside("writing").folder)
    (run,) = list_runs(dataset)
    assert "stopped before it was done" in str(run)
    told = CliRunner().invoke(main, ["trace", dataset.name])
    assert told.exit_code == 1
    assert "The run 'ecif' was stopped before it was done" in told.output
    delete_run(dataset, "ecif")
    assert scores_of(dataset) == {}


def test_a_damaged_note_of_what_to_write_is_dropped(dataset, train, val, score, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        die_when(patch, "set_values", 2)
        with pytest.raises(Killed):
            score(train, val)
    (note,) = Store(str(dataset._doc.id)).inside("writing").folder.glob("*.json")
    note.write_bytes(note.read_bytes().replace(b"0", b"1"))
    (run,) = list_runs(dataset)
    assert run.scored is None
    assert "cannot be finished" in caplog.text
    assert not note.exists()


def test_a_review_that_was_killed_while_it_wrote_is_finished(dataset, train, made, monkeypatch):
    audit = compute_misalignment(train, model=training.MODEL, pretrained=made[1], num_workers=0, batch_size=24)
    for sample in train.limit(20):
        sample.tags.append("misaligned" if sample.spoiled else "aligned")
        sample.save()
    with monkeypatch.context() as patch:
        die_when(patch, "set_values", 2)
        with pytest.raises(Killed):
            review_misalignment(audit)
    assert dataset.count("audit_misalignment") == 0  # no probabilities among ranks
    list_runs(dataset)
    assert dataset.count("audit_misalignment") == 72
    assert dataset.load_brain_results("audit", cache=False).config.reviewed
    expected = dict(zip(*train.values(["id", "audit_misalignment"]), strict=True))
    review_misalignment(dataset.load_brain_results("audit", cache=False))
    scores = dict(zip(*train.values(["id", "audit_misalignment"]), strict=True))
    assert scores == expected


# The disk


@pytest.mark.parametrize("place", ["parameters", "gradients", "writing", ""])
def test_a_full_disk_is_said_and_costs_nothing_that_is_there(place, dataset, train, val, score, steps, monkeypatch):
    score(train, val, seed=1)
    before = scores_of(dataset)

    replace = os.replace

    def full(source, target):
        if place in str(target):
            raise OSError(28, os.strerror(28))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", full)
        with pytest.raises(EcifError, match=r"No space left on device.*cache --free"):
            score(train, val, fit=True, overwrite=True)
    assert scores_of(dataset) == before
    assert not list(Store(str(dataset._doc.id)).folder.rglob("*.tmp"))
    assert [run.scored for run in list_runs(dataset)] == [72]
    score(train, val, fit=True, overwrite=True)
    assert scores_of(dataset) != before


@pytest.mark.parametrize(
    ("damage", "table"),
    [
        ("truncated", "images"),
        ("corrupt", "images"),
        ("corrupt", "gradients"),
        ("other version", "gradients"),
        ("lost", "gradients"),
    ],
)
def test_a_damaged_store_is_said_and_its_folder_can_be_deleted(damage, table, dataset, train, val, score):
    results = score(train, val)
    before = scores_of(dataset)
    names = results.config.store[:-1] if table == "images" else results.config.store
    folder = Store(*names).table(table).folder
    path = sorted(folder.iterdir())[0]
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "corrupt":
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    elif damage == "other version":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "FORMAT", 99)
            store.Table(folder).write(path.stem, {"row": np.arange(3)})
    else:
        path.unlink()
    if damage != "lost":
        with pytest.raises(EcifError, match=rf"{folder}.*Delete {folder} and run again"):
            score(train, val, overwrite=True)
        assert scores_of(dataset) == before
        shutil.rmtree(folder)
    elif table == "gradients":
        with pytest.raises(EcifError, match="The store of run 'ecif' is gone"):
            trace(results)
    score(train, val, overwrite=True)
    assert scores_of(dataset) == before
    assert trace(dataset.load_brain_results("ecif", cache=False))


TOGETHER = """
import sys, json
import fiftyone as fo
from fiftyone_ecif import EcifError, compute_influence
dataset = fo.load_dataset(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    compute_influence(dataset.match_tags("train"), target=dataset.match_tags("val"), model=sys.argv[2],
        pretrained=sys.argv[3], brain_key=sys.argv[4], num_workers=0, batch_size=24, fit=True, progress=False)
    print("done")
except EcifError as error:
    print(error)
"""


@pytest.mark.parametrize("keys", [("ecif", "other"), ("ecif", "ecif")])
def test_two_processes_on_one_store_at_once(keys, dataset, made, train, val, score, python):
    command = [*python, "-c", TOGETHER, dataset.name, training.MODEL, made[1]]
    both = [subprocess.Popen([*command, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for key in keys]
    for process in both:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate()[0].strip() for process in both)
    assert said[1] == "done"
    assert said[0] == "done" if keys[1] == "other" else "is taken" in said[0]
    dataset.reload()
    assert [run.scored for run in list_runs(dataset)] == [72] * len(set(keys))
    alone = score(train, val, brain_key="alone", fit=True)
    assert alone.ids
    for key in set(keys):
        np.testing.assert_allclose(train.values(f"{key}_influence"), train.values("alone_influence"), rtol=1e-6)


def test_another_job_that_took_the_key_meanwhile_is_not_overwritten(dataset, train, val, score, steps):
    work = steps(seed=3)
    until(work, "Writing fields")
    score(train, val, seed=1)
    before = scores_of(dataset)
    with pytest.raises(EcifError, match="'ecif' is taken"):
        follow(work, False)
    assert scores_of(dataset) == before


# The database

LOSE = """
import json, sys
import fiftyone as fo
import numpy as np
from PIL import Image
from fiftyone_ecif.api import influence as api
from fiftyone_ecif import EcifError, list_runs
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
folder, model, weights, when = sys.argv[1:]
pairs = json.load(open(f"{folder}/pairs.json"))
new = not fo.dataset_exists(folder)
dataset = fo.Dataset(folder, persistent=True) if new else fo.load_dataset(folder)
if new:
    dataset.add_samples([fo.Sample(path, caption=text, tags=tags) for path, text, tags in pairs], progress=False)
train, val = dataset.match_tags("train"), dataset.match_tags("val")
settings = InfluenceSettings(model=model, pretrained=weights, batch_size=24)

def work():
    for step in api.influence_steps(train, val, settings, JobSettings(num_workers=0)):
        if step.stage == when:
            print("now", flush=True)
            sys.stdin.readline()
        yield step

if when == "in the middle":
    original, calls = fo.Dataset.set_values, []
    def slow(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            print("now", flush=True)
            sys.stdin.readline()
        return original(self, *args, **kwargs)
    fo.Dataset.set_values = slow
try:
    follow(work(), False)
    dataset.reload()
    runs = [run.scored for run in list_runs(dataset)]
    print(json.dumps([runs, dataset.sort_by("filepath").values("ecif_influence")]), flush=True)
except EcifError as error:
    print(error, flush=True)
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A database of its own that can be killed and started again, and the command of a Python that uses it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home, running = tmp_path_factory.mktemp("database"), []
    command = [mongod(), "--dbpath", home, "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"]

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def start():
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        while not answers():
            assert running[-1].poll() is None
            time.sleep(0.1)

    def kill():
        running[-1].kill()
        running[-1].wait()

    start()
    uri = f"mongodb://127.0.0.1:{port}/?serverSelectionTimeoutMS=2000"
    with forked_python(home, FIFTYONE_DATABASE_URI=uri) as python:
        yield python, start, kill
    kill()


@pytest.mark.parametrize("when", ["Encoding captions", "in the middle"])
def test_a_database_that_is_lost_is_said_and_the_run_ends_alike(when, database, made, train, val, score, tmp_path):
    python, start, kill = database
    pairs = list(zip(*made[0].values(["filepath", "caption", "tags"]), strict=True))
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    environment = os.environ | {"FIFTYONE_ECIF_CACHE_DIR": str(tmp_path / "cache")}

    def run(when):
        return subprocess.Popen(
            [*python, "-c", LOSE, tmp_path, training.MODEL, made[1], when],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    job = run(when)
    while job.stdout.readline() != "now\n":
        assert job.poll() is None
    kill()
    said, _ = job.communicate("\n" * 1000)
    assert "FiftyOne's database does not answer any more" in said
    assert "run again" in said
    start()
    said, _ = run("never").communicate()
    runs, found = json.loads(said.splitlines()[-1])
    assert runs == [72]
    score(train, val)
    np.testing.assert_allclose(
        np.array(found, float), np.array(train._dataset.sort_by("filepath").values("ecif_influence"), float), rtol=1e-3
    )


# The data


def test_a_corrupt_image_in_the_middle_costs_only_itself(dataset, train, val, score, tmp_path):
    sample = train.sort_by("id").skip(30).first()
    broken = tmp_path / "broken.png"
    content = Path(sample.filepath).read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    score(train.exclude([sample.id]), val, brain_key="without")
    sample.filepath = str(broken)
    sample.save()
    results = score(train, val)
    assert list(results.skipped) == [sample.id]
    assert dataset[sample.id].ecif_influence is None
    assert train.values("ecif_influence") == train.values("without_influence")


def test_a_caption_of_ten_thousand_words_counts_as_its_beginning(dataset, train, val, score):
    """As in training: open_clip cuts captions at the length that the model can take."""
    sample = train.first()
    words = ("a red seven left of a green two " * 1250).split()
    found = []
    for count in (10_000, 200, 2):
        sample.caption = " ".join(words[:count])
        sample.save()
        score(train, val, overwrite=True)
        found.append(train.values("ecif_influence"))
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # how many captions are encoded at once changes their rounding
    assert found[0] != pytest.approx(found[2], rel=1e-2)
    assert np.isfinite(found[0]).all()


TEXTS = [
    "🏳️‍🌈👩🏽‍🚀",
    "שלום עולם",
    "مرحبا بالعالم",
    "e\u0301\u0301\u0301",
    "ﷺ" * 50,
    "零\u200d\u200b",
    "\0nul",
    "\u202eright to left",
]


def test_captions_in_all_writings_are_scored(dataset, train, val, score, tmp_path):
    for sample, text in zip(train.limit(len(TEXTS)), TEXTS, strict=True):
        sample.caption = text
        sample.save()
    results = score(train, val, fit=True)
    assert results.skipped == {}
    assert np.isfinite(train.values("ecif_influence")).all()
    assert not staleness(dataset, "ecif")
    assert export_pairs(train, tmp_path / "pairs.csv") == 72
    export_pairs(train, tmp_path / "pairs.json")
    assert [row["caption"] for row in json.loads((tmp_path / "pairs.json").read_text())[: len(TEXTS)]] == TEXTS


def test_half_a_character_cannot_be_a_caption(dataset, train):
    """The database takes no lone surrogates, so none reaches us."""
    sample = train.first()
    sample.caption = "half \ud83d"
    with pytest.raises((InvalidStringData, UnicodeEncodeError)):
        sample.save()


def test_blank_captions_are_no_pairs(dataset, train, val, score):
    blank = ["", " ", "\n\t", "\u3000", None]
    samples = list(train.limit(len(blank)))
    for sample, text in zip(samples, blank, strict=True):
        sample.caption = text
        sample.save()
    results = score(train, val)
    assert results.skipped == {sample.id: "caption: empty" for sample in samples}
    assert train.limit(len(blank)).values("ecif_influence") == [None] * len(blank)


# The dataset is edited while it is scored


def edit_caption(dataset, sample):
    sample.caption = "something else"
    sample.save()


def edit_image(dataset, sample):
    path = sample.filepath.replace(".png", "-edited.png")
    Image.new("RGB", (32, 32), "red").save(path)
    sample.filepath = path
    sample.save()


def delete_sample(dataset, sample):
    dataset.delete_samples([sample.id])


def clear_caption(dataset, sample):
    dataset.set_values("caption", {sample.id: None}, key_field="id")


@pytest.mark.parametrize(
    ("edit", "stage"),
    [
        (edit_caption, "Encoding images"),
        (edit_image, "Encoding images"),
        (delete_sample, "Scoring"),
        (edit_caption, "Writing fields"),
        (clear_caption, "Writing fields"),
    ],
)
def test_a_pair_that_is_edited_meanwhile_gets_no_score(edit, stage, dataset, train, val, score, steps, caplog):
    sample = train.sort_by("id").skip(7).first()
    copy = dataset.clone()  # which has the same ids and a cache of its own
    score(copy.match_tags("train"), copy.match_tags("val"))
    expected = dict(zip(*copy.match_tags("train").values(["id", "ecif_influence"]), strict=True))
    copy.delete()
    work = steps()
    until(work, stage)
    edit(dataset, sample)
    results = follow(work, False)
    found = dict(zip(*dataset.match_tags("train").values(["id", "ecif_influence"]), strict=True))
    assert found.pop(sample.id, None) is None
    assert found == {other: value for other, value in expected.items() if other != sample.id}
    assert "while it was scored" in results.skipped[sample.id]
    assert f"1 pairs have no score; the first is {sample.id}" in caplog.text
    (run,) = list_runs(dataset)
    assert (run.scored, run.skipped) == (71, 1)


@pytest.mark.parametrize("what", ["field", "samples", "dataset"])
def test_a_dataset_that_goes_meanwhile_is_said(what, dataset, steps):
    work = steps()
    until(work, "Scoring")
    if what == "field":
        dataset.delete_sample_field("caption")
    elif what == "samples":
        dataset.clear()
    else:
        dataset.delete()
    message = "The dataset was deleted" if what == "dataset" else "All pairs were changed or deleted"
    with pytest.raises(EcifError, match=message):
        follow(work, False)
    if what != "dataset":
        assert dataset.list_brain_runs() == []
        assert scores_of(dataset) == {}


def test_a_sample_that_is_deleted_while_its_score_is_written_does_not_come_back(
    dataset, train, val, score, monkeypatch
):
    sample, original = train.first(), fo.Dataset.set_values

    def late(self, *args, **kwargs):
        self.delete_samples([sample.id])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(fo.Dataset, "set_values", late)
    score(train, val)
    assert dataset.count() == 95
    assert dataset._sample_collection.count_documents({}) == 95
