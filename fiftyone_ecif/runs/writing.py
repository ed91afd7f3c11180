"""Fields and runs onto a dataset, all or nothing.

What is to be written is put into one file of the store first, and what it takes
the place of. Then the old values of all its fields are cleared, the new ones set,
the results saved, and the file deleted. A job that is killed, or loses the database,
leaves that file, and :func:`finish_writing` does all of it again, which changes
nothing that is done. Where something cannot be written, what was there before is
put back. So a run is replaced as a whole or not at all, and at no time does one
sample have an old score and another a new one.

Where the store is not at hand, such as on another machine, a run that is not
written to its end is known by its results, which are saved last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bson import json_util
from fiftyone.core.brain import BrainMethod
from fiftyone.core.odm import RunDocument
from filelock import FileLock, Timeout
from pymongo.errors import ConnectionFailure, OperationFailure

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.runs.base import ScoreField, check_key, check_writable
from fiftyone_ecif.runs.cache import METHOD, release_store
from fiftyone_ecif.runs.own_dataset import own_dataset
from fiftyone_ecif.runs.sidebar import forget_fields, show_fields
from fiftyone_ecif.runs.version import RunVersion, new_version, restored_version, version_in
from fiftyone_ecif.samples.pairs import every_sample, is_as_it_was, pairs_now
from fiftyone_ecif.store.files import write_file
from fiftyone_ecif.store.keys import digest
from fiftyone_ecif.store.known_files import KnownFiles
from fiftyone_ecif.store.tables import Store

logger = logging.getLogger(__name__)


class Writing(NamedTuple):
    """What is to be written.

    Attributes:
        key: of the run.
        new: whether the run is new, or replaces another one under its key.
        after: what there shall be.
        before: what there was, of the run and its fields.
    """

    key: str
    new: bool
    after: RunVersion
    before: RunVersion


def write_run(results: Any, columns: Mapping[str, Any], overwrite: bool) -> None:
    """Writes the fields of a run and registers it, in place of a run that it overwrites.

    Pairs that were changed or deleted since they were read get no value, and
    join the skipped.

    Args:
        results: of the run, which know its samples, key, configuration and pairs.
        columns: a value for each pair, by the end of the field's name.
        overwrite: whether a run of the same key may be replaced.

    Raises:
        EcifError: if another job took the key meanwhile, no pair is as it was,
            or it cannot be written; what was there before is still there then
    """
    dataset, key, config = results.samples._dataset, results.key, results.config
    try:
        home = _home(dataset)
        dataset.reload()
    except ValueError as error:
        raise EcifError(f"The dataset was deleted while it was scored ({error}). Nothing was written") from error
    with FileLock(home.lock()):
        dataset.reload()
        check_key(dataset, key, overwrite, config)
        edited = _edited(dataset, config, results.ids, results.digests)
        if len(edited) == len(results.ids):
            raise EcifError(
                f"All pairs were changed or deleted while they were scored; sample {results.ids[0]}: "
                f"{edited[results.ids[0]]}. Nothing was written. Run again"
            )
        results.skipped |= edited
        scores = {
            f"{key}_{name}": {
                sample: value
                for sample, value in zip(results.ids, np.asarray(column).tolist(), strict=True)
                if sample not in edited
            }
            for name, column in columns.items()
        }
        _write(dataset, key, True, new_version(results, scores))
    if edited:
        sample, reason = next(iter(edited.items()))
        logger.warning("%d pairs have no score; the first is %s (%s)", len(edited), sample, reason)


def write_scores(results: Any, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes some fields of a run that is there, and saves its configuration and results.

    Args:
        results: of the run.
        scores: ``{field: {sample id: value}}``; samples that are not named lose
            the value they had, and those that are gone are left out.

    Raises:
        EcifError: if they cannot be written; what was there before is still there then
    """
    dataset = results.samples._dataset
    with FileLock(_home(dataset).lock()):
        dataset.reload()
        check_writable(dataset, scores)
        named = {sample for values in scores.values() for sample in values}
        there = set(every_sample(dataset).select(list(named)).values("id"))
        known = {
            name: {sample: value for sample, value in values.items() if sample in there}
            for name, values in scores.items()
        }
        _write(dataset, results.key, False, new_version(results, known))


def finish_writing(dataset: Any) -> list[str]:
    """Does what jobs had begun to write to a dataset when they were killed.

    Args:
        dataset: a FiftyOne dataset.

    Returns:
        the keys of the runs that were finished
    """
    home = _home(dataset)
    files = sorted(_folder(home).glob("*.json"))
    finished: list[str] = []
    if files:
        try:
            with FileLock(home.lock(), timeout=0):
                dataset.reload()
                for file in files:
                    finished += _finish(dataset, file)
        except Timeout:  # the job that writes them is alive
            pass
    return finished


def _write(dataset: Any, key: str, new: bool, after: RunVersion) -> None:
    old = dataset.get_brain_info(key).config.fields(key) if new and dataset.has_brain_run(key) else {}
    writing = Writing(key, new, after, version_in(dataset, key, {**after.scores, **old}))
    file = _folder(_home(dataset)) / f"{digest(key)}.json"
    told = json_util.dumps(
        {"key": key, "new": new, "after": writing.after.serialize(), "before": writing.before.serialize()}
    )
    write_file(file, f"{digest(told)}\n{told}".encode())
    known = dataset._brain_cache.pop(key, None)
    try:
        _carry_out(dataset, writing)
    except ConnectionFailure:  # it is finished once the database is back
        raise
    except Exception as error:
        _put_back(dataset, writing)
        if known is not None:
            dataset._brain_cache[key] = known
        _forget(file)
        raise EcifError(f"Run {key!r} cannot be written ({error}). What was there before is as it was") from error
    _forget(file)
    dataset._brain_cache[key] = after.results
    if new and known is not None:
        known._key = None  # as FiftyOne does, so that it is not saved in place of the new one


