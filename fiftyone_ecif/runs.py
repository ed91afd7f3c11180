"""Influence runs as FiftyOne knows them.

FiftyOne stores the names of these classes in its database and imports them to
list, load and delete runs, so this module and its classes keep their names.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple

import fiftyone.core.brain as fob
import fiftyone.core.fields as fof
import numpy as np

from .errors import EcifError
from .store import Store


class InfluenceConfig(fob.BrainMethodConfig):
    """What a run of :func:`fiftyone_ecif.compute_influence` is computed from.

    Args:
        caption_field ("caption"): the field of the captions.
        model ("ViT-B-32"): the model's name.
        pretrained (None): its tag or checkpoint.
        scope ("heads"): the parameters that are attributed.
        fit (False): whether they are brought to a stationary point first.
        proximal (0.1): the strength of the pull to the loaded weights.
        batch_size (None): of the partition.
        seed (0): of the partition.
        target (None): the target view, for the record.
        encoder (None): fingerprint of the loaded model, once it is.
        store (None): where the run's tables lie below the cache folder.

    Raises:
        EcifError: if a value is out of its range
    """

    def __init__(
        self,
        *,
        caption_field: str = "caption",
        model: str = "ViT-B-32",
        pretrained: str | None = None,
        scope: str = "heads",
        fit: bool = False,
        proximal: float = 0.1,
        batch_size: int | None = None,
        seed: int = 0,
        target: dict[str, Any] | None = None,
        encoder: str | None = None,
        store: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if scope != "heads":
            raise EcifError(f"scope={scope!r} is not available. Use 'heads'")
        if not (isinstance(proximal, int | float) and math.isfinite(proximal) and proximal > 0):
            raise EcifError(f"proximal={proximal!r} must be a positive number, such as 0.1")
        for name, value in (("batch_size", batch_size), ("seed", seed)):
            if not isinstance(value, Integral | None) or (value is None and name == "seed"):
                raise EcifError(f"{name}={value!r} must be a whole number")
        if batch_size is not None and batch_size < 2:
            raise EcifError(f"batch_size={batch_size} leaves no negatives. Use at least 2")
        self.caption_field = caption_field
        self.model = model
        self.pretrained = pretrained
        self.scope = scope
        self.fit = fit
        self.proximal = proximal
        self.batch_size = None if batch_size is None else int(batch_size)
        self.seed = int(seed)
        self.target = target
        self.encoder = encoder
        self.store = store
        super().__init__(**kwargs)

    @property
    def type(self) -> str:
        return "influence"

    @property
    def method(self) -> str:
        return "ecif"


class ScoreField(NamedTuple):
    """A field that a run writes.

    Attributes:
        type: its FiftyOne type.
        description: what the App says about it.
    """

    type: type[fof.Field]
    description: str


def influence_fields(key: str) -> dict[str, ScoreField]:
    """The fields of a run."""
    unit = "nats of the target's mean pair loss"
    return {
        f"{key}_influence": ScoreField(
            fof.FloatField,
            f"Change of the target loss if this pair had not been trained on, in {unit}: "
            "positive = valuable, negative = harmful",
        ),
        f"{key}_positive": ScoreField(
            fof.FloatField, f"The part of the influence that comes from this pair's own loss, in {unit}"
        ),
        f"{key}_negative": ScoreField(
            fof.FloatField, f"The part of the influence that comes from serving as a negative of others, in {unit}"
        ),
        f"{key}_rank": ScoreField(fof.IntField, "Place of the pair by influence: 1 = most harmful"),
    }


def check_key(dataset: Any, brain_key: str, overwrite: bool) -> None:
    """Checks that a run may be written under a key.

    Raises:
        EcifError: if the key is no identifier, is taken, or one of the fields
            that it names is there and belongs to no run
    """
    if not isinstance(brain_key, str) or not brain_key.isidentifier() or brain_key.startswith("_"):
        raise EcifError(f"brain_key={brain_key!r} is not a name. Use letters, digits and _, such as 'ecif'")
    if dataset.has_brain_run(brain_key):
        if not isinstance(dataset.get_brain_info(brain_key).config, InfluenceConfig):
            raise EcifError(f"The brain key {brain_key!r} belongs to another kind of run. Choose another key")
        if not overwrite:
            raise EcifError(
                f"The brain key {brain_key!r} is taken. Choose another one, or set overwrite=True to replace that run"
            )
        return
    for field in influence_fields(brain_key):
        if dataset.has_sample_field(field):
            raise EcifError(f"There is a field {field!r} already, which no run wrote. Choose another brain_key")


class Influence(fob.BrainMethod):
    """Lists, renames and cleans up influence runs for FiftyOne."""

    def get_fields(self, samples: Any, key: str) -> list[str]:
        return [self.config.caption_field, *influence_fields(key)]

    def rename(self, samples: Any, key: str, new_key: str) -> None:
        dataset = samples._root_dataset
        renamed = dict(zip(influence_fields(key), influence_fields(new_key), strict=True))
        dataset.rename_sample_fields(renamed)

    def cleanup(self, samples: Any, key: str) -> None:
        """Deletes the run's fields, and its tables unless another run uses them."""
        dataset, fields = samples._root_dataset, influence_fields(key)
        ours = [name for name in fields if _description(dataset, name) == fields[name].description]
        dataset.delete_sample_fields(ours)
        release_store(samples._root_dataset, key, self.config.store)


