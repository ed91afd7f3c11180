"""Runs are listed, found stale, renamed and deleted, and disk is freed of what nothing uses."""

import os
import shutil
from pathlib import Path

import fiftyone as fo
import numpy as np
import pytest
from fiftyone.core.brain import BrainMethod, BrainMethodConfig

from fiftyone_ecif import (
    EcifError,
    cache_size,
    compute_misalignment,
    delete_run,
    free_disk,
    list_runs,
    rename_run,
    staleness,
)
from fiftyone_ecif.demo import training
from fiftyone_ecif.runs.cache import unused_size
from fiftyone_ecif.runs.describe import describe_run
from fiftyone_ecif.runs.manage import Stale, removal
from fiftyone_ecif.store.files import cache_folder
from fiftyone_ecif.store.tables import Store

UNCHANGED = Stale(0, 0, 0)


class AlienConfig(BrainMethodConfig):
    """Of another plugin's runs."""

    type, method = "influence", "other"


class Alien(BrainMethod):
    """Another plugin's run."""


@pytest.fixture
def train(dataset):
    return dataset.match_tags("train")


@pytest.fixture
def influence(dataset, train, score):
    """A run on the training pairs."""
    return score(train, dataset.match_tags("val"), fit=True)


@pytest.fixture
def audit(made):
    """``compute_misalignment`` with the small model and quiet defaults."""
    defaults = {"model": training.MODEL, "pretrained": made[1], "num_workers": 0, "batch_size": 24}
    return lambda samples, **options: compute_misalignment(samples, **(defaults | options))


@pytest.fixture
def own_image(train, tmp_path):
    """A training pair whose image file no other test sees."""
    sample = train.first()
    path = tmp_path / "own.png"
    shutil.copy(sample.filepath, path)
    sample.filepath = str(path)
    sample.save()
    return path


def add_alien_run(dataset):
    Alien(AlienConfig()).register_run(dataset, "alien")


def edit_caption(sample, caption="a caption of today"):
    sample.caption = caption
    sample.save()


def make_older(folder, days=2):
    for path in folder.rglob("*"):
        seconds = path.stat().st_mtime - days * 86400
        os.utime(path, (seconds, seconds))


def tables(store):
    return {str(path.relative_to(store.folder)) for path in store.folder.rglob("*.h5")}


def fields_of(dataset, key):
    return sorted(field for field in dataset.get_field_schema() if field.startswith(f"{key}_"))


def test_runs_are_listed(dataset, train, influence, audit):
    broken = train.first()
    edit_caption(broken, "")
    audit(train, fit=False)
    add_alien_run(dataset)
    first, second = list_runs(dataset)
    assert (first.key, first.kind, first.model, first.pretrained) == (
        "audit",
        "misalignment",
        training.MODEL,
        influence.config.pretrained,
    )
    assert (first.scored, first.skipped) == (71, 1)
    assert (second.key, second.kind, second.scored, second.skipped) == ("ecif", "influence", 72, 0)
    assert first.fields == ["audit_misalignment", "audit_reason", "audit_duplicate"]
    assert second.when == dataset.get_brain_info("ecif").timestamp
    store = Store(*influence.config.store)
    assert second.cache_bytes == sum((store.folder / table).stat().st_size for table in tables(store)) > 0
    assert str(second).startswith(f"ecif — influence, {training.MODEL}, 72 pairs, ")
    assert list_runs(fo.Dataset()) == []


@pytest.mark.parametrize("kind", ["influence", "misalignment"])
def test_what_changed_since_a_run_is_counted(kind, dataset, train, own_image, score, audit):
    key = (score(train, dataset.match_tags("val")) if kind == "influence" else audit(train, fit=False)).key
    assert staleness(dataset, key) == UNCHANGED
    assert not staleness(dataset, key)
    train.limit(1).tag_samples("seen")
    edit_caption(dataset.match_tags("val").first(), "of no pair of the run")
    assert staleness(dataset, key) == UNCHANGED

    first, second, third, fourth = train.limit(4)
    edit_caption(second)
    assert staleness(dataset, key) == Stale(1, 0, 0)
    edit_caption(third, None)
    own_image.write_bytes(own_image.read_bytes() + b"more")
    assert staleness(dataset, key) == Stale(3, 0, 0)
    edit_caption(first)  # both of it
    assert staleness(dataset, key) == Stale(3, 0, 0)
    own_image.unlink()
    assert staleness(dataset, key) == Stale(3, 0, 0)
    dataset.delete_samples([fourth, second])
    assert staleness(dataset, key) == Stale(2, 2, 0)
    dataset.add_sample(fo.Sample(filepath=third.filepath, caption="new", tags=["train"]))
    dataset.add_sample(fo.Sample(filepath=third.filepath, caption="new", tags=["elsewhere"]))
    found = staleness(dataset, key)
    assert found == Stale(2, 2, 1)
    assert found
    assert str(found) == "2 changed, 2 deleted, 1 new"


