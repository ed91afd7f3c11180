"""Misalignment runs as FiftyOne knows them."""

from __future__ import annotations

from typing import Any

import fiftyone.core.brain as fob
import fiftyone.core.fields as fof
import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.detectors import DETECTORS
from fiftyone_ecif.misalignment.noise_rate import NoiseRate
from fiftyone_ecif.runs.base import EcifRun, ScoreField
from fiftyone_ecif.runs.influence import InfluenceConfig
from fiftyone_ecif.store.tables import Store


class MisalignmentConfig(fob.BrainMethodConfig):
    """What a run of :func:`fiftyone_ecif.compute_misalignment` is computed from.

    Args:
        caption_field ("caption"): the field of the captions.
        model ("ViT-B-32"): the model's name.
        pretrained (None): its tag or checkpoint.
        detector ("fused"): what the score is.
        fit (True): whether the heads are fitted to the pairs first.
        trained (False): whether the loaded weights were trained on the pairs.
        proximal (1.0): the strength of the pull to the loaded weights.
        batch_size (None): of the partition.
        seed (0): of partitions and folds.
        reviewed (None): when the score became the probability of a review, if it did.
        encoder (None): fingerprint of the loaded model, once it is.
        store (None): where the run's tables lie below the cache folder.
        table (None): the table of the detectors' scores among them.

    Raises:
        EcifError: if a value is out of its range
    """

    def __init__(
        self,
        *,
        caption_field: str = "caption",
        model: str = "ViT-B-32",
        pretrained: str | None = None,
        detector: str = "fused",
        fit: bool = True,
        trained: bool = False,
        proximal: float = 1.0,
        batch_size: int | None = None,
        seed: int = 0,
        reviewed: str | None = None,
        encoder: str | None = None,
        store: list[str] | None = None,
        table: str | None = None,
        **kwargs: Any,
    ) -> None:
        if DETECTORS[detector].needs_training and not (fit or trained):
            raise EcifError(
                f"detector={detector!r} tells about pairs that the model was trained on. Set fit=True, or trained=True "
                "if the weights were trained on these pairs"
            )
        self.caption_field = caption_field
        self.model = model
        self.pretrained = pretrained
        self.detector = detector
        self.fit = fit
        self.trained = trained
        self.reviewed = reviewed
        self.encoder = encoder
        self.store = store
        self.table = table
        checked = InfluenceConfig(proximal=proximal, batch_size=batch_size, seed=seed)
        self.proximal, self.batch_size, self.seed = checked.proximal, checked.batch_size, checked.seed
        super().__init__(**kwargs)

    def problem(self) -> InfluenceConfig:
        """The run in terms of influence: its heads, fit and partition."""
        return InfluenceConfig(
            caption_field=self.caption_field,
            model=self.model,
            pretrained=self.pretrained,
            fit=self.fit,
            proximal=self.proximal,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def fields(self, key: str) -> dict[str, ScoreField]:
        """The fields that a run under ``key`` writes."""
        what = (
            "Probability that caption and image do not belong together, by your review"
            if self.reviewed
            else f"Share of the pairs that are less suspicious by detector {self.detector}: 1 = most likely misaligned"
        )
        return {
            f"{key}_misalignment": ScoreField(fof.FloatField, what),
            f"{key}_reason": ScoreField(fof.StringField, "What speaks against the pair, the strongest first"),
            f"{key}_duplicate": ScoreField(
                fof.StringField,
                "pair: another sample has this image and caption; image: another has this image and another caption",
            ),
        }

    @property
    def type(self) -> str:
        return "misalignment"

    @property
    def method(self) -> str:
        return "ecif"


class Misalignment(EcifRun):
    """Runs of :func:`fiftyone_ecif.compute_misalignment`."""


class MisalignmentResults(fob.BrainResults):
    """What a run found, beside the fields that it wrote.

    Attributes:
        ids: the scored samples.
        skipped: ``{sample id: reason}`` of those that were not scored.
        diagnostics: see :func:`fiftyone_ecif.compute_misalignment`.
        digests: what each pair was when it was scored; None of an old run.
    """

    def __init__(
        self,
        samples: Any,
        config: MisalignmentConfig,
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
    def noise_rate(self) -> NoiseRate:
        """The estimated share of misaligned pairs, with its 95 % interval."""
        return NoiseRate(*self.diagnostics["noise_rate"])

    def detector_scores(self) -> dict[str, np.ndarray]:
        """The scores of every detector that ran, rows in the order of :attr:`ids`, higher = more suspicious.

        Raises:
            EcifError: if the run's store was deleted
        """
        table = Store(*self.config.store).table(self.config.table)
        if not table.parts():
            raise EcifError(
                f"The store of run {self.key!r} is gone. Run compute_misalignment again with overwrite=True"
            )
        names = self.diagnostics["detectors"]
        return table.read("0", *names)

    @classmethod
    def _from_dict(cls, d: dict[str, Any], samples: Any, config: MisalignmentConfig, key: str) -> MisalignmentResults:
        return cls(samples, config, key, d["ids"], d["skipped"], d["diagnostics"], d.get("digests"))
