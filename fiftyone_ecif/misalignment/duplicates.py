"""Pairs that share an image or a caption with another pair, exactly or nearly."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.neighbours import nearest

_SAME = 0.999  # cosine of centred image features from which two images are called the same
_NEAR = 8  # neighbours in which near-duplicates are looked for


@dataclass(frozen=True)
class Duplicates:
    """Which pairs share what, as group numbers of shape ``(N,)``.

    Attributes:
        image: of pairs with the same or nearly the same image.
        caption: of pairs whose captions differ in case, spacing and punctuation at most.
        pair: of pairs that share both.
    """

    image: np.ndarray
    caption: np.ndarray

    @property
    def pair(self) -> np.ndarray:
        """Of pairs that share image and caption, as group numbers of shape ``(N,)``."""
        return _groups(np.stack([self.image, self.caption], axis=1))

    def kinds(self) -> list[str | None]:
        """What each pair is a duplicate in.

        ``"pair"`` if another one has the same image and the same caption,
        ``"image"`` if another one has the same image with another caption, so
        that one of them may be wrong; otherwise None. That captions are shared
        is common and no finding.
        """
        same_pair, same_image = (np.bincount(group)[group] for group in (self.pair, self.image))
        return [
            "image" if images > pairs else "pair" if pairs > 1 else None
            for images, pairs in zip(same_image, same_pair, strict=True)
        ]

    def summary(self) -> dict[str, int]:
        """How many pairs have a duplicate of each kind; captions, which are not fields, included."""
        kinds = self.kinds()
        return {
            "pair": kinds.count("pair"),
            "image": kinds.count("image"),
            "caption": int((np.bincount(self.caption)[self.caption] > 1).sum()),
        }


def find_duplicates(images: Tensor, captions: Sequence[str], device: str = "cpu") -> Duplicates:
    """Finds duplicates by frozen image features and by text.

    Args:
        images: image features, shape ``(N, w)``.
        captions: one for each.
        device ("cpu"): where images are compared.
    """
    numbers: dict[str, int] = {}  # an array of text would be as wide as the longest caption
    words = [numbers.setdefault(_words(caption), len(numbers)) for caption in captions]
    return Duplicates(_same_images(images.cpu(), device), np.array(words))


def _words(caption: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", caption).casefold()).strip() or caption


def _same_images(images: Tensor, device: str) -> np.ndarray:
    exact = _groups(images.numpy())
    first = np.unique(exact, return_index=True)[1]  # one of each, so that many copies do not fill the neighbours
    distinct = images[torch.from_numpy(first)]
    distinct -= distinct.mean(0)
    try:
        found = nearest(distinct, _NEAR, device=device, alike=_SAME)
    except EcifError:  # there is but one image
        return exact
    rows, places = torch.nonzero(found.similarity >= _SAME, as_tuple=True)
    columns = found.rows[rows, places]
    links = coo_array((np.ones(len(rows)), (rows.numpy(), columns.numpy())), shape=(len(first), len(first)))
    labels: np.ndarray = connected_components(links, directed=False)[1][exact]
    return labels


def _groups(rows: np.ndarray) -> np.ndarray:
    """The same number for the same row."""
    numbers: np.ndarray = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers
