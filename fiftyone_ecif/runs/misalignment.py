"""Misalignment runs as FiftyOne knows them."""

from __future__ import annotations

from dataclasses import dataclass

import fiftyone.core.fields as fof

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.detectors import Calibrated
from fiftyone_ecif.misalignment.evidence import NEAR, Evidence
from fiftyone_ecif.misalignment.noise_rate import NoiseRate
from fiftyone_ecif.runs.base import EcifRun, RunConfig, RunRecord, RunResults, ScoreField
from fiftyone_ecif.settings.misalignment import MisalignmentSettings
from fiftyone_ecif.store.tables import Store


@dataclass(frozen=True)
class MisalignmentRecord(RunRecord):
    """What a misalignment run found out.

    Attributes:
        reviewed: when the score became the probability of a review, if it did.
        table: the table of the evidence in the store, from which a review learns.
    """

    reviewed: str | None = None
    table: str | None = None


class MisalignmentConfig(RunConfig):
    """A run of :func:`fiftyone_ecif.compute_misalignment`: its settings and :class:`MisalignmentRecord`."""

    settings_type = MisalignmentSettings
    record_type = MisalignmentRecord

    def fields(self, key: str) -> dict[str, ScoreField]:
        """The fields that a run under ``key`` writes."""
        what = "Probability that caption and image do not belong together"
        if self.reviewed:
            what += ", by your review"
        elif self.detector != Calibrated.name:
            what = (
                f"Share of the pairs that are less suspicious by detector {self.detector}: 1 = most likely misaligned"
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

    def evidence(self) -> Evidence:
        """What speaks for and against the pairs, in the order of :attr:`ids`, and against decoys.

        Raises:
            EcifError: if the run's store was deleted, or the run is of an older version
        """
        table = Store(*self.config.store).table(self.config.table)
        if not {"pairs", "decoys"} <= set(table.parts()):
            raise EcifError(
                f"What run {self.key!r} learned from is gone. Run compute_misalignment again with overwrite=True"
            )
        names = self.diagnostics["signals"]
        pairs, decoys = table.read("pairs", *names, "fold", "sampled"), table.read("decoys", *names, "fold", "kind")
        return Evidence.from_tables(names, pairs, decoys, self.diagnostics["seen"])

    def alike(self, row: int) -> list[tuple[int, float]]:
        """Rows of the pairs whose images are most like a pair's, the nearest first, and cosines of their features.

        Empty if the run compared no images, or its store was deleted.
        """
        table = Store(*self.config.store).table(self.config.table)
        if NEAR not in table.parts():
            return []
        found = table.read(NEAR, "row", "cosine")
        return list(zip(found["row"][row].tolist(), found["cosine"][row].tolist(), strict=True))