def _finish(dataset: Any, file: Path) -> list[str]:
    """Does what a file says, and deletes it; returns the run's key if that worked."""
    writing = None
    try:
        check, told = file.read_text(encoding="utf-8").split("\n", 1)
        if check != digest(told):
            raise ValueError("it is damaged")
        found = json_util.loads(told)
        key = found["key"]
        before = restored_version(dataset, key, found["before"])
        after = restored_version(dataset, key, found["after"])
        writing = Writing(key, found["new"], after, before)
        dataset._brain_cache.pop(key, None)
        _carry_out(dataset, writing)
    except ConnectionFailure:
        raise
    except Exception as error:  # whatever it is, it must not come back each time that runs are listed
        logger.warning("A run that was stopped while it was written cannot be finished (%s): %s", file, error)
        if writing is not None:
            _put_back(dataset, writing)
        _forget(file)
        return []
    _forget(file)
    logger.info("Finished writing the run %r, which was stopped while it was written", key)
    return [key]


def _carry_out(shared: Any, writing: Writing) -> None:
    key, after, before = writing.key, writing.after, writing.before
    config, fields = after.config, after.config.fields(key)
    with own_dataset(shared) as dataset:
        if writing.new:
            _register(dataset, key, after)
        else:
            config.build().update_run_config(dataset, key, config)
        for name in after.scores:
            _clear(dataset, name, fields[name])
        for name, values in after.scores.items():
            _fill(dataset, name, values, fields[name])
        if writing.new:
            show_fields(dataset, key, fields)
        config.build().save_run_results(dataset, key, after.results, cache=False)
        if writing.new and before.config is not None:
            gone = [name for name in before.config.fields(key) if name not in fields]
            dataset.delete_sample_fields([name for name in gone if dataset.has_sample_field(name)])
            forget_fields(dataset, gone)
            if before.config.store != config.store:
                release_store(dataset, "", before.config.store)


def _put_back(shared: Any, writing: Writing) -> None:
    """Makes a run and its fields what they were before they were written, as far as that can be."""
    key, before = writing.key, writing.before
    with own_dataset(shared) as dataset:
        with _going_on(f"Run {key!r}"):
            if before.config is None:
                if dataset.has_brain_run(key):
                    BrainMethod.delete_run(dataset, key, cleanup=False)
            elif writing.new:
                _register(dataset, key, before)
            else:
                before.config.build().update_run_config(dataset, key, before.config)
            if before.results is not None:
                before.results.backend.save_run_results(dataset, key, before.results, cache=False)
        known = (before.config or writing.after.config).fields(key)
        for name in {**writing.after.scores, **before.scores}:
            with _going_on(f"Field {name!r}"):
                if name not in before.scores:
                    if dataset.has_sample_field(name):
                        dataset.delete_sample_field(name)
                        forget_fields(dataset, [name])
                elif version_in(dataset, key, [name]).scores.get(name) != before.scores[name]:
                    _clear(dataset, name, known[name])
                    _fill(dataset, name, before.scores[name], known[name])


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    try:
        yield
    except ConnectionFailure:
        raise
    except Exception as error:
        logger.error("%s could not be made again what it was (%s)", what, error)


def _register(dataset: Any, key: str, version: RunVersion) -> None:
    """Records a run in place of any other under its key."""
    version.config.build().register_run(dataset, key, cleanup=False)
    document = dataset._doc.brain_methods[key]
    document.view_stages = version.stages
    document.timestamp = version.when or document.timestamp
    document.save()
    for orphan in RunDocument.objects(dataset_id=dataset._doc.id, key=key, config__method=METHOD, id__ne=document.id):
        if orphan.results:  # of a job that was killed as it registered
            orphan.results.delete()
        orphan.delete()


def _clear(dataset: Any, name: str, field: ScoreField) -> None:
    """Adds a field, or takes its values away."""
    if dataset.has_sample_field(name):
        old = every_sample(dataset).exists(name).values("id")
        dataset.set_values(name, dict.fromkeys(old), key_field="id")
    else:
        dataset.add_sample_field(name, field.type, description=field.description)


def _fill(dataset: Any, name: str, values: Mapping[str, Any], field: ScoreField) -> None:
    """Gives an empty field its values, an index and its description."""
    dataset.set_values(name, dict(values), key_field="id")
    with contextlib.suppress(OperationFailure):  # MongoDB allows 64 for a dataset; sorting only takes longer
        dataset.create_index(name)
    written = dataset.get_field(name)
    if written.description != field.description:  # what was there before may have meant something else
        written.description = field.description
        written.save()


def _edited(dataset: Any, config: Any, ids: list[str], digests: list[str]) -> dict[str, str]:
    """Which of some pairs are not what they were when they were read, and what happened to them."""
    pairs = pairs_now(dataset, config.caption_field)
    edited, known = {}, KnownFiles(Store(*config.store[:-1]))
    for sample, before in zip(ids, digests, strict=True):
        if sample not in pairs:
            edited[sample] = "deleted while it was scored"
        elif not is_as_it_was(*pairs[sample], before, known):
            edited[sample] = "caption or image changed while it was scored"
    return edited


def _forget(file: Path) -> None:
    """Deletes a file, and its folder once that is empty."""
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def _home(dataset: Any) -> Store:
    return Store(str(dataset._doc.id))


def _folder(home: Store) -> Path:
    return home.inside("writing").folder
