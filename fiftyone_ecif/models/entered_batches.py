"""Batches of what enters the part of the towers that varies, computed once for each pair."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fiftyone_ecif.influence.objective import OneByOne
from fiftyone_ecif.models.inputs import ImageTextBatches
from fiftyone_ecif.models.tower_cut import Activations, Plan
from fiftyone_ecif.store.disk_matrix import DiskMatrix
from fiftyone_ecif.store.files import cache_folder

_IN_MEMORY = 4 << 30  # bytes, of a tower
_SHARE = 0.5  # of a disk's free room, for a tower

Side = Tensor | Activations


class EnteredBatches(OneByOne):
    """Pairs as the cut towers take them, entered when they are first asked for; what is not cut stays as it is.

    What enters is kept in memory, or in a temporary file in the cache folder if
    there is more than a fixed budget. If the disk has not twice the room for
    it, it is computed each time.

    Args:
        source: the pairs as images and tokens.
        enter: of a tower's name and what it takes, the same as it enters the part that varies.
    """

    def __init__(self, source: ImageTextBatches, enter: Callable[[str, Tensor], Side]) -> None:
        self.partition = source.partition
        self._source, self._enter = source, enter
        self._kept: dict[str, _Kept | None] = {}

    def regrouped(self, partition: Sequence[Tensor]) -> EnteredBatches:
        """The same pairs in other batches; what has entered is shared."""
        other = copy.copy(self)
        other.partition = partition
        return other

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        rows = self.partition[index]
        return self._source.with_equal((self._side("image", rows), self._side("text", rows)), rows)

    def _side(self, tower: str, rows: Tensor) -> Side:
        if tower not in self._kept:
            first = self._enter(tower, self._read(tower, rows[:1], keep=True))
            self._kept[tower] = _make_kept(first, self._source.pairs)
        kept = self._kept[tower]
        if kept is None:
            return self._enter(tower, self._read(tower, rows, keep=True))
        missing = kept.missing(rows)
        if len(missing):
            entered = self._enter(tower, self._read(tower, missing, keep=False))
            assert isinstance(entered, Activations)
            kept.write(missing, entered.rows)
        return Activations(kept.read(rows), kept.plan)

    def _read(self, tower: str, rows: Tensor, keep: bool) -> Tensor:
        return self._source.images_of(rows, keep) if tower == "image" else self._source.tokens_of(rows)


class _Kept:
    """Rows of activations, in the order in which they came: batches that come again are long stretches of a file.

    Args:
        plan: of the tower.
        matrix: of as many rows as there are pairs.
        device: where the rows are needed.
    """

    def __init__(self, plan: Plan, matrix: Tensor | DiskMatrix, device: torch.device) -> None:
        self.plan = plan
        self._matrix, self._device = matrix, device
        self._places = torch.full((len(matrix),), -1)
        self._count = 0

    def missing(self, rows: Tensor) -> Tensor:
        """Those of the pairs that have not entered."""
        return rows[self._places[rows] < 0]

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Keeps what entered of some pairs."""
        places = torch.arange(self._count, self._count + len(rows))
        self._places[rows] = places
        self._count += len(rows)
        if isinstance(self._matrix, Tensor):
            self._matrix[places] = values.to(self._matrix.device)
        else:
            self._matrix.write(places.tolist(), values.cpu().numpy())

    def read(self, rows: Tensor) -> Tensor:
        """What entered of some pairs, on the device."""
        return self._matrix[self._places[rows]].to(self._device)


def _make_kept(first: Side, pairs: int) -> _Kept | None:
    """Room for the activations of all pairs, like those of the first; None where nothing is cut or there is none."""
    if isinstance(first, Tensor):
        return None
    values = first.rows
    if pairs * values.nbytes <= _IN_MEMORY:
        return _Kept(first.plan, torch.empty(pairs, values.shape[1], dtype=values.dtype), values.device)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if values.dtype != torch.float32 or pairs * values.nbytes > _SHARE * shutil.disk_usage(folder).free:
        return None
    return _Kept(first.plan, DiskMatrix(pairs, values.shape[1], folder), values.device)
