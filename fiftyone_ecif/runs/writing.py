"""Fields and runs onto a dataset, all or nothing.

What is to be written is put into one file of the store first. Then the old
values of all its fields are cleared, the new ones set, the results saved, and
the file deleted. A job that is killed, or loses the database, leaves that file,
and :func:`finish_writing` does all of it again, which changes nothing that is
done. So a run is replaced as a whole or not at all, and at no time does one
sample have an old score and another a new one.

Where the store is not at hand, such as on another machine, a run that is not
written to its end is known by its results, which are saved last.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bson import json_util
from fiftyone.core.brain import BrainMethodConfig, BrainResults
from fiftyone.core.odm import RunDocument
from fiftyone.core.view import DatasetView
from filelock import FileLock, Timeout
from pymongo.errors import ConnectionFailure, OperationFailure

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.runs.base import check_key
from fiftyone_ecif.runs.cache import METHOD, release_store
from fiftyone_ecif.runs.own_dataset import own_dataset
from fiftyone_ecif.runs.sidebar import forget_fields, show_fields
from fiftyone_ecif.samples.pairs import digest_now, every_sample, pairs_now
from fiftyone_ecif.store.files import write_file
from fiftyone_ecif.store.keys import digest
from fiftyone_ecif.store.tables import Store

logger = logging.getLogger(__name__)


class Writing(NamedTuple):
    """What is to be written.

    Attributes:
        key: of the run.
        new: whether the run is new, or replaces another one under its key.
        scores: ``{field: {sample id: value}}``; other samples have no value then.
        replaced: the configuration of the run that is replaced, if there is one.
    """

    key: str
    new: bool
    scores: Mapping[str, Mapping[str, Any]]
    replaced: Any = None


def write_run(results: Any, columns: Mapping[str, Any], overwrite: bool) -> None:
    """Writes the fields of a run and registers it, in place of a run that it overwrites.

    Pairs that were changed or deleted since they were read get no value, and
    join the skipped.

    Args:
        results: of the run, which know its samples, key, configuration and pairs.
        columns: a value for each pair, by the end of the field's name.
        overwrite: whether a run of the same key may be replaced.

    Raises:
        EcifError: if another job took the key meanwhile, or no pair is as it was
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
        edited = _edited(dataset, config.caption_field, results.ids, results.digests)
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
        replaced = dataset.get_brain_info(key).config if dataset.has_brain_run(key) else None
        _write(results, Writing(key, True, scores, replaced))
    if edited:
        sample, reason = next(iter(edited.items()))
        logger.warning("%d pairs have no score; the first is %s (%s)", len(edited), sample, reason)