def release_store(dataset: Any, key: str, store: list[str]) -> None:
    """Deletes the tables that run ``key`` used and no other run of its dataset uses.

    A clone's runs still name the tables of the dataset that it was cloned from;
    those stay.
    """
    if store[0] != str(dataset._doc.id):
        return
    others = [
        dataset.get_brain_info(other).config.store for other in dataset.list_brain_runs(type=Influence) if other != key
    ]
    if store not in others:
        Store(*store).delete()
    if store[:-1] not in [other[:-1] for other in others]:
        Store(*store[:-1]).delete()


def _description(dataset: Any, field: str) -> str | None:
    return dataset.get_field(field).description if dataset.has_sample_field(field) else None


class InfluenceResults(fob.BrainResults):
    """What a run found, beside the fields that it wrote.

    Attributes:
        ids: the scored samples.
        skipped: ``{sample id: reason}`` of those that were not scored.
        diagnostics: what tells how far to trust the scores; see
            :func:`fiftyone_ecif.compute_influence`.
    """

    def __init__(
        self,
        samples: Any,
        config: InfluenceConfig,
        key: str,
        ids: list[str],
        skipped: dict[str, str],
        diagnostics: dict[str, Any],
        backend: Influence | None = None,
    ) -> None:
        super().__init__(samples, config, key, backend=backend)
        self.ids = ids
        self.skipped = skipped
        self.diagnostics = diagnostics

    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """Projected removal gradients from the store, positive and negative apart.

        Returns:
            two arrays of shape ``(N, r)``, rows in the order of :attr:`ids`

        Raises:
            EcifError: if the run's store was deleted
        """
        positive, negative = self._stored("positive", "negative")
        return positive, negative

    def self_influence(self) -> np.ndarray:
        """How much each pair moves the model on itself, from the store, shape ``(N,)``.

        See :func:`fiftyone_ecif.influence.self_influence`.
        """
        import torch  # here, so that FiftyOne can list runs without it

        from .influence import self_influence

        positive, negative = self.gradients()
        return self_influence(torch.from_numpy(positive + negative)).numpy()

    def clip_score(self) -> np.ndarray:
        """Cosine similarity of each pair's image and caption, from the store, shape ``(N,)``."""
        return self._stored("cosine")[0]

    def _stored(self, *columns: str) -> list[np.ndarray]:
        found = Store(*self.config.store).table("gradients").read_all("row", *columns)
        if len(found["row"]) != len(self.ids):
            raise EcifError(f"The store of run {self.key!r} is gone. Run compute_influence again with overwrite=True")
        order = np.argsort(found["row"])
        return [found[column][order] for column in columns]

    @classmethod
    def _from_dict(cls, d: dict[str, Any], samples: Any, config: InfluenceConfig, key: str) -> InfluenceResults:
        return cls(samples, config, key, d["ids"], d["skipped"], d["diagnostics"])
