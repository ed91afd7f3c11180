"""The runs of a dataset: what they are, what they take, whether they still hold. No heavy imports: forms read it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.runs.base import check_key
from fiftyone_ecif.runs.cache import METHOD, size_text, unshared_store
from fiftyone_ecif.runs.reading import read_results
from fiftyone_ecif.runs.writing import finish_writing
from fiftyone_ecif.samples.pairs import is_as_it_was, pairs_now
from fiftyone_ecif.store.known_files import KnownFiles
from fiftyone_ecif.store.tables import Store


class RunEntry(NamedTuple):
    """A run.

    Attributes:
        key: its brain key.
        kind: ``"influence"`` or ``"misalignment"``.
        when: it was made, in UTC.
        model: the model's name.
        pretrained: its tag or checkpoint.
        scored: pairs; None if the run was stopped before its results were written.
        skipped: samples that could not be scored, likewise.
        cache_bytes: size of the run's own tables on disk.
        fields: those of its fields that are there.
    """

    key: str
    kind: str
    when: datetime
    model: str
    pretrained: str | None
    scored: int | None
    skipped: int | None
    cache_bytes: int
    fields: list[str]

    def __str__(self) -> str:
        pairs = "stopped before it was done" if self.scored is None else f"{self.scored:,} pairs"
        size = size_text(self.cache_bytes)
        return f"{self.key} — {self.kind}, {self.model}, {pairs}, {size}, {self.when:%Y-%m-%d %H:%M}"


class Stale(NamedTuple):
    """What happened to the pairs of a run since.

    Attributes:
        changed: pairs whose caption or image file is another now; None if the
            run is too old to tell.
        deleted: pairs that are not in the dataset any more.
        unscored: samples that the run's view has gained; None if the view
            cannot be had any more, as it names a field that is gone.
    """

    changed: int | None
    deleted: int
    unscored: int | None

    def __str__(self) -> str:
        counts = {"changed": self.changed, "deleted": self.deleted, "new": self.unscored}
        said = [f"{count:,} {what}" for what, count in counts.items() if count]
        return ", ".join(said + ["changes unknown"] * (self.changed is None)) or "nothing changed"

    def __bool__(self) -> bool:
        """Whether anything is known to have happened."""
        return bool(self.changed or self.deleted or self.unscored)


class Removal(NamedTuple):
    """What goes with a run.

    Attributes:
        fields: sample fields.
        cache_bytes: size of the tables that no other run uses.
    """

    fields: list[str]
    cache_bytes: int

    def __str__(self) -> str:
        fields = f"the fields {', '.join(self.fields)}" if self.fields else "no fields"
        return f"{fields} and {size_text(self.cache_bytes)} of cache" if self.cache_bytes else fields


def list_runs(dataset: Any) -> list[RunEntry]:
    """The influence and misalignment runs of a dataset, by key.

    What a killed job had begun to write is written to its end first.

    Args:
        dataset: a FiftyOne dataset.
    """
    finish_writing(dataset)
    return [read_entry(dataset, key) for key in dataset.list_brain_runs(method=METHOD)]


def finished_runs(dataset: Any) -> list[str]:
    """Keys of the runs that are written to their end, the newest last."""
    documents = dataset._doc.brain_methods
    keys = [key for key in dataset.list_brain_runs(method=METHOD) if documents[key].results]
    return sorted(keys, key=lambda key: documents[key].timestamp)


def load_run(dataset: Any, key: str, kind: str = "influence") -> Any:
    """The results of a run as they are now, not as this process has seen them last.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.
        kind ("influence"): or ``"misalignment"``.

    Raises:
        EcifError: if there is no such run, or it was stopped before its results
            were written
    """
    finish_writing(dataset)
    known = dataset.list_brain_runs(type=kind, method=METHOD)
    if key not in known:
        raise EcifError(f"{dataset.name!r} has no {kind} run {key!r}. Runs: {', '.join(known) or 'none'}")
    results = read_results(dataset, key)
    if results is None:
        raise EcifError(f"The run {key!r} was stopped before it was done. Run it again, replacing it, or delete it")
    return results


def staleness(dataset: Any, key: str) -> Stale:
    """Which of a run's pairs are not what they were when it was made.

    An image counts as changed if its file holds other bytes, or is gone; one
    that was moved does not.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.

    Raises:
        EcifError: if there is no such run
    """
    config = find_config(dataset, key)
    results = read_results(dataset, key)
    if results is None:
        return Stale(None, 0, 0)
    pairs = pairs_now(dataset, config.caption_field)
    deleted = sum(sample not in pairs for sample in results.ids)
    changed = None
    if results.digests is not None:
        before = zip(results.ids, results.digests, strict=True)
        known = KnownFiles(Store(*config.store[:-1]))
        changed = sum(not is_as_it_was(*pairs[sample], digest, known) for sample, digest in before if sample in pairs)
    try:
        unscored = len(set(dataset.load_brain_view(key).values("id")) - set(results.ids) - set(results.skipped))
    except ValueError:
        unscored = None
    return Stale(changed, deleted, unscored)


def removal(dataset: Any, key: str) -> Removal:
    """What :func:`delete_run` would delete.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.

    Raises:
        EcifError: if there is no such run
    """
    config = find_config(dataset, key)
    store = unshared_store(dataset, key, config.store)
    return Removal(config.build().own_fields(dataset, key), store.size() if store else 0)


def delete_run(dataset: Any, key: str) -> Removal:
    """Deletes a run with its fields, and its tables unless another run uses them.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.

    Returns:
        what was deleted

    Raises:
        EcifError: if there is no such run, or its fields cannot be deleted; the
            run is kept then
    """
    gone = removal(dataset, key)
    try:
        find_config(dataset, key).build().cleanup(dataset, key)  # here too, as FiftyOne goes on after a failure
    except ValueError as error:
        raise EcifError(f"The fields of run {key!r} cannot be deleted: {error}") from error
    dataset.delete_brain_run(key)
    return gone


def check_rename(dataset: Any, key: str, new_key: str) -> None:
    """Checks that a run may be renamed.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.
        new_key: what it would be.

    Raises:
        EcifError: if there is no such run, or the new key is no name, is taken,
            or one of the fields that it names is there already
    """
    config = find_config(dataset, key)
    if dataset.has_brain_run(new_key):
        raise EcifError(f"The brain key {new_key!r} is taken. Choose another one")
    check_key(dataset, new_key, False, config)


def rename_run(dataset: Any, key: str, new_key: str) -> None:
    """Renames a run and its fields. Saved views that name its fields keep the old names.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.
        new_key: what it shall be.

    Raises:
        EcifError: as :func:`check_rename`, or if the fields cannot be renamed;
            the run is left as it was then
    """
    check_rename(dataset, key, new_key)
    try:
        find_config(dataset, key).build().rename(dataset, key, new_key)  # here too, as FiftyOne goes on after a failure
    except ValueError as error:
        raise EcifError(f"The fields of run {key!r} cannot be renamed: {error}") from error
    dataset.rename_brain_run(key, new_key)


def read_entry(dataset: Any, key: str) -> RunEntry:
    """What there is to say of a run in one line."""
    info = dataset.get_brain_info(key)
    config, results = info.config, read_results(dataset, key)
    return RunEntry(
        key,
        config.type,
        info.timestamp,
        config.model,
        config.pretrained,
        None if results is None else len(set(results.ids).difference(results.skipped)),
        None if results is None else len(results.skipped),
        Store(*config.store).size(),
        config.build().own_fields(dataset, key),
    )


def find_config(dataset: Any, key: str) -> Any:
    """The configuration of a run; what a killed job had begun to write is written to its end first.

    Raises:
        EcifError: if there is no such run, with those that there are
    """
    finish_writing(dataset)
    known = dataset.list_brain_runs(method=METHOD)
    if key not in known:
        raise EcifError(f"{dataset.name!r} has no run {key!r}. Runs: {', '.join(known) or 'none'}")
    return dataset.get_brain_info(key).config
