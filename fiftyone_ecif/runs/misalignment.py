"""Misalignment runs as FiftyOne knows them."""

from __future__ import annotations

from dataclasses import dataclass

import fiftyone.core.fields as fof
import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.noise_rate import NoiseRate
from fiftyone_ecif.runs.base import EcifRun, RunConfig, RunRecord, RunResults, ScoreField
from fiftyone_ecif.settings.misalignment import MisalignmentSettings
from fiftyone_ecif.store.tables import Store


@dataclass(frozen=True)
class MisalignmentRecord(RunRecord):
    """What a misalignment run found out.

    Attributes:
        reviewed: when the score became the probability of a review, if it did.
        table: the table of the detectors' scores in the store.
    """

    reviewed: str | None = None
    table: str | None = None


class MisalignmentConfig(RunConfig):
    """A run of :func:`fiftyone_ecif.compute_misalignment`: its settings and :class:`MisalignmentRecord`."""

    settings_type = MisalignmentSettings
    record_type = MisalignmentRecord

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
        """The kind of run."""
        return "misalignment"


class Misalignment(EcifRun):
    """Runs of :func:`fiftyone_ecif.compute_misalignment`."""


class MisalignmentResults(RunResults):
    """What a misalignment run found; see :func:`fiftyone_ecif.compute_misalignment` for its ``diagnostics``."""

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
