"""Influence runs as FiftyOne knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import fiftyone.core.brain as fob
import fiftyone.core.dataset as fod
import fiftyone.core.fields as fof
import numpy as np
from bson import ObjectId
from fiftyone.core.odm import get_db_conn

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.gradient_store import GradientStore, MissingRowsError
from fiftyone_ecif.influence.solvers import SOLVERS, default_solver
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, OwnLoss
from fiftyone_ecif.options import EXTRA_SCORES, METHOD, ROLES, parse_role, parse_scope
from fiftyone_ecif.runs.base import EcifRun, ScoreField
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.store.tables import Store

T = TypeVar("T")
PairFunction = Callable[..., Any]
_FUNCTION = "function "  # what the record of a function of the user's own starts with


class InfluenceConfig(fob.BrainMethodConfig):
    """What a run of :func:`fiftyone_ecif.compute_influence` is computed from.

    Args:
        caption_field ("caption"): the field of the captions.
        model ("ViT-B-32"): the model's name.
        pretrained (None): its tag or checkpoint.
        scope ("heads"): the parameters that are attributed.
        role ("exact"): how a pair's part in its batch is taken.
        solver (None): the curvature; by default the Hessian for heads and the
            Gauss-Newton matrix for deeper scopes.
        damping (0.0): of the curvature, relative to its mean eigenvalue.
        fit (False): whether the scope is brought to a stationary point first.
        proximal (1.0): the strength of the pull to the loaded weights.
        batch_size (None): of the partition.
        seed (0): of the partition.
        n_partitions (1): over how many partitions scores are averaged.
        target_loss ("contrastive"): what is measured on the target.
        label_field (None): the classes of the target, for ``"zero_shot"``.
        templates: prompts of a class, ``{}`` standing for its name.
        scores: which of :data:`EXTRA_SCORES` to write too.
        keep_gradients (None): whether projected gradients are stored; by default
            for heads, and where something needs them.
        slices: names of the target's slices, if it has any.
        traced (False): whether mistakes were traced on the samples.
        target (None): the target, for the record.
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
        role: str = "exact",
        solver: str | None = None,
        damping: float = 0.0,
        fit: bool = False,
        proximal: float = 1.0,
        batch_size: int | None = None,
        seed: int = 0,
        n_partitions: int = 1,
        target_loss: str | PairFunction = "contrastive",
        label_field: str | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        scores: Sequence[str] = (),
        keep_gradients: bool | None = None,
        slices: Sequence[str] = (),
        traced: bool = False,
        target: dict[str, Any] | None = None,
        encoder: str | None = None,
        store: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        choice = parse_scope(scope)
        _check_number("proximal", proximal, above=0.0)
        _check_number("damping", damping, least=0.0)
        for name, value in (("batch_size", batch_size), ("seed", seed), ("n_partitions", n_partitions)):
            if not isinstance(value, Integral | None) or (value is None and name != "batch_size"):
                raise EcifError(f"{name}={value!r} must be a whole number")
        if batch_size is not None and batch_size < 2:
            raise EcifError(f"batch_size={batch_size} leaves no negatives. Use at least 2")
        if n_partitions < 1:
            raise EcifError(f"n_partitions={n_partitions} must be at least 1")
        _check_choice("role", role, ROLES)
        solver = solver or default_solver(choice)
        _check_choice("solver", solver, tuple(SOLVERS))
        if not callable(target_loss) and not str(target_loss).startswith(_FUNCTION):
            _check_choice("target_loss", target_loss, tuple(TARGET_LOSSES))
        labelled = [name for name, loss in TARGET_LOSSES.items() if loss.needs_labels]
        if (target_loss in labelled) != (label_field is not None):
            names = " or ".join(map(repr, labelled))
            raise EcifError(f"target_loss={names} and label_field, the classes of the target, belong together")
        if not templates or not all(isinstance(text, str) and "{}" in text for text in templates):
            raise EcifError(f"templates={templates!r} must hold {{}} for the class, as in 'a photo of a {{}}.'")
        for score in scores:
            _check_choice("scores", score, EXTRA_SCORES)
        if parse_role(role).part == "negative" and set(scores) & {"self_influence", "leave_one_out_loss"}:
            raise EcifError(f"{role=} leaves out a pair's own loss, which self_influence and others are about")
        needed = bool(scores) or SOLVERS[solver].needs_gradients
        if keep_gradients is False and needed:
            raise EcifError(f"keep_gradients=False does not go with {'scores' if scores else f'solver={solver}'}")
        self.caption_field = caption_field
        self.model = model
        self.pretrained = pretrained
        self.scope = scope
        self.role = role
        self.solver = solver
        self.damping = float(damping)
        self.fit = fit
        self.proximal = float(proximal)
        self.batch_size = None if batch_size is None else int(batch_size)
        self.seed = int(seed)
        self.n_partitions = int(n_partitions)
        self._target_function = target_loss if callable(target_loss) else None
        self._target_token = uuid4().hex if callable(target_loss) else ""  # two functions can have one name
        self.target_loss = _FUNCTION + getattr(target_loss, "__name__", "") if callable(target_loss) else target_loss
        self.label_field = label_field
        self.templates = list(templates)
        self.scores = list(scores)
        self.keep_gradients = (choice.heads or needed) if keep_gradients is None else keep_gradients
        self.slices = list(slices)
        self.traced = traced
        self.target = target
        self.encoder = encoder
        self.store = store
        super().__init__(**kwargs)

    def fields(self, key: str) -> dict[str, ScoreField]:
        """The fields that a run under ``key`` writes."""
        return influence_fields(key, self)

    @property
    def type(self) -> str:
        return "influence"

    @property
    def method(self) -> str:
        return METHOD


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


