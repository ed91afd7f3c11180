"""What the towers take: images as pixels and captions as tokens, decoded from their files."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import Resize

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.losses import others_equal
from fiftyone_ecif.influence.objective import OneByOne
from fiftyone_ecif.models.images import UnreadableImageError, read_image, read_jpeg

_AHEAD = 2  # batches that are read before they are asked for
_MOST_READERS = 8
_SHARE = 8  # images that a thread reads at a time

Loaded = tuple[int, "Tensor | None", "str | None"]


class Images:
    """``(index, image, None)`` of each file, or ``(index, None, reason)`` of one that cannot be read.

    Args:
        paths: of the files.
        preprocess: makes of a PIL image a tensor of one shape for all.
        preprocess_jpeg (None): makes as much of a decoded JPEG file, uint8 of
            shape ``(3, h, w)``; by default such files are read like all others.
    """

    def __init__(
        self,
        paths: Sequence[str],
        preprocess: Callable[[Image.Image], Tensor],
        preprocess_jpeg: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.paths, self.preprocess, self.preprocess_jpeg = paths, preprocess, preprocess_jpeg

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Loaded:
        path = self.paths[index]
        if self.preprocess_jpeg is not None and path.lower().endswith((".jpg", ".jpeg")):
            with contextlib.suppress(RuntimeError, OSError):  # what is odd about it is said below
                return index, self.preprocess_jpeg(read_jpeg(path)), None
        try:
            return index, self.preprocess(read_image(path)), None
        except UnreadableImageError as error:
            return index, None, error.reason


def default_readers() -> int:
    """Threads that read images: as many as there are processors, but no more than eight.

    More wait for Python's lock, and make whoever launches the towers wait too: with 16 of them on 16 processors a
    ViT-L-14 on an H200 encoded 1,410 images a second, with 8 of them 1,640, of 1,840 from pixels.
    """
    return min(os.cpu_count() or 1, _MOST_READERS)


def loaded(
    images: Images, batch_size: int, num_workers: int, pin: bool = False
) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
    """Images in batches, those of the next batches being read by threads meanwhile.

    Threads and not processes: decoding and resizing give up Python's lock, and
    a process that has a GPU or a database connection must not be forked.

    Args:
        images: what to read.
        batch_size: at once.
        num_workers: threads that read; 0 for none but this one.
        pin (False): whether batches are put where a GPU copies from while it computes.

    Yields:
        indices and stacked images, ``(n, ...)``, of those that could be read,
        and ``{index: reason}`` of the others
    """
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    if not num_workers:
        for batch in batches:
            yield _together([images[index] for index in batch], pin)
        return
    readers, stacker = ThreadPoolExecutor(num_workers), ThreadPoolExecutor(1)
    ahead: deque[Future[Any]] = deque()
    try:
        for batch in batches:
            shares = [batch[start : start + _SHARE] for start in range(0, len(batch), _SHARE)]
            reading = [readers.submit(lambda share: [images[index] for index in share], share) for share in shares]
            ahead.append(
                stacker.submit(lambda parts: _together([one for part in parts for one in part.result()], pin), reading)
            )
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:  # also where the reader of this stops early
        readers.shutdown(cancel_futures=True)
        stacker.shutdown(wait=False, cancel_futures=True)


def _together(batch: Sequence[Loaded], pin: bool) -> tuple[list[int], Tensor, dict[int, str]]:
    images = {index: image for index, image, _ in batch if image is not None}
    failures = {index: reason for index, _, reason in batch if reason is not None}
    if not images:
        return [], torch.empty(0), failures
    first = next(iter(images.values()))
    stacked = torch.empty(len(images), *first.shape, dtype=first.dtype, pin_memory=pin)
    rows = stacked.numpy()  # torch would copy with as many threads as there are cores, which wait for those that read
    for row, image in enumerate(images.values()):
        rows[row] = image.numpy()
    return list(images), stacked, failures


def resize_pixels(step: Resize, image: Tensor) -> Tensor:
    """What torchvision's ``Resize`` makes of an image, but in whole numbers as PIL does, seven times as fast.

    Args:
        step: with antialiasing.
        image: uint8, shape ``(3, h, w)``.

    Returns:
        uint8, within two of 256 levels of what PIL gives, and equal to it in most pixels
    """
    size = step.size
    if isinstance(size, int) or len(size) == 1:
        short = size if isinstance(size, int) else size[0]
        height, width = image.shape[1:]
        long = int(short * max(height, width) / min(height, width))
        size = (long, short) if height > width else (short, long)
    resized: Tensor = interpolate(image[None], list(size), mode=step.interpolation.value, antialias=True)[0]
    return resized


class ImageTextBatches(OneByOne):
    """Batches of pixels and tokens, decoded when they are first asked for.

    Pixels stay in memory as long as all of them fit into a fixed budget. A file
    that cannot be read any more is an ``EcifError`` when its batch is asked for.

    Args:
        images: files that can be read.
        tokens: what the text tower takes for the caption of each, shape ``(N, t)``.
        device: where the pixels are needed.
        partition: the row indices of each batch.
        finish: makes of images on the device what the image tower takes.
        twins (None): by which equal pairs are told (``losses.equal_pairs``), which are not each other's negatives then.
    """

    _BUDGET = 4 << 30  # bytes

    def __init__(
        self,
        images: Images,
        tokens: Tensor,
        device: str,
        partition: Sequence[Tensor],
        finish: Callable[[Tensor], Tensor],
        twins: Tensor | None = None,
    ) -> None:
        self.partition, self._finish, self._twins = partition, finish, twins
        self._images, self._tokens, self._device = images, tokens, device
        self._pixels: dict[int, Tensor] = {}  # as few bytes as decoding gives

    @property
    def pairs(self) -> int:
        """How many pairs there are, in batches or not."""
        return len(self._images)

    def regrouped(self, partition: Sequence[Tensor]) -> ImageTextBatches:
        """The same pairs in other batches; what is decoded is shared."""
        other = copy.copy(self)
        other.partition = partition
        return other

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        rows = self.partition[index]
        return self.with_equal((self.images_of(rows), self.tokens_of(rows)), rows)

    def with_equal(self, batch: tuple[Any, Any], rows: Tensor) -> tuple[Any, ...]:
        """A batch with, third, which of its pairs are equal, if equal pairs are spared."""
        return batch if self._twins is None else (*batch, others_equal(self._twins, rows).to(self._device))

    def tokens_of(self, rows: Tensor) -> Tensor:
        """What the text tower takes for some pairs, shape ``(n, t)``."""
        return self._tokens[rows.to(self._tokens.device)]

    def images_of(self, rows: Tensor, keep: bool = True) -> Tensor:
        """What the image tower takes for some pairs, shape ``(n, 3, h, w)``.

        Args:
            rows: of the pairs.
            keep (True): whether their pixels are asked for again.

        Raises:
            EcifError: for a file that cannot be read any more
        """
        wanted = rows.tolist()
        found = {row: self._pixels[row] for row in wanted if row in self._pixels}
        missing = [row for row in wanted if row not in found]
        if missing:
            with ThreadPoolExecutor() as pool:
                loaded = list(pool.map(self._images.__getitem__, missing))
            for row, image, reason in loaded:
                if image is None:
                    path = self._images.paths[row]
                    raise EcifError(f"The image {path} cannot be read any more ({reason}). Run again")
                found[row] = image
        if keep and found[wanted[0]].nbytes * self.pairs <= self._BUDGET:
            self._pixels |= found
        return self._finish(torch.stack([found[row] for row in wanted]).to(self._device))
