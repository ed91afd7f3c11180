"""Matrices that need not fit into memory: rows in a temporary file, read when they are asked for."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.errors import EcifError

_ITEM = 4  # bytes of a float32
_AT_ONCE = 4096  # rows that are copied


class DiskMatrix:
    """A float32 matrix on disk, zero until it is written; indexed like a tensor, by rows.

    The file has no name that others see and goes with the object or the process.
    It is read, not mapped, so that what was read does not stay in memory.

    Args:
        count: ``N``.
        width: ``w``.
        folder: where the file is made; there must be room for ``4 N w`` bytes.

    Attributes:
        shape: ``(N, w)``.

    Raises:
        EcifError: when it is made or written and the disk is full
    """

    def __init__(self, count: int, width: int, folder: Path) -> None:
        self.shape = (count, width)
        self._folder = folder
        self._places: np.ndarray | None = None  # of the rows in the file, where these are a selection
        try:
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115, closed when it is not used
            self._file.truncate(count * width * _ITEM)
        except OSError as error:
            raise self._full(error) from error

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.shape[0] * self.shape[1] * _ITEM

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Some rows as a tensor, shape ``(n, w)``.

        Raises:
            IndexError: if there is no such row
        """
        rows = _numbers(index, len(self))
        places = rows if self._places is None else self._places[rows]
        values = np.empty((len(places), self.shape[1]), dtype=np.float32)
        for (first, last), start in _runs(places):
            self._file.seek(start * self.shape[1] * _ITEM)
            self._read(values[first:last])
        return torch.from_numpy(values)

    def write(self, places: Sequence[int] | np.ndarray, values: np.ndarray) -> None:
        """Sets rows, shape ``(n, w)``."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        try:
            for (first, last), start in _runs(np.asarray(places)):
                self._file.seek(start * self.shape[1] * _ITEM)
                left = _bytes(values[first:last])
                while len(left):
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise self._full(error) from error

    def select(self, rows: Tensor | np.ndarray) -> DiskMatrix:
        """Some of the rows, in a matrix that shares the file."""
        other = object.__new__(DiskMatrix)
        other._file, other._folder = self._file, self._folder
        rows = np.asarray(rows)
        other._places = rows if self._places is None else self._places[rows]
        other.shape = (len(rows), self.shape[1])
        return other

    def in_order(self, rows: Tensor | np.ndarray) -> DiskMatrix:
        """The same matrix with its rows in the file in the order in which they are read: one long stretch.

        Args:
            rows: all of them, each once, shape ``(N,)``.
        """
        order = np.asarray(rows)
        other = DiskMatrix(*self.shape, self._folder)
        for start in range(0, len(order), _AT_ONCE):
            chosen = order[start : start + _AT_ONCE]
            other.write(range(start, start + len(chosen)), self[torch.from_numpy(chosen)].numpy())
        other._places = np.argsort(order)
        return other

    def _read(self, values: np.ndarray) -> None:
        left = _bytes(values)
        while len(left):
            got = self._file.readinto(left)
            if not got:
                raise EcifError(f"A temporary file in {self._folder} is shorter than it was written. Run again")
            left = left[got:]

    def _full(self, error: OSError) -> EcifError:
        need = self.shape[0] * self.shape[1] * _ITEM / 2**20
        return EcifError(
            f"A temporary file of {need:.0f} MiB cannot be written to {self._folder} ({error.strerror}). "
            "Make room, or set FIFTYONE_ECIF_CACHE_DIR to another disk"
        )


def _numbers(index: Tensor | slice, count: int) -> np.ndarray:
    """Of the rows that are meant, out of ``count``, in a time that depends on how many those are."""
    if isinstance(index, slice):
        return np.arange(*index.indices(count))
    try:  # no NumPy array: inside a function that is differentiated tensors are wrapped and have no storage
        chosen = index.tolist()
    except RuntimeError:  # nor a list, with older versions of torch
        chosen = [row.item() for row in index]
    if index.dtype == torch.bool:
        return np.flatnonzero(chosen)
    if chosen and not 0 <= min(chosen) <= max(chosen) < count:
        raise IndexError(f"row {min(chosen)} or {max(chosen)} is not among {count}")
    return np.array(chosen, dtype=np.int64)


def _bytes(values: np.ndarray) -> Any:
    return values.reshape(-1).view(np.uint8)


def _runs(places: np.ndarray) -> list[tuple[tuple[int, int], int]]:
    """Stretches of consecutive places: where each begins and ends among them, and its first place."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    edges = [0, *breaks.tolist(), len(places)]
    return [((a, b), int(places[a])) for a, b in itertools.pairwise(edges) if b > a]
