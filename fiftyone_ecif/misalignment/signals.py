"""What speaks against a pair, in the eyes of one model: numbers, higher = more suspicious.

All take any image with any caption, so that decoys are measured as the pairs themselves are.
Their names and words are in :mod:`fiftyone_ecif.misalignment.evidence`. ``u``, ``v`` are unit
embeddings, ``s = u . v``; ``K`` is :data:`NEAR`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.misalignment.matching import Freedom, match

NEAR = 30
_DOUBT = 5.0  # how much less a neighbour says whose own image and caption are far apart, as in LEMoN
_BEST = 3  # competitors in a margin
_ROWS = 1024  # pairs that are measured at a time


@dataclass(frozen=True)
class Surroundings:
    """What pairs are compared with.

    Attributes:
        near_images: rows whose image is like each row's, the nearest first, shape ``(N, K + 1)``.
        near_captions: likewise for captions.
        references: rows that compete, shape ``(R,)``.
        same_image: group numbers: images of one are the same; shape ``(N,)``.
        same_caption: likewise for captions.
    """

    near_images: Tensor
    near_captions: Tensor
    references: Tensor
    same_image: Tensor
    same_caption: Tensor

    @cached_property
    def places(self) -> Tensor:
        """Where each row is among the references, -1 if it is not, shape ``(N,)``."""
        places = torch.full((len(self.near_images),), -1)
        places[self.references] = torch.arange(len(self.references))
        return places


class PairSpace:
    """Unit embeddings of all pairs by one model.

    Args:
        images: shape ``(N, d)``.
        captions: likewise.
        scale: what cosines are multiplied with in a softmax.
        around: what pairs are compared with.
        device ("cpu"): where.
    """

    def __init__(
        self, images: Tensor, captions: Tensor, scale: float, around: Surroundings, device: str = "cpu"
    ) -> None:
        self.images, self.captions = images.to(device), captions.to(device)
        self.scale, self.around, self.device = scale, around, device
        self._trust = torch.exp(-_DOUBT * (1 - (self.images * self.captions).sum(1)))

    def measure(self, image: Tensor, caption: Tensor) -> np.ndarray:
        """All signals of some pairs, shape ``(M, 7)``, float32, in the order of ``SIGNALS``.

        * ``distance``: ``1 - s``
        * ``competition``: negCLIPLoss (arXiv 2405.19547): how much more probable the competitors are
        * ``margin``: the mean similarity of the three best competitors of each side, less ``s``
        * ``image_agreement``: the mean over the pairs ``m`` with the nearest images of ``1 - v . v_m``, each weighted
          by the similarity of the image and by ``exp(-5 (1 - s_mm))`` (deep k-NN with the trust of LEMoN)
        * ``caption_agreement``: likewise, of the nearest captions
        * ``image_influence``: minus the mean over the nearest images of ``cos(r, r_m)``, where ``r`` is the step that
          the pair's loss asks of its image embedding: positive if a step for the pair is one against its neighbours
        * ``caption_influence``: likewise for captions

        Args:
            image: rows that the images are of, shape ``(M,)``.
            caption: rows that the captions are of, likewise.
        """
        parts = [
            self._measure(*part) for part in zip(torch.split(image, _ROWS), torch.split(caption, _ROWS), strict=True)
        ]
        return torch.cat(parts).cpu().numpy()

    def matching(self, image: Tensor, caption: Tensor) -> np.ndarray:
        """Log odds that image and caption do not belong together, if each has one partner, shape ``(M,)``, float32.

        See :mod:`fiftyone_ecif.misalignment.matching`; of the references, as many as there are.

        Args:
            image: rows that the images are of, shape ``(M,)``.
            caption: rows that the captions are of, likewise.
        """
        free_captions, free_images = self._freedom
        found = []
        for rows, others in zip(torch.split(image, _ROWS), torch.split(caption, _ROWS), strict=True):
            similarity, other_captions, other_images = self._compare(rows, others)
            for_image = free_captions.asked_by(self.around.places[rows]) + self.scale * other_captions
            for_caption = free_images.asked_by(self.around.places[others]) + self.scale * other_images
            found.append(sum(torch.logsumexp(side, 1) for side in (for_image, for_caption)) - self.scale * similarity)
        odds: np.ndarray = torch.cat(found).cpu().numpy()
        return odds

    @cached_property
    def _freedom(self) -> tuple[Freedom, Freedom]:
        """Of the references' captions, and of their images."""
        around, references = self.around, self.around.references
        groups = [
            torch.unique(side[references], return_inverse=True)[1].to(self.device)
            for side in (around.same_image, around.same_caption)
        ]
        weights = self.scale * self.images[references] @ self.captions[references].T
        return match(weights, *groups)

    def _compare(self, image: Tensor, caption: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Similarities of some pairs, of their images with other captions and of their captions with other images."""
        around, references = self.around, self.around.references
        u, v = self.images[image], self.captions[caption]
        shares_image = around.same_image[references][None] == around.same_image[image][:, None]
        shares_caption = around.same_caption[references][None] == around.same_caption[caption][:, None]
        own = shares_caption | (shares_image & (references[None] != image[:, None]))
        other_captions = self._rivals(u, self.captions, own)
        own = shares_image | (shares_caption & (references[None] != caption[:, None]))
        return (u * v).sum(1), other_captions, self._rivals(v, self.images, own)

    def _measure(self, image: Tensor, caption: Tensor) -> Tensor:
        around, references = self.around, self.around.references
        u, v = self.images[image], self.captions[caption]
        similarity, other_captions, other_images = self._compare(image, caption)
        ease = sum(torch.logsumexp(self.scale * rivals, 1) for rivals in (other_captions, other_images)) / 2
        few = min(_BEST, len(references))
        best = sum(rivals.topk(few, dim=1).values.mean(1) for rivals in (other_captions, other_images)) / 2
        columns = [1 - similarity, ease - self.scale * similarity, best - similarity]
        near_images = without(around.near_images[image], caption)
        near_captions = without(around.near_captions[caption], image)
        columns.append(self._disagreement(u, v, self.images, self.captions, near_images))
        columns.append(self._disagreement(v, u, self.captions, self.images, near_captions))
        for at, rivals, other, steps, near in (
            (v, other_captions, self.captions, self.image_steps, near_images),
            (u, other_images, self.images, self.caption_steps, near_captions),
        ):
            step = normalize(at - torch.softmax(self.scale * rivals, 1) @ other[references], dim=1)
            agree = torch.einsum("nd,nkd->nk", step, steps[near])
            columns.append(-(agree * self._trust[near]).mean(1))
        return torch.stack([column.cpu() for column in columns], dim=1)

    def _rivals(self, anchors: Tensor, others: Tensor, own: Tensor) -> Tensor:
        """Similarity to the references, those of the pair itself far below all others."""
        return (anchors @ others[self.around.references].T).masked_fill(own.to(self.device), -9.0)

    def _disagreement(self, near: Tensor, far: Tensor, side: Tensor, other: Tensor, rows: Tensor) -> Tensor:
        alike = torch.einsum("nd,nkd->nk", near, side[rows]).clamp_min(0) * self._trust[rows]
        apart = 1 - torch.einsum("nd,nkd->nk", far, other[rows])
        return (alike * apart).sum(1) / alike.sum(1).clamp_min(torch.finfo(alike.dtype).tiny)

    @cached_property
    def image_steps(self) -> Tensor:
        """The direction that each pair's own loss pulls its image in, of unit length, shape ``(N, d)``."""
        return self._steps(self.images, self.captions)

    @cached_property
    def caption_steps(self) -> Tensor:
        """Likewise for its caption."""
        return self._steps(self.captions, self.images)

    def _steps(self, anchors: Tensor, others: Tensor) -> Tensor:
        references, found = self.around.references, torch.empty_like(others)
        for rows in torch.split(torch.arange(len(anchors)), _ROWS):
            rivals = self._rivals(anchors[rows], others, references[None] == rows[:, None])
            pulled = torch.softmax(self.scale * rivals, 1) @ others[references]
            found[rows] = normalize(others[rows] - pulled, dim=1)
        return found


def feature_agreement(
    images: Tensor, texts: Tensor, around: Surroundings, image: Tensor, caption: Tensor
) -> np.ndarray:
    """The ``FEATURE_SIGNALS`` of some pairs: how far the captions of similar images are apart, and so on.

    Args:
        images: features of all pairs, shape ``(N, w)``; those of images and captions are never compared.
        texts: likewise, shape ``(N, v)``.
        around: what pairs are compared with.
        image: rows that the images are of, shape ``(M,)``.
        caption: rows that the captions are of, likewise.
    """
    found = []
    for at, other in zip(torch.split(image, _ROWS), torch.split(caption, _ROWS), strict=True):
        near_images = without(around.near_images[at], other)
        near_captions = without(around.near_captions[other], at)
        columns = [
            1 - torch.einsum("nd,nkd->nk", side[rows], side[near]).mean(1)
            for side, rows, near in ((texts, other, near_images), (images, at, near_captions))
        ]
        found.append(torch.stack(columns, dim=1))
    agreement: np.ndarray = torch.cat(found).cpu().numpy()
    return agreement


def without(near: Tensor, rows: Tensor) -> Tensor:
    """Neighbours other than one row each, as many of each: ``(M, K + 1)`` to ``(M, K)``; a single one stays."""
    if near.shape[1] == 1:
        return near
    last = (near == rows[:, None]).to(torch.int8).argsort(dim=1, stable=True)
    return near.gather(1, last)[:, :-1]
