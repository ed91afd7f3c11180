"""The curvature of the heads between outer products of directions, in closed form.

What :mod:`head_point` does in all parameters, for many directions at once: an
embedding moves in the ``b`` output directions of its head only, so that inner
products of full width are computed once. With ``o`` the output directions of
the image head and ``C`` the cosines, ``p`` the coordinates of an image's step
over its length and ``q`` those of a caption's, and ``g`` and ``h`` how much of
their length they grow, ``S`` moves by ``scale (p (v o)^T + (u o') q^T - (g + h) C)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from fiftyone_ecif.influence.head_gradients import HeadProjection
from fiftyone_ecif.influence.heads import Batch, HeadScope


class _Side(NamedTuple):
    """One tower of a stack of batches."""

    inputs: Tensor  # (..., n, a): projected features over the length of the embedding
    along: Tensor  # (..., n, b): its unit embeddings in the directions that they move in
    across: Tensor  # (..., n, b of the other tower): and in those of the other tower


class _Move(NamedTuple):
    """What a direction does to one tower."""

    step: Tensor  # (m, ..., n, b): of the embeddings over their lengths, in coordinates
    grows: Tensor  # (m, ..., n)


class ProjectedPoint:
    """A stack of batches seen from one point of the heads, and moved in a few directions only.

    Args:
        scope: the heads.
        theta: their parameters, shape ``(p,)``.
        batch: the features, ``(..., n, w_image)`` and ``(..., n, w_text)``.
        projections: of the image head and of the text head; orthonormal columns.
    """

    def __init__(
        self, scope: HeadScope, theta: Tensor, batch: Batch, projections: tuple[HeadProjection, HeadProjection]
    ) -> None:
        self._scale = scope.scale(theta)
        self._with_scale = scope.with_scale
        outputs = [head.output for head in projections]
        self._shapes = [(head.input.shape[1], head.output.shape[1]) for head in projections]
        embeddings = scope.embed(theta, batch)
        lengths = [side.norm(dim=-1, keepdim=True) for side in embeddings]
        units = [side / length for side, length in zip(embeddings, lengths, strict=True)]
        self._sides = [
            _Side(features @ head.input / length, unit @ own, unit @ other)
            for features, head, length, unit, own, other in zip(
                scope.inputs(batch), projections, lengths, units, outputs, outputs[::-1], strict=True
            )
        ]
        overlap = outputs[0].T @ outputs[1]
        self._overlaps = [overlap, overlap.T]  # from the other tower's coordinates: @ overlap.T
        self._cosine = units[0] @ units[1].mT
        self._curvature = scope.loss_of(batch).curvature(scope.logits(theta, self._cosine))
        self._slopes = [self._curvature.slope, self._curvature.slope.mT]
        self._weighted = [slope * cosine for slope, cosine in zip(self._slopes, self._cosines, strict=True)]

    @property
    def _cosines(self) -> tuple[Tensor, Tensor]:
        return self._cosine, self._cosine.mT

    def hessian_products(self, coordinates: Tensor) -> Tensor:
        """The exact Hessian of the loss between the directions, times some coordinates, ``(m, r)`` to ``(m, r)``."""
        moves, log_scale, moved = self._move(coordinates)
        changed = self._curvature.product(moved)
        parts = []
        for side, change in enumerate((changed, changed.mT)):
            (of_own, of_other), slope = (self._sides[side], self._sides[1 - side]), self._slopes[side]
            own, other = moves[side], moves[1 - side]
            pull = self._scale * (slope @ of_other.across)  # at the unit embedding, in coordinates
            inward = self._scale * self._weighted[side].sum(-1)  # and along it
            turned = slope @ other.step
            more = turned @ self._overlaps[side].T - slope @ (other.grows[..., None] * of_other.across)
            more = self._scale * (change @ of_other.across + more)
            inward_more = self._scale * (
                vecdot(change, self._cosines[side])
                + vecdot(of_own.across, turned)
                - (self._weighted[side] @ other.grows[..., None])[..., 0]
            )
            if log_scale is not None:
                more, inward_more = more + log_scale[..., None] * pull, inward_more + log_scale * inward
            inward_more = inward_more + vecdot(own.step, pull) - own.grows * inward
            out = more - (own.step - of_own.along * own.grows[..., None]) * inward[..., None]
            out = out - of_own.along * inward_more[..., None]
            out = out - own.grows[..., None] * (pull - of_own.along * inward[..., None])
            parts.append(self._onto_heads(side, out))
        if log_scale is not None:
            slopes = changed * self._scale * self._cosine + self._curvature.slope * moved
            parts.append(self._sum(slopes.sum((-2, -1)))[:, None])
        return torch.cat(parts, dim=1)

    def gauss_newton_products(self, coordinates: Tensor) -> Tensor:
        """The Gauss-Newton matrix of the loss between the directions, likewise."""
        _, log_scale, moved = self._move(coordinates)
        changed = self._curvature.product(moved)
        parts = []
        for side, change in enumerate((changed, changed.mT)):
            of_own, of_other = self._sides[side], self._sides[1 - side]
            inward = vecdot(change, self._cosines[side])[..., None]
            parts.append(self._onto_heads(side, self._scale * (change @ of_other.across - of_own.along * inward)))
        if log_scale is not None:
            parts.append(self._sum((changed * self._scale * self._cosine).sum((-2, -1)))[:, None])
        return torch.cat(parts, dim=1)

    def _move(self, coordinates: Tensor) -> tuple[list[_Move], Tensor | None, Tensor]:
        """What directions do to both towers and to the logarithm of the scale, and by how much they change ``S``."""
        moves, start = [], 0
        for side, (a, b) in zip(self._sides, self._shapes, strict=True):
            matrices = coordinates[:, start : start + a * b].view(-1, *[1] * (side.inputs.dim() - 2), a, b)
            step = side.inputs @ matrices
            moves.append(_Move(step, vecdot(step, side.along)))
            start += a * b
        (image, caption), (of_image, of_caption) = moves, self._sides
        moved = image.step @ of_caption.across.mT + of_image.across @ caption.step.mT
        moved.addcmul_(image.grows[..., :, None] + caption.grows[..., None, :], self._cosine, value=-1)
        log_scale = None
        if self._with_scale:
            log_scale = coordinates[:, start].view(-1, *[1] * (self._cosine.dim() - 1))
            moved.addcmul_(log_scale[..., None], self._cosine)
        return moves, log_scale, self._scale * moved

    def _onto_heads(self, side: int, pull: Tensor) -> Tensor:
        """From unit embeddings, ``(m, ..., n, b)``, to the coordinates of their head, ``(m, a b)``."""
        return self._sum(self._sides[side].inputs.mT @ pull, keep=2).flatten(1)

    @staticmethod
    def _sum(parts: Tensor, keep: int = 0) -> Tensor:
        """Over the batches of a stack."""
        return parts.flatten(1, parts.dim() - 1 - keep).sum(1) if parts.dim() > 1 + keep else parts