def test_a_change_that_is_taken_back_is_none(dataset, train, influence):
    sample = train.first()
    before = sample.caption
    edit_caption(sample)
    assert staleness(dataset, "ecif").changed == 1
    edit_caption(sample, before)
    assert staleness(dataset, "ecif") == UNCHANGED


def test_runs_know_their_pairs_after_overwriting_renaming_and_cloning(dataset, train, influence, score):
    edit_caption(train.first())
    clone = dataset.clone()
    assert staleness(clone, "ecif").changed == 1
    clone.delete()
    rename_run(dataset, "ecif", "better")
    assert staleness(dataset, "better").changed == 1
    score(train, dataset.match_tags("val"), brain_key="better", overwrite=True)
    assert staleness(dataset, "better") == UNCHANGED


def test_skipped_samples_are_not_new(dataset, train, score):
    edit_caption(train.first(), "")
    score(train, dataset.match_tags("val"))
    assert staleness(dataset, "ecif") == UNCHANGED


def test_a_run_of_old_does_not_know(dataset, influence):
    influence.digests = None
    influence.save()
    found = staleness(dataset, "ecif")
    assert found == Stale(None, 0, 0)
    assert str(found) == "changes unknown"
    assert not found


def test_a_run_that_was_stopped_while_it_was_written(dataset, influence):
    influence.backend.save_run_results(dataset, "ecif", None)
    (run,) = list_runs(dataset)
    assert (run.scored, run.skipped) == (None, None)
    assert staleness(dataset, "ecif") == Stale(None, 0, 0)
    assert "stopped before it was done" in str(run)
    assert "Stopped before its results were written" in describe_run(dataset, "ecif")
    delete_run(dataset, "ecif")
    assert fields_of(dataset, "ecif") == []


def test_a_run_whose_view_or_caption_field_is_gone(dataset, train, score):
    dataset.add_sample_field("extra", fo.StringField)
    dataset.clone_sample_field("caption", "words")
    view = train.select_fields(["words", "extra"])
    score(view, dataset.match_tags("val"), caption_field="words", fit=True)
    dataset.delete_sample_field("extra")
    assert staleness(dataset, "ecif") == Stale(0, 0, None)
    dataset.delete_sample_field("words")
    assert staleness(dataset, "ecif").changed == 72
    assert list_runs(dataset)[0].scored == 72
    delete_run(dataset, "ecif")
    assert dataset.list_brain_runs() == []
    assert fields_of(dataset, "ecif") == []


def test_pairs_in_a_slice_of_a_group(made, score, tmp_path):
    dataset = fo.Dataset()
    dataset.add_group_field("group", default="other")
    samples = []
    for sample in made[0]:
        group = fo.Group()
        samples.append(
            fo.Sample(filepath=sample.filepath, caption=sample.caption, tags=sample.tags, group=group.element("pair"))
        )
        samples.append(fo.Sample(filepath=sample.filepath, group=group.element("other")))
    dataset.add_samples(samples, progress=False)
    pairs = dataset.select_group_slices("pair")
    score(pairs.match_tags("train"), pairs.match_tags("val"))
    assert staleness(dataset, "ecif") == UNCHANGED
    edit_caption(pairs.match_tags("train").first())
    assert staleness(dataset, "ecif") == Stale(1, 0, 0)
    dataset.delete()


def test_a_run_is_described(dataset, train, influence, audit):
    edit_caption(train.first())
    lines = describe_run(dataset, "ecif").splitlines()
    assert lines[0] == f"**ecif**: influence by {training.MODEL} {influence.config.pretrained}"
    assert "- Since then: 1 changed" in lines
    assert "- Pairs: 72 scored, 0 skipped" in lines
    assert "- Fields: ecif_influence, ecif_positive, ecif_negative, ecif_rank" in lines
    assert "- Fit the model to these pairs first: yes" in lines
    assert "- Validation pairs: 24" in lines
    assert f"- Loss on the validation pairs: {influence.diagnostics['target_loss']:.3g}" in lines
    found = audit(train, fit=False)
    lines = describe_run(dataset, "audit").splitlines()
    assert f"- {found.noise_rate}" in lines
    assert "- Since then: nothing changed" in lines
    assert "- Detector: calibrated" in lines


def test_renaming(dataset, train, influence):
    values, described = train.values("ecif_rank"), dataset.get_field("ecif_rank").description
    rename_run(dataset, "ecif", "better")
    assert dataset.list_brain_runs() == ["better"]
    assert fields_of(dataset, "ecif") == []
    assert fields_of(dataset, "better") == [f"better_{name}" for name in ("influence", "negative", "positive", "rank")]
    assert train.values("better_rank") == values
    assert dataset.get_field("better_rank").description == described
    indexes = dataset.list_indexes()
    assert set(fields_of(dataset, "better")) <= set(indexes)
    assert not [index for index in indexes if index.startswith("ecif_")]
    assert dataset.exists("better_rank").sort_by("better_rank").values("better_rank") == sorted(values)
    results = dataset.load_brain_results("better", cache=False)
    assert results.key == "better"
    assert len(results.clip_score()) == 72
    assert influence.key == "better"  # also what is in memory


@pytest.mark.parametrize(
    ("key", "new_key", "message"),
    [
        ("gone", "better", "has no run 'gone'. Runs: ecif$"),
        ("ecif", "a key", "'a key' is not a name"),
        ("ecif", "_x", "'_x' is not a name"),
        ("ecif", "ecif", "'ecif' is taken. Choose another one$"),
        ("ecif", "alien", "'alien' is taken. Choose another one$"),
        ("ecif", "mine", "a field 'mine_influence' already"),
    ],
)
def test_a_bad_name_changes_nothing(key, new_key, message, dataset, influence):
    dataset.add_sample_field("mine_influence", fo.FloatField)
    add_alien_run(dataset)
    fields = list(dataset.get_field_schema())
    with pytest.raises(EcifError, match=message):
        rename_run(dataset, key, new_key)
    assert list(dataset.get_field_schema()) == fields
    assert dataset.list_brain_runs() == ["alien", "ecif"]


def test_renaming_leaves_what_the_user_put_in_a_fields_place(dataset, influence):
    dataset.delete_sample_fields(["ecif_rank", "ecif_positive"])
    dataset.add_sample_field("ecif_rank", fo.IntField)
    rename_run(dataset, "ecif", "better")
    assert fields_of(dataset, "ecif") == ["ecif_rank"]
    assert fields_of(dataset, "better") == ["better_influence", "better_negative"]
    dataset.delete_sample_fields(fields_of(dataset, "better"))
    rename_run(dataset, "better", "best")
    assert dataset.list_brain_runs() == ["best"]


@pytest.mark.parametrize(
    "change", [lambda dataset: rename_run(dataset, "ecif", "new"), lambda d: delete_run(d, "ecif")]
)
def test_a_run_with_a_protected_field_is_kept_whole(change, dataset, influence):
    field = dataset.get_field("ecif_rank")
    field.read_only = True
    field.save()
    with pytest.raises(EcifError, match=r"The fields of run 'ecif' cannot be .*read-only"):
        change(dataset)
    assert dataset.list_brain_runs() == ["ecif"]
    assert len(fields_of(dataset, "ecif")) == 4
    assert len(influence.clip_score()) == 72
    field.read_only = False
    field.save()


def test_deleting_takes_the_runs_own_and_nothing_else(dataset, train, influence, score):
    other = score(train.limit(48), dataset.match_tags("val"), brain_key="other")
    shared = score(train, dataset.match_tags("val").limit(12), fit=True, brain_key="shared")
    assert shared.config.store == influence.config.store != other.config.store
    store, left = Store(*influence.config.store), Store(*other.config.store)
    fields, left_size = fields_of(dataset, "other"), left.size()
    gone = removal(dataset, "shared")
    assert (gone.fields, gone.cache_bytes) == (list(shared.config.fields("shared")), 0)
    assert delete_run(dataset, "shared") == gone
    assert len(influence.clip_score()) == 72

    before = cache_size(dataset)
    gone = removal(dataset, "ecif")
    assert gone.cache_bytes == store.size() > 0
    assert delete_run(dataset, "ecif") == gone
    assert cache_size(dataset) == before - gone.cache_bytes
    assert not store.folder.exists()
    assert len(tables(left)) > 3
    assert fields_of(dataset, "ecif") == fields_of(dataset, "shared") == []
    assert fields_of(dataset, "other") == fields

    assert delete_run(dataset, "other").cache_bytes > left_size  # the last, with the features
    assert cache_size(dataset) == 0
    assert not (cache_folder() / "format-1" / str(dataset._doc.id)).exists()
    with pytest.raises(EcifError, match=r"has no run 'ecif'\. Runs: none$"):
        delete_run(dataset, "ecif")


