"""The scores of a dataset at a glance: their distribution, their extremes, what a cut takes.

Read once from the database, then answered from memory, so that a slider over
100,000 pairs moves freely. What it returns is of the size of a screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, reduce
from operator import or_
from typing import Any, NamedTuple

import fiftyone.core.fields as fof
import numpy as np
from fiftyone import ViewField
from scipy.special import expit, logit

from fiftyone_ecif.runs.manage import finished_runs
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.samples.selection import DIRECTIONS, SIGNS, whole_pairs

_SUREST = 1e-3  # probabilities nearer to 0 or 1 are drawn there


def is_probability(field: str) -> bool:
    """Whether a score is drawn by its log odds."""
    return field.endswith("_misalignment")


def drawn(field: str, values: np.ndarray) -> np.ndarray:
    """Where scores are drawn: probabilities at their log odds, which shows the valley between right and wrong pairs."""
    return logit(np.clip(values, _SUREST, 1 - _SUREST)) if is_probability(field) else values


class Histogram(NamedTuple):
    """How many pairs have which score.

    Attributes:
        edges: of the bins, ascending, shape ``(b + 1,)``.
        counts: of the pairs in each, shape ``(b,)``.
    """

    edges: np.ndarray
    counts: np.ndarray


class Cut(NamedTuple):
    """What a cut at one end of a score takes.

    Attributes:
        ids: of the samples, the extreme ones first.
        threshold: the score of the last of them; None if there are none.
    """

    ids: list[str]
    threshold: float | None


class ScoreTable:
    """The scores of the pairs.

    Args:
        ids: of the scored samples.
        columns: their scores by field, shape ``(N,)`` each, NaN where there is none.
    """

    def __init__(self, ids: Sequence[str], columns: dict[str, np.ndarray]) -> None:
        self.ids = np.array(ids)
        self.columns = columns

    @cached_property
    def places(self) -> dict[str, int]:
        """The row of each sample."""
        return {sample: row for row, sample in enumerate(self.ids.tolist())}

    def value(self, field: str, sample: str) -> float | None:
        """The score of one sample; None if it has none."""
        row = self.places.get(sample)
        value = math.nan if row is None else float(self.columns[field][row])
        return value if math.isfinite(value) else None

    def place(self, field: str, sample: str) -> tuple[int, str]:
        """The place of a scored sample from the nearer end, 1 = the first; and ``"highest"`` or ``"lowest"``."""
        values, value = self.columns[field], self.columns[field][self.places[sample]]
        above, below = int((values > value).sum()), int((values < value).sum())
        return (above + 1, "highest") if above < below else (below + 1, "lowest")

    def histogram(self, field: str, bins: int = 60) -> Histogram:
        """How the scores are distributed.

        Args:
            field: the score.
            bins (60): how many, of one width where they are drawn, over the whole range.
        """
        values = self.columns[field]
        values = values[np.isfinite(values)]
        counts, edges = np.histogram(drawn(field, values), bins)
        if is_probability(field):
            edges = expit(edges)
            edges[[0, -1]] = min(edges[0], values.min(initial=1)), max(edges[-1], values.max(initial=0))
        return Histogram(edges, counts)

    def scored(self, field: str) -> list[str]:
        """The samples with a score."""
        return list(self.ids[np.isfinite(self.columns[field])])

    def between(self, field: str, low: float, high: float) -> list[str]:
        """The samples with a score in ``[low, high]``."""
        values = self.columns[field]
        return list(self.ids[(values >= low) & (values <= high)])

    def ordered(self, field: str, samples: Sequence[str]) -> list[str]:
        """Scored samples by ascending score, each once; others are left out."""
        rows = np.array(sorted({self.places[sample] for sample in samples if sample in self.places}), dtype=int)
        return list(self.ids[rows[np.argsort(self.columns[field][rows], kind="stable")]])

    def points(self, x: str, y: str, limit: int = 5000, seed: int = 0) -> np.ndarray:
        """Rows to draw: all, or the extremes of both scores and a random rest.

        Args:
            x: one score.
            y: another.
            limit (5000): how many rows at most.
            seed (0): of the rest.

        Returns:
            rows of :attr:`ids`, ascending
        """
        both = np.flatnonzero(np.isfinite(self.columns[x]) & np.isfinite(self.columns[y]))
        if len(both) <= limit:
            return both
        edge = limit // 16
        kept = set[int]()
        for field in (x, y):
            order = both[np.argsort(self.columns[field][both], kind="stable")]
            kept |= {*order[:edge].tolist(), *order[-edge:].tolist()}
        rest = np.setdiff1d(both, list(kept))
        drawn = np.random.default_rng(seed).permutation(rest)[: limit - len(kept)]
        return np.sort(np.concatenate([np.array(sorted(kept)), drawn]))

    def cut(self, field: str, direction: str, share: float) -> Cut:
        """The pairs at one end of a score.

        Args:
            field: the score.
            direction: one of :data:`fiftyone_ecif.samples.selection.DIRECTIONS`.
            share: of the scored pairs at most, in [0, 1]; rounded up to whole
                pairs, and none that are of the other sign, as
                :func:`fiftyone_ecif.select_by_influence` does.
        """
        order = self._ascending(field)
        if DIRECTIONS[direction] == "highest":
            order = order[::-1]
        rows = order[: whole_pairs(share, len(order))]
        if sign := SIGNS.get(direction):
            rows = rows[sign * self.columns[field][rows] > 0]
        return Cut(list(self.ids[rows]), float(self.columns[field][rows[-1]]) if len(rows) else None)

    def _ascending(self, field: str) -> np.ndarray:
        values = self.columns[field]
        scored = np.flatnonzero(np.isfinite(values))
        return scored[np.argsort(values[scored], kind="stable")]


def read_score_table(dataset: Any) -> ScoreTable:
    """The scores of all runs on a dataset, kept in memory until one is written anew or samples come or go.

    Runs that are not written to their end are left out.
    """
    keys = finished_runs(dataset)
    version = (
        str(dataset._doc.id),
        every_sample(dataset).count(),
        *(f"{key} {dataset._doc.brain_methods[key].results.grid_id}" for key in keys),  # new with each writing
    )
    found = _latest.get(version)
    if found is None:
        fields = [name for key in keys for name in score_fields(dataset, key, dataset.get_brain_info(key).config)]
        found = _read(dataset, fields)
        _latest.clear()
        _latest[version] = found
    return found


def score_fields(dataset: Any, key: str, config: Any) -> list[str]:
    """The fields of a run that hold numbers to compare pairs by."""
    return [
        name
        for name, field in config.fields(key).items()
        if field.type is fof.FloatField and dataset.has_sample_field(name)
    ]


def _read(dataset: Any, fields: Sequence[str]) -> ScoreTable:
    if not fields:
        return ScoreTable([], {})
    scored = every_sample(dataset).match(reduce(or_, (ViewField(name) != None for name in fields)))  # noqa: E711
    ids, *columns = scored.values(["id", *fields])
    arrays = [np.array([math.nan if value is None else value for value in column], dtype=float) for column in columns]
    return ScoreTable(ids, dict(zip(fields, arrays, strict=True)))


_latest: dict[tuple[Any, ...], ScoreTable] = {}