def target_dataset(dataset: Any, target: Mapping[str, Any]) -> Any:
    """The dataset that holds the samples of a run's target, whatever it is called now; None if it is gone.

    Args:
        dataset: that the run is on; a clone has the samples of the first one.
        target: as the run's configuration records it.
    """
    home = target.get("dataset_id")
    samples = list({sample for ids in target["ids"].values() for sample in ids})
    if home == str(dataset._doc.id) or every_sample(dataset).select(samples).count() == len(samples):
        return dataset
    found = get_db_conn()["datasets"].find_one({"_id": ObjectId(home)})
    return found and fod.load_dataset(found["name"])


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
    """

    ids: list[str]
    losses: np.ndarray
    mistakes: np.ndarray
    gradients: np.ndarray
    images: np.ndarray


def _check_number(name: str, value: Any, above: float | None = None, least: float | None = None) -> None:
    usable = isinstance(value, int | float) and math.isfinite(value)
    if not usable or (above is not None and value <= above) or (least is not None and value < least):
        kind = "positive number" if above is not None else "number from 0 up"
        raise EcifError(f"{name}={value!r} must be a {kind}, such as 0.1")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise EcifError(f"{name}={value!r} is not available. Use one of {', '.join(choices)}")


class InfluenceResults(fob.BrainResults):
    """What a run found, beside the fields that it wrote.

    Attributes:
        ids: the scored samples.
        skipped: ``{sample id: reason}`` of those that were not scored.
        diagnostics: what tells how far to trust the scores; see
            :func:`fiftyone_ecif.compute_influence`.
        digests: what each pair was when it was scored; None of an old run.
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
        backend: Influence | None = None,
    ) -> None:
        super().__init__(samples, config, key, backend=backend)
        self.ids = ids
        self.skipped = skipped
        self.diagnostics = diagnostics
        self.digests = digests

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
        table, ids = self.config.target["tables"][name], self.config.target["ids"][name]
        rows = self._read(lambda store: store.target(table, len(ids)))
        return TargetPairs(ids, rows.loss, rows.mistake, rows.gradient, rows.image)

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
        return cls(samples, config, key, d["ids"], d["skipped"], d["diagnostics"], d.get("digests"))