def write_scores(results: Any, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes some fields of a run that is there, and saves its configuration and results.

    Args:
        results: of the run.
        scores: ``{field: {sample id: value}}``; samples that are not named lose
            the value they had, and those that are gone are left out.
    """
    dataset = results.samples._dataset
    with FileLock(_home(dataset).lock()):
        dataset.reload()
        named = {sample for values in scores.values() for sample in values}
        there = set(every_sample(dataset).select(list(named)).values("id"))
        known = {
            name: {sample: value for sample, value in values.items() if sample in there}
            for name, values in scores.items()
        }
        _write(results, Writing(results.key, False, known))


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


def _write(results: Any, writing: Writing) -> None:
    file = _folder(_home(results.samples._dataset)) / f"{digest(writing.key)}.json"
    told = json_util.dumps(
        {
            **writing._asdict(),
            "replaced": writing.replaced and writing.replaced.serialize(),
            "config": results.config.serialize(),
            "results": results.serialize(),
            "view": _stages(results.samples),
        }
    )
    write_file(file, f"{digest(told)}\n{told}".encode())
    _carry_out(results, writing)
    _forget(file)


def _finish(dataset: Any, file: Path) -> list[str]:
    """Does what a file says, and deletes it; returns the run's key if that worked."""
    try:
        check, told = file.read_text(encoding="utf-8").split("\n", 1)
        if check != digest(told):
            raise ValueError("it is damaged")
        found = json_util.loads(told)
        view = dataset if found["view"] is None else DatasetView._build(dataset, found["view"])
        config = BrainMethodConfig.from_dict(found["config"])
        results = BrainResults.from_dict(found["results"], view, config, found["key"])
        replaced = found["replaced"] and BrainMethodConfig.from_dict(found["replaced"])
        _carry_out(results, Writing(found["key"], found["new"], found["scores"], replaced))
    except ConnectionFailure:
        raise
    except Exception as error:  # whatever it is, it must not come back each time that runs are listed
        logger.warning("A run that was stopped while it was written cannot be finished (%s): %s", file, error)
        _forget(file)
        return []
    _forget(file)
    logger.info("Finished writing the run %r, which was stopped while it was written", found["key"])
    return [found["key"]]


def _carry_out(results: Any, writing: Writing) -> None:
    shared = results.samples._dataset
    with own_dataset(shared) as dataset:
        stages = _stages(results.samples)
        samples = dataset if stages is None else DatasetView._build(dataset, stages)
        _carry_out_on(dataset, samples, results, writing)
    replaced = shared._brain_cache.pop(writing.key, None)
    if replaced is not None and replaced is not results:
        replaced._key = None  # as FiftyOne does, so that it is not saved in place of the new one
    shared._brain_cache[writing.key] = results


def _carry_out_on(dataset: Any, samples: Any, results: Any, writing: Writing) -> None:
    key, config, run = writing.key, results.config, results.backend
    fields = config.fields(key)
    if writing.new:
        run.register_run(samples, key, cleanup=False)
        _drop_orphans(dataset, key)
    else:
        run.update_run_config(samples, key, config)
    for name in writing.scores:
        if dataset.has_sample_field(name):
            old = every_sample(dataset).exists(name).values("id")
            dataset.set_values(name, dict.fromkeys(old), key_field="id")
        else:
            dataset.add_sample_field(name, fields[name].type, description=fields[name].description)
    for name, values in writing.scores.items():
        dataset.set_values(name, dict(values), key_field="id")
        with contextlib.suppress(OperationFailure):  # MongoDB allows 64 for a dataset; sorting only takes longer
            dataset.create_index(name)
        written = dataset.get_field(name)
        if written.description != fields[name].description:  # what was there before may have meant something else
            written.description = fields[name].description
            written.save()
    if writing.new:
        show_fields(dataset, key, fields)
    run.save_run_results(samples, key, results, cache=False)
    if writing.replaced is not None:
        gone = [name for name in writing.replaced.fields(key) if name not in fields]
        dataset.delete_sample_fields([name for name in gone if dataset.has_sample_field(name)])
        forget_fields(dataset, gone)
        if writing.replaced.store != config.store:
            release_store(dataset, "", writing.replaced.store)


def _drop_orphans(dataset: Any, key: str) -> None:
    """Deletes documents of a run that its dataset does not name, such as of a job that was killed as it registered."""
    named = dataset._doc.brain_methods[key].id
    for orphan in RunDocument.objects(dataset_id=dataset._doc.id, key=key, config__method=METHOD, id__ne=named):
        if orphan.results:
            orphan.results.delete()
        orphan.delete()


def _edited(dataset: Any, caption_field: str, ids: list[str], digests: list[str]) -> dict[str, str]:
    """Which of some pairs are not what they were when they were read, and what happened to them."""
    pairs = pairs_now(dataset, caption_field)
    edited = {}
    for sample, before in zip(ids, digests, strict=True):
        if sample not in pairs:
            edited[sample] = "deleted while it was scored"
        elif digest_now(*pairs[sample]) != before:
            edited[sample] = "caption or image changed while it was scored"
    return edited


def _stages(samples: Any) -> list[dict[str, Any]] | None:
    """Of a view; None of a dataset."""
    return samples._serialize(include_uuids=False) if isinstance(samples, DatasetView) else None


def _forget(file: Path) -> None:
    """Deletes a file, and its folder once that is empty."""
    file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        file.parent.rmdir()


def _home(dataset: Any) -> Store:
    return Store(str(dataset._doc.id))


def _folder(home: Store) -> Path:
    return home.inside("writing").folder