def test_deleting_leaves_tables_that_a_clones_run_uses(dataset, influence):
    clone = dataset.clone()
    assert removal(dataset, "ecif").cache_bytes == 0
    delete_run(dataset, "ecif")
    assert len(clone.load_brain_results("ecif").clip_score()) == 72
    assert removal(clone, "ecif").cache_bytes == 0
    delete_run(clone, "ecif")
    clone.delete()


def test_disk_is_freed_of_datasets_that_are_gone(dataset, influence, audit):
    gone = dataset.clone()
    audit(gone.match_tags("train"), fit=False, brain_key="own")
    size, home = cache_size(gone), cache_folder() / "format-1" / str(gone._doc.id)
    assert 0 < size < cache_size()
    kept = tables(Store(str(dataset._doc.id)))
    free_disk()
    assert home.exists()
    gone.delete()
    assert unused_size() == size
    assert free_disk() == size
    assert not home.exists()
    assert tables(Store(str(dataset._doc.id))) == kept
    assert free_disk() == unused_size() == 0


def test_a_clone_keeps_what_its_run_uses_when_the_original_is_gone(made, score):
    original = made[0].clone()
    train, val = original.match_tags("train"), original.match_tags("val")
    used = Store(*score(train, val).config.store)
    unused = Store(*score(train.limit(48), val, brain_key="other").config.store)
    clone = original.clone()
    clone.delete_brain_run("other")
    original.delete()
    assert free_disk() > 0
    assert len(clone.load_brain_results("ecif").clip_score()) == 72
    assert not unused.folder.exists()
    assert [store.names[-1] for store in Store(*used.names[:-1]).stores()] == [used.names[-1]]  # no features either
    clone.delete()
    assert free_disk() > 0
    assert not Store(used.names[0]).folder.exists()


def test_disk_is_freed_of_what_stopped_jobs_left(dataset, influence, score):
    stopped = Store(*influence.config.store[:-1], "run-stopped")
    shutil.copytree(Store(*influence.config.store).folder, stopped.folder)
    assert unused_size() == 0  # it may be running
    make_older(Store(str(dataset._doc.id)).folder)
    size = stopped.size()
    assert free_disk() == size > 0
    assert not stopped.folder.exists()
    assert len(influence.clip_score()) == 72
    assert {"images", "captions"} <= {store.names[-1] for store in Store(*influence.config.store[:-1]).stores()}


def test_caches_of_another_database_and_other_things_are_left_alone(dataset, influence):
    free_disk()
    gone = dataset.clone()
    theirs = Store("0" * 24)
    shutil.copytree(Store(str(dataset._doc.id)).folder, theirs.folder)
    theirs.claim("another database")
    other = Store("doctor")
    other.table("rows").write("0", {"x": np.ones(3)})
    gone.delete()
    assert free_disk() == unused_size() == 0
    assert theirs.folder.exists()
    assert other.folder.exists()
    theirs.claim(Store(str(dataset._doc.id)).owner)
    assert free_disk() > 0
    assert not theirs.folder.exists()
    other.delete()


def test_an_empty_cache(monkeypatch, tmp_path, dataset):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path / "none"))
    assert cache_size() == cache_size(dataset) == unused_size() == free_disk() == 0
    assert not Path(tmp_path / "none").exists()


@pytest.mark.parametrize("how", ["cloned view", "merged"])
def test_fields_that_a_run_elsewhere_left_are_taken_over_or_dropped(how, dataset, train, influence, score):
    fields = [f"ecif_{name}" for name in ("influence", "positive", "negative", "rank")]
    if how == "cloned view":
        other = dataset.limit(96).clone()
    else:
        other = fo.Dataset()
        other.merge_samples(dataset)
    assert other.list_brain_runs() == []
    assert all(other.has_sample_field(name) for name in fields)
    pairs = other.match_tags("train").limit(50), other.match_tags("val")
    with pytest.raises(EcifError, match=r"left over .*overwrite=True to take them over, or drop them") as said:
        score(*pairs)
    score(*pairs, overwrite=True)
    assert [other.count(name) for name in fields] == [50] * 4  # nothing is left of the others
    delete_run(other, "ecif")
    assert not any(other.has_sample_field(name) for name in fields)
    other.delete()
    advice = str(said.value).split("drop them: ")[1]
    copy = dataset.limit(96).clone()
    eval(advice, {"dataset": copy})
    score(copy.match_tags("train"), copy.match_tags("val"))
    copy.delete()


def test_a_field_of_the_users_is_never_taken_over(dataset, train, score):
    dataset.add_sample_field("ecif_rank", fo.IntField)
    for overwrite in (False, True):
        with pytest.raises(EcifError, match=r"which no run wrote.*or drop the field: dataset.delete_sample_field"):
            score(train, dataset.match_tags("val"), overwrite=overwrite)
