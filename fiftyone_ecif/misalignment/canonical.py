"""Heads in closed form: the directions in which features of images and of captions agree."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

_DIRECTIONS = 64  # at most
_ROWS = 4096  # that are embedded at a time


class Rows(Protocol):
    """Features that are read when they are asked for, shape ``(N, w)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice, /) -> Tensor: ...


class CanonicalHeads(NamedTuple):
    """Linear maps of features, image side first.

    Attributes:
        means: taken off first, shape ``(w,)`` each.
        heads: shape ``(w, d)`` each.
    """

    means: tuple[Tensor, Tensor]
    heads: tuple[Tensor, Tensor]

    def embed(self, images: Rows, texts: Rows) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and captions, float32, shape ``(N, d)`` each."""
        found = []
        for side, mean, head in zip((images, texts), self.means, self.heads, strict=True):
            places = range(0, len(side), _ROWS)
            parts = [(side[start : start + _ROWS].double() - mean) @ head for start in places]
            found.append(normalize(torch.cat(parts), dim=1).float())
        return found[0], found[1]


def canonical_heads(images: Tensor, texts: Tensor, weights: Tensor, ridge: float) -> CanonicalHeads:
    """Regularised canonical correlation analysis (Hotelling 1936; Vinod 1976), by one decomposition.

    Each direction is weighted by the root of its correlation, so that the product of two
    embeddings weighs it by the correlation.

    Args:
        images: features, shape ``(n, w)``.
        texts: of their captions, shape ``(n, v)``.
        weights: how much a pair counts, shape ``(n,)``.
        ridge: added to both covariances, relative to their mean eigenvalue.
    """
    sides, weights = [side.double() for side in (images, texts)], (weights / weights.sum()).double()
    means = [weights @ side for side in sides]
    centred = [(side - mean) * weights[:, None].sqrt() for side, mean in zip(sides, means, strict=True)]
    whitening = [_inverse_root(side.T @ side, ridge) for side in centred]
    cross = whitening[0] @ (centred[0].T @ centred[1]) @ whitening[1]
    left, correlation, right = torch.linalg.svd(cross, full_matrices=False)
    root = correlation[:_DIRECTIONS].clamp(0, 1).sqrt()
    directions = left[:, :_DIRECTIONS], right[:_DIRECTIONS].T
    heads = [white @ side * root for white, side in zip(whitening, directions, strict=True)]
    return CanonicalHeads((means[0], means[1]), (heads[0], heads[1]))


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)
    shrunk = (values + ridge * values.mean()).clamp_min(torch.finfo(values.dtype).tiny)
    root: Tensor = (vectors * shrunk.rsqrt()) @ vectors.T
    return root
