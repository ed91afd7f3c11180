"""Influence runs as FiftyOne knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import fiftyone.core.dataset as fod
import fiftyone.core.fields as fof
import numpy as np
from bson import ObjectId
from fiftyone.core.odm import get_db_conn

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.gradient_store import GradientStore, MatchRows, MissingRowsError
from fiftyone_ecif.influence.roles import parse_role
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, OwnLoss
from fiftyone_ecif.runs.base import EcifRun, RunConfig, RunRecord, RunResults, ScoreField
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.store.tables import Store

T = TypeVar("T")


@dataclass(frozen=True)
class InfluenceRecord(RunRecord):
    """What an influence run found out.

    Attributes:
        slices: names of the target's slices, if it has any.
        traced: whether mistakes were traced on the samples.
        target: its dataset, size, the stages of its view, and its tables in the store by slice.
    """

    slices: Sequence[str] = ()
    traced: bool = False
    target: dict[str, Any] | None = None


class InfluenceConfig(RunConfig):
    """A run of :func:`fiftyone_ecif.compute_influence`: :class:`InfluenceSettings` and :class:`InfluenceRecord`."""

    settings_type = InfluenceSettings
    record_type = InfluenceRecord

    @property
    def target_loss(self) -> str:
        """The name of what is measured on the target."""
        settings = self.settings
        assert isinstance(settings, InfluenceSettings)
        return settings.target_loss_name

    def fields(self, key: str) -> dict[str, ScoreField]:
        """The fields that a run under ``key`` writes."""
        return influence_fields(key, self)

    @property
    def type(self) -> str:
        """The kind of run."""
        return "influence"


#: What tracing mistakes writes.
TRACE = ScoreField(fof.StringField, "Which of the mistakes traced last this is, or harms, or helps")


def influence_fields(key: str, config: InfluenceConfig | None = None) -> dict[str, ScoreField]:
    """The fields of a run; of a plain one if its configuration is not given."""
    config = config or InfluenceConfig()
    own = config.target_loss not in TARGET_LOSSES  # a function of the user's own
    unit = OwnLoss.unit if own else TARGET_LOSSES[config.target_loss].unit
    what = "Change of the target loss if this pair had not been trained on"
    if not SOLVERS[config.solver].keeps_unit or parse_role(config.role).approximation == "as_printed":
        unit, what = "no unit", f"Score of the pair by solver={config.solver}, role={config.role}, for comparison"
    fields = {
        "influence": ScoreField(fof.FloatField, f"{what}, in {unit}: positive = valuable, negative = harmful"),
        "positive": ScoreField(
            fof.FloatField, f"The part of the influence that comes from this pair's own loss, in {unit}"
        ),
        "negative": ScoreField(
            fof.FloatField, f"The part of the influence that comes from serving as a negative of others, in {unit}"
        ),
        "rank": ScoreField(fof.IntField, "Place of the pair by influence: 1 = most harmful"),
    }
    if config.n_partitions > 1:
        fields["error"] = ScoreField(
            fof.FloatField, f"Standard error of the influence over {config.n_partitions} random partitions, in {unit}"
        )
    fields |= {
        f"influence_on_{name}": ScoreField(fof.FloatField, f"Influence on the slice {name} of the target, in {unit}")
        for name in config.slices
    }
    extra = {
        "relative_influence": "Influence over the length of what the pair does to the model",
        "self_influence": "Change of the pair's own loss if it had not been trained on, in nats",
        "leave_one_out_loss": "Predicted loss of the pair had it not been trained on, in nats",
    }
    fields |= {name: ScoreField(fof.FloatField, extra[name]) for name in config.scores}
    if config.traced:
        fields["trace"] = TRACE
    return {f"{key}_{name}": field for name, field in fields.items()}


def slice_names(target: Any) -> list[str]:
    """The names of a target's slices, none if it is a single view.

    Raises:
        EcifError: if one cannot be part of a field's name
    """
    names = list(target) if isinstance(target, Mapping) else []
    for name in names:
        if not isinstance(name, str) or not f"_{name}".isidentifier():
            raise EcifError(f"{name!r} is not a name for a slice of the target. Use letters, digits and _")
    return names


class Influence(EcifRun):
    """Runs of :func:`fiftyone_ecif.compute_influence`."""


class TargetPairs(NamedTuple):
    """The pairs of a target as a run saw them.

    Attributes:
        ids: their samples.
        losses: of each, shape ``(M,)``.
        mistakes: which the model gets wrong, bool, shape ``(M,)``.
        gradients: of their losses, projected, shape ``(M, r)``.
        images: unit image embeddings, shape ``(M, d)``.
        matches: what the model confuses them with; None of a run of before that was kept.
    """

    ids: list[str]
    losses: np.ndarray
    mistakes: np.ndarray
    gradients: np.ndarray
    images: np.ndarray
    matches: MatchRows | None


class InfluenceResults(RunResults):
    """What an influence run found; see :func:`fiftyone_ecif.compute_influence` for its ``diagnostics``.

    Attributes:
        target_ids: the samples of the target by slice, ``""`` if it has none.
        target_classes: the classes of the target's pairs, where its loss is about them.
    """

    def __init__(
        self,
        samples: Any,
        config: InfluenceConfig,
        key: str,
        ids: list[str],
        skipped: dict[str, str],
        diagnostics: dict[str, Any],
        digests: list[str] | None = None,
        target_ids: dict[str, list[str]] | None = None,
        target_classes: list[str] | None = None,
        backend: Influence | None = None,
    ) -> None:
        super().__init__(samples, config, key, ids, skipped, diagnostics, digests, backend)
        self.target_ids = target_ids or {}
        self.target_classes = target_classes or []

    def target_dataset(self) -> Any:
        """The dataset that holds the samples of the target, whatever it is called now; None if it is gone.

        A clone of the run's dataset has the samples of the first one.
        """
        dataset, home = self.samples._dataset, self.config.target.get("dataset_id")
        samples = list({sample for ids in self.target_ids.values() for sample in ids})
        if home == str(dataset._doc.id) or every_sample(dataset).select(samples).count() == len(samples):
            return dataset
        found = get_db_conn()["datasets"].find_one({"_id": ObjectId(home)})
        return found and fod.load_dataset(found["name"])

    def cached(self) -> CachedGradients:
        """Projected removal gradients and their curvature from the store, rows in the order of :attr:`ids`.

        Raises:
            EcifError: if the run kept none, or its store was deleted
        """
        return self._read(GradientStore.load)

    def self_influence(self) -> np.ndarray:
        """Change of each pair's own loss if it had not been trained on, in nats, shape ``(N,)``."""
        self._stored("row")
        return self._read(GradientStore.effects).own

    def leave_one_out_loss(self) -> np.ndarray:
        """Predicted loss of each pair had it not been trained on, in nats, shape ``(N,)``."""
        losses: np.ndarray = self._stored("loss")[0] + self.self_influence()
        return losses

    def image_embeddings(self) -> np.ndarray:
        """Unit image embeddings of the pairs, from the store, shape ``(N, d)``."""
        return self._stored("image")[0]

    def clip_score(self) -> np.ndarray:
        """Cosine similarity of each pair's image and caption, from the store, shape ``(N,)``."""
        return self._stored("cosine")[0]

    @property
    def slices(self) -> list[str]:
        """Names of the target's slices; one without a name if it has none."""
        return list(self.config.slices) or [""]

    def target_pairs(self, name: str = "") -> TargetPairs:
        """What the store knows of the target's pairs.

        Args:
            name (""): of the slice, if the target has any.

        Raises:
            EcifError: if the run kept no gradients, or its store was deleted
        """
        self._stored("row")
        table, ids = self.config.target["tables"][name], self.target_ids[name]
        rows = self._read(lambda store: store.target(table, len(ids)))
        matches = self.gradient_store.matches(table, len(ids))
        return TargetPairs(ids, rows.loss, rows.mistake, rows.gradient, rows.image, matches)

    @property
    def gradient_store(self) -> GradientStore:
        """What the run keeps of its pairs, whether or not it is there."""
        config = self.config
        return GradientStore(Store(*config.store), len(self.ids), config.solver, config.damping)

    def _stored(self, *columns: str) -> list[np.ndarray]:
        return self._read(lambda store: store.columns(*columns))

    def _read(self, read: Callable[[GradientStore], T]) -> T:
        """What the run keeps, all of which must be there."""
        if not self.config.keep_gradients:
            raise EcifError(f"Run {self.key!r} kept no gradients. Run compute_influence with keep_gradients=True")
        try:
            return read(self.gradient_store)
        except MissingRowsError as error:
            raise EcifError(
                f"The store of run {self.key!r} is gone. Run compute_influence again with overwrite=True"
            ) from error

    @classmethod
    def _from_dict(cls, d: dict[str, Any], samples: Any, config: InfluenceConfig, key: str) -> InfluenceResults:
        found = super()._from_dict(d, samples, config, key)
        assert isinstance(found, InfluenceResults)
        found.target_ids = d.get("target_ids") or (config.target or {}).get("ids") or {}  # the latter of an older run
        found.target_classes = d.get("target_classes") or []
        return found
