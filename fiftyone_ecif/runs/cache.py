"""Who uses which tables of the cache, and what can go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import eta.core.utils as etau
from fiftyone.core.odm import get_db_conn

from fiftyone_ecif.store.tables import Store, outermost_stores

METHOD = "ecif"  # of all runs of this package, whatever their type


def release_store(dataset: Any, key: str, store: list[str]) -> None:
    """Deletes the tables that run ``key`` used and no other run uses."""
    unshared = unshared_store(dataset, key, store)
    if unshared is not None:
        unshared.delete()


def unshared_store(dataset: Any, key: str, store: list[str]) -> Store | None:
    """The tables that run ``key`` uses and no other run uses, None if there are none.

    A clone's runs still name the tables of the dataset that it was cloned from;
    those are not the clone's.
    """
    others = stores_in_use(dataset, key)
    if store[0] != str(dataset._doc.id) or store in others:
        return None
    return Store(*(store if store[:-1] in [other[:-1] for other in others] else store[:-1]))


def stores_in_use(dataset: Any = None, key: str = "") -> list[list[str]]:
    """Where the runs of all datasets have their tables, but for run ``key`` of a dataset."""
    runs = get_db_conn()["runs"].find({"config.method": METHOD, "config.store": {"$ne": None}})
    left_out = (None if dataset is None else dataset._doc.id, key)
    return [run["config"]["store"] for run in runs if (run["_dataset_id"], run["key"]) != left_out]


def database_id() -> str:
    """What tells FiftyOne's database from others."""
    return str(get_db_conn()["config"].find_one()["_id"])


_ABANDONED = 24 * 3600.0  # seconds after which a job that wrote nothing is taken for stopped


def size_text(count: int) -> str:
    """A number of bytes as people say it."""
    text: str = etau.to_human_bytes_str(count)
    return text


def cache_size(dataset: Any = None) -> int:
    """The bytes that the cache takes on disk.

    Args:
        dataset (None): of this FiftyOne dataset only.
    """
    stores = outermost_stores() if dataset is None else [Store(str(dataset._doc.id))]
    return _size(stores)


def unused_size() -> int:
    """The bytes that :func:`free_disk` would free."""
    return _size(_unused())


def free_disk() -> int:
    """Deletes from the cache what nothing uses.

    That are the caches of datasets that are gone, and the tables of runs that
    were stopped or overwritten, if nothing was written to them for a day. What a
    run uses stays, so do encoded features of datasets that are there, and caches
    of datasets in other databases.

    Returns:
        the bytes freed
    """
    unused = _unused()
    freed = _size(unused)
    for store in unused:
        store.delete()
    for home in outermost_stores():
        home.sweep(_ABANDONED)
    return freed


def _unused() -> list[Store]:
    used, database = stores_in_use(), database_id()
    datasets = {str(found) for found in get_db_conn()["datasets"].distinct("_id")}
    unused: list[Store] = []
    for home in outermost_stores():
        if home.owner != database:
            continue
        tables = [table for encoder in home.stores() for table in encoder.stores()]
        others = [table for table in tables if table.names not in used]
        if home.names[0] in datasets:
            runs = [table for table in others if table.names[-1].startswith("run-")]
            unused += [run for run in runs if time.time() - run.last_change() > _ABANDONED]
        else:  # a clone's runs can still use some of it
            unused += others if len(others) < len(tables) else [home]
    return unused


def _size(stores: Sequence[Store]) -> int:
    return sum(store.size() for store in stores)
