"""What the towers take: images as pixels and captions as tokens, decoded from their files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.images import UnreadableImageError, read_image


class Images(Dataset[Any]):
    """``(index, image, None)`` of each file, or ``(index, None, reason)`` of one that cannot be read.

    Args:
        paths: of the files.
        preprocess: makes of a PIL image what the image tower takes, of one shape for all.
    """

    def __init__(self, paths: Sequence[str], preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str | None]:
        try:
            return index, self.preprocess(read_image(self.paths[index])), None
        except UnreadableImageError as error:
            return index, None, error.reason


def collate(batch: Sequence[tuple[int, Tensor | None, str | None]]) -> tuple[list[int], Tensor, dict[int, str]]:
    """Makes a batch of what :class:`Images` gives.

    Returns:
        indices and stacked images, ``(n, ...)``, of those that could be read,
        and ``{index: reason}`` of the others
    """
    images = {index: image for index, image, _ in batch if image is not None}
    failures = {index: reason for index, _, reason in batch if reason is not None}
    return list(images), torch.stack(list(images.values())) if images else torch.empty(0), failures


class ImageTextBatches(Sequence[tuple[Tensor, Tensor]]):
    """Batches of pixels and tokens, decoded when they are first asked for.

    Pixels stay in memory as long as all of them fit into a fixed budget. A file
    that cannot be read any more is an ``EcifError`` when its batch is asked for.

    Args:
        images: files that can be read.
        tokens: what the text tower takes for the caption of each, shape ``(N, t)``.
        device: where the pixels are needed.
        partition: the row indices of each batch.
    """

    _BUDGET = 4 << 30  # bytes

    def __init__(self, images: Images, tokens: Tensor, device: str, partition: Sequence[Tensor]) -> None:
        self.partition = partition
        self._images, self._tokens, self._device = images, tokens, device
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
        return torch.stack([found[row] for row in rows]).to(self._device)
