"""What influence and misalignment runs share: their fields, and how FiftyOne renames and deletes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import fiftyone.core.brain as fob
import fiftyone.core.fields as fof

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.runs.cache import release_store
from fiftyone_ecif.runs.sidebar import forget_fields, show_fields


class ScoreField(NamedTuple):
    """A field that a run writes.

    Attributes:
        type: its FiftyOne type.
        description: what the App says about it.
    """

    type: type[fof.Field]
    description: str


def check_key(dataset: Any, brain_key: str, overwrite: bool, config: Any) -> None:
    """Checks that a run may be written under a key.

    Args:
        dataset: where.
        brain_key: the key.
        overwrite: whether a run of that key and kind may be replaced.
        config: of the run, which knows its fields.

    Raises:
        EcifError: if the key is no identifier, is taken, or one of the fields
            that it names is there and belongs to no run
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
    for field in config.fields(brain_key):
        if field not in ours and dataset.has_sample_field(field):
            raise EcifError(f"There is a field {field!r} already, which no run wrote. Choose another brain_key")


class EcifRun(fob.BrainMethod):
    """Lists, renames and cleans up this package's runs for FiftyOne."""

    def get_fields(self, samples: Any, key: str) -> list[str]:
        return [self.config.caption_field, *self.config.fields(key)]

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
