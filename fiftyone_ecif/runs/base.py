"""What influence and misalignment runs share: their fields, and how FiftyOne renames and deletes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import fiftyone.core.brain as fob
import fiftyone.core.fields as fof
from bson import json_util
from fiftyone.core.view import DatasetView
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.runs.cache import METHOD, release_store
from fiftyone_ecif.runs.sidebar import forget_fields, show_fields
from fiftyone_ecif.settings.option import Settings

_LARGEST_VIEW = 12 * 2**20  # bytes, of the 16 MB that a document of MongoDB can have


class ScoreField(NamedTuple):
    """A field that a run writes.

    Attributes:
        type: its FiftyOne type.
        description: what the App says about it.
    """

    type: type[fof.Field]
    description: str


@dataclass(frozen=True)
class RunRecord:
    """What a run found out and where it put it, beside what the user chose.

    Attributes:
        encoder: fingerprint of the loaded model.
        store: where the run's tables lie below the cache folder.
    """

    encoder: str | None = None
    store: list[str] | None = None


class RunConfig(fob.BrainMethodConfig):
    """A run as FiftyOne keeps it in a document of its database: settings and record, all in one flat dictionary.

    Every option and all that is recorded can be read as an attribute. Lists of
    samples do not belong here, as a document is at most 16 MB.

    Args:
        settings (None): what the user chose.
        record (None): what the run found.
        **recorded: both, flat, as they are read from the database.

    Raises:
        EcifError: if a recorded setting is out of its range
    """

    settings_type: ClassVar[type[Settings]]
    record_type: ClassVar[type[RunRecord]]

    def __init__(self, settings: Any = None, record: Any = None, **recorded: Any) -> None:
        found = {each.name: recorded.pop(each.name) for each in fields(self.record_type) if each.name in recorded}
        self.settings = settings or self.settings_type.take(recorded)
        self.record = record or self.record_type(**found)
        super().__init__(**recorded)  # what another version recorded

    def __getattr__(self, name: str) -> Any:
        if name in ("settings", "record") or name.startswith("__"):
            raise AttributeError(name)
        for part in (self.settings, self.record):
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def recording(self, **changes: Any) -> Any:
        """The same with some of its record changed."""
        return type(self)(self.settings, replace(self.record, **changes))

    def attributes(self) -> list[str]:
        """The names of what is kept in the database."""
        recorded = [each.name for each in fields(self.record_type)]
        return ["cls", "type", "method", *self.settings_type.options(), *recorded]

    def serialize(self, reflective: bool = False) -> dict[str, Any]:
        """The document; sequences as lists, as the database has them."""
        found = super().serialize(reflective)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def fields(self, key: str) -> dict[str, ScoreField]:
        """The fields that a run under ``key`` writes."""
        raise NotImplementedError

    @property
    def cls(self) -> str:
        """The name that FiftyOne finds this class by, wherever its module lies."""
        return f"fiftyone_ecif.runs.{type(self).__name__}"

    @property
    def method(self) -> str:
        """The name of all runs of this package, whatever their type."""
        return METHOD


class RunResults(fob.BrainResults):
    """What a run found, beside the fields that it wrote.

    Attributes:
        ids: the scored samples.
        skipped: ``{sample id: reason}`` of those that were not scored.
        diagnostics: what tells how far to trust the scores.
        digests: what each pair was when it was scored; None of an old run.
    """

    def __init__(
        self,
        samples: Any,
        config: RunConfig,
        key: str,
        ids: list[str],
        skipped: dict[str, str],
        diagnostics: dict[str, Any],
        digests: list[str] | None = None,
        backend: EcifRun | None = None,
    ) -> None:
        super().__init__(samples, config, key, backend=backend)
        self.ids = ids
        self.skipped = skipped
        self.diagnostics = diagnostics
        self.digests = digests

    @property
    def cls(self) -> str:
        """The name that FiftyOne finds this class by, wherever its module lies."""
        return f"fiftyone_ecif.runs.{type(self).__name__}"

    def record(self, **changes: Any) -> None:
        """Notes what happened to the run since, for :meth:`save_config` to keep."""
        self._config = self.config.recording(**changes)
        self._backend = self._config.build()

    @classmethod
    def _from_dict(cls, d: dict[str, Any], samples: Any, config: Any, key: str) -> RunResults:
        known = {name: d[name] for name in ("ids", "skipped", "diagnostics")}
        return cls(samples, config, key, **known, digests=d.get("digests"))


def check_key(dataset: Any, brain_key: str, overwrite: bool, config: Any) -> None:
    """Checks that a run may be written under a key.

    Args:
        dataset: where.
        brain_key: the key.
        overwrite: whether a run of that key and kind may be replaced.
        config: of the run, which knows its fields.

    Raises:
        EcifError: if the key is no identifier, is taken, or one of the fields
            that it names is there and belongs to no run or cannot be written
    """
    if not isinstance(brain_key, str) or not brain_key.isidentifier() or brain_key.startswith("_"):
        raise EcifError(f"brain_key={brain_key!r} is not a name. Use letters, digits and _, such as 'ecif'")
    ours: set[str] = set()
    if dataset.has_brain_run(brain_key):
        old = dataset.get_brain_info(brain_key).config
        if type(old) is not type(config):
            raise EcifError(f"The brain key {brain_key!r} belongs to another kind of run. Choose another key")
        if not overwrite:
            raise EcifError(
                f"The brain key {brain_key!r} is taken. Choose another one, or set overwrite=True to replace that run"
            )
        ours = set(old.fields(brain_key))
    others = [name for name in config.fields(brain_key) if name not in ours and dataset.has_sample_field(name)]
    left = _left_over(dataset, brain_key, others, config)
    for field in others:
        if field not in left:
            raise EcifError(
                f"There is a field {field!r} already, which no run wrote. Choose another brain_key, or drop the field: "
                f"dataset.delete_sample_field({field!r})"
            )
    if left and not overwrite:
        raise EcifError(
            f"The fields {', '.join(left)} are left over from a run that this dataset has not, as after a merge or in "
            "the clone of a view. Set overwrite=True to take them over, or drop them: "
            f"dataset.delete_sample_fields({left})"
        )
    check_writable(dataset, {*config.fields(brain_key), *ours})


def _left_over(dataset: Any, key: str, fields: Iterable[str], config: Any) -> list[str]:
    """Which fields say that a run like this one wrote them."""
    known = [config.fields(key), type(config)().fields(key)]
    return [
        name
        for name in fields
        if _description(dataset, name) in [each[name].description for each in known if name in each]
    ]


def check_writable(dataset: Any, fields: Iterable[str]) -> None:
    """Checks that no field is read-only.

    Raises:
        EcifError: for the first that is
    """
    for field in fields:
        found = dataset.get_field(field)
        if found is not None and found.read_only:
            raise EcifError(
                f"The field {field!r} is read-only. Allow writing: field = dataset.get_field({field!r}); "
                "field.read_only = False; field.save()"
            )


def check_view(samples: Any) -> None:
    """Checks that FiftyOne can record a run on a view: its stages go into one document of the database.

    Raises:
        EcifError: if they are too long, as of a view that names hundreds of thousands of samples one by one
    """
    stages = samples._serialize(include_uuids=False) if isinstance(samples, DatasetView) else []
    size = len(json_util.dumps(stages))
    if size > _LARGEST_VIEW:
        raise EcifError(
            f"The view names its {len(samples):,} samples one by one, which takes {size / 2**20:.0f} MB and is too "
            "long to be recorded with a run. Tag them, and score dataset.match_tags(...)"
        )


class EcifRun(fob.BrainMethod):
    """Lists, renames and cleans up this package's runs for FiftyOne."""

    @override
    def get_fields(self, samples: Any, key: str) -> list[str]:
        return [self.config.caption_field, *self.config.fields(key)]

    @override
    def rename(self, samples: Any, key: str, new_key: str) -> None:
        dataset, ours = samples._root_dataset, self.own_fields(samples, key)
        names = zip(self.config.fields(key), self.config.fields(new_key), strict=True)
        if ours:
            renamed = {old: new for old, new in names if old in ours}
            dataset.rename_sample_fields(renamed)
            dataset.reload()  # the fields in memory still have their old paths, and could not be described anew
            forget_fields(dataset, renamed)
            show_fields(dataset, new_key, renamed.values())

    def cleanup(self, samples: Any, key: str) -> None:
        """Deletes the run's fields, and its tables unless another run uses them."""
        dataset, ours = samples._root_dataset, self.own_fields(samples, key)
        dataset.delete_sample_fields(ours)
        forget_fields(dataset, ours)
        release_store(dataset, key, self.config.store)

    def own_fields(self, samples: Any, key: str) -> list[str]:
        """The fields that are there and that the run wrote, not the user under the same name."""
        dataset, fields = samples._root_dataset, self.config.fields(key)
        return [name for name in fields if _description(dataset, name) == fields[name].description]


def _description(dataset: Any, field: str) -> str | None:
    return dataset.get_field(field).description if dataset.has_sample_field(field) else None
