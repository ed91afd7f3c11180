"""What the towers take: images as pixels and captions as tokens, decoded from their files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fiftyone_ecif.errors import EcifError

if TYPE_CHECKING:
    from fiftyone_ecif.models.encoder import Encoder


class Images(Dataset[Any]):
    """``(index, image, None)`` of each file, or ``(index, None, reason)``."""

    def __init__(self, paths: Sequence[str], preprocess: Any) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str | None]:
        try:
            with Image.open(self.paths[index]) as image:
                return index, self.preprocess(image), None
        except Exception as error:  # PIL raises many kinds on damaged files
            return index, None, str(error) or type(error).__name__


def collate(batch: Sequence[tuple[int, Tensor | None, str | None]]) -> tuple[list[int], Tensor, dict[int, str]]:
    """Indices and stacked images of those that could be read, and ``{index: reason}`` of the others."""
    images = {index: image for index, image, _ in batch if image is not None}
    failures = {index: reason for index, _, reason in batch if reason is not None}
    return list(images), torch.stack(list(images.values())) if images else torch.empty(0), failures


class ImageTextBatches(Sequence[tuple[Tensor, Tensor]]):
    """Batches of pixels and tokens, decoded when they are first asked for.

    Pixels stay in memory as long as all of them fit into a fixed budget.

    Args:
        encoder: prepares them.
        paths: image files that can be read.
        captions: one for each.
        partition: the row indices of each batch.
    """

    _BUDGET = 4 << 30  # bytes

    def __init__(
        self, encoder: Encoder, paths: Sequence[str], captions: Sequence[str], partition: Sequence[Tensor]
    ) -> None:
        self.partition = partition
        self._encoder = encoder
        self._images = Images(paths, encoder.preprocess)
        self._tokens = encoder.tokens(captions)
        self._pixels: dict[int, Tensor] = {}

    def regrouped(self, partition: Sequence[Tensor]) -> ImageTextBatches:
        """The same pairs in other batches; what is decoded is shared."""
        other = copy.copy(self)
        other.partition = partition
        return other

    def __len__(self) -> int:
        return len(self.partition)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        rows = self.partition[index]
        pixels = self._decode(rows.tolist())
        return pixels, self._tokens[rows.to(self._tokens.device)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def _decode(self, rows: list[int]) -> Tensor:
        missing = [row for row in rows if row not in self._pixels]
        found = {row: self._pixels[row] for row in rows if row in self._pixels}
        if missing:
            with ThreadPoolExecutor() as pool:
                loaded = list(pool.map(self._images.__getitem__, missing))
            for row, image, reason in loaded:
                if image is None:
                    path = self._images.paths[row]
                    raise EcifError(f"The image {path} cannot be read any more ({reason}). Run again")
                found[row] = image
        if found[rows[0]].nbytes * len(self._images) <= self._BUDGET:
            self._pixels |= found
        return torch.stack([found[row] for row in rows]).to(self._encoder.device)
