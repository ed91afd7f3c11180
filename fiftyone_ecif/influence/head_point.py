"""The loss of the heads at one point and its derivatives, in closed form.

An image's features ``x`` become ``e = x A``, its unit embedding ``u = e / |e|``,
and the logits ``S = scale u v^T + bias``. With ``G`` the slope of the loss in
``S``, the image's embedding is pulled by ``m = scale G v``, and its head by
``x^T (m - u (u . m)) / |e|``; captions likewise with ``G^T u``. Products with the
Hessian differentiate that once more. Everything keeps leading dimensions, so a
stack of batches of one size, ``(b, n, w)``, is a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fiftyone_ecif.influence.losses import BatchLoss


class Heads(NamedTuple):
    """Both heads at a point, or a direction in their space.

    Attributes:
        image: shape ``(w_image, d)``.
        text: shape ``(w_text, d)``.
        log_scale: of the temperature, a scalar; None if that is held fixed.
    """

    image: Tensor
    text: Tensor
    log_scale: Tensor | None


class HeadPoint:
    """A batch of features, or a stack of batches, seen from one point of the heads.

    What is kept of the batch is what products need beside its features, which
    are given again with each.

    Args:
        loss: of a batch.
        embeddings: of images and captions before normalisation, ``(..., n, d)`` each.
        scale: ``exp(logit_scale)``.
        bias: ``logit_bias``.
    """

    def __init__(
        self, loss: BatchLoss, embeddings: tuple[Tensor, Tensor], scale: Tensor | float, bias: float = 0.0
    ) -> None:
        self._lengths = [side.norm(dim=-1, keepdim=True) for side in embeddings]
        self._units = [side / length for side, length in zip(embeddings, self._lengths, strict=True)]
        u, v = self._units
        self._loss, self._scale, self._bias = loss, scale, bias
        self._similarity = scale * (u @ v.mT) + bias
        self._curvature = loss.curvature(self._similarity)
        slope = self._curvature.slope
        self._pulls = [scale * (slope @ v), scale * (slope.mT @ u)]
        self._inward = [
            (unit * pull).sum(-1, keepdim=True) for unit, pull in zip(self._units, self._pulls, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        kept = [*self._units, *self._pulls, *[self._similarity] * 4]  # the slope and two softmaxes are as large
        return sum(each.nbytes for each in kept)

    @property
    def loss(self) -> Tensor:
        """Of the batch, or of the stack, a scalar."""
        return self._loss.pair_losses(self._similarity).sum()

    @property
    def _scaled(self) -> Tensor:
        """Cosines, scaled: the slope of the logits in the logarithm of the scale."""
        scaled: Tensor = self._similarity - self._bias
        return scaled

    def gradient(self, batch: tuple[Tensor, Tensor], with_scale: bool) -> Tensor:
        """The gradient of the loss, flat, shape ``(p,)``.

        Args:
            batch: the features, ``(..., n, w_image)`` and ``(..., n, w_text)``.
            with_scale: whether its last entry is that of the temperature.
        """
        pulled = [self._off(side, self._pulls[side] - self._units[side] * self._inward[side]) for side in (0, 1)]
        return _flat(batch, pulled, (self._curvature.slope * self._scaled).sum() if with_scale else None)

    def hessian_product(self, batch: tuple[Tensor, Tensor], direction: Heads) -> Tensor:
        """The exact Hessian of the loss times a direction, flat, shape ``(p,)``."""
        along, turned, moved = self._move(batch, direction)
        changed = self._curvature.product(moved)
        u, v = self._units
        slope = self._curvature.slope
        pulls = [
            self._scale * (changed @ v + slope @ turned[1]),
            self._scale * (changed.mT @ u + slope.mT @ turned[0]),
        ]
        pulled = []
        for side, (unit, turn) in enumerate(zip(self._units, turned, strict=True)):
            pull, inward, change = self._pulls[side], self._inward[side], pulls[side]
            if direction.log_scale is not None:
                change = change + direction.log_scale * pull
            inward_change = (turn * pull + unit * change).sum(-1, keepdim=True)
            shorter = along[side] * (pull - unit * inward)
            pulled.append(self._off(side, change - turn * inward - unit * inward_change - shorter))
        scale_part = None
        if direction.log_scale is not None:
            scale_part = (changed * self._scaled + slope * moved).sum()
        return _flat(batch, pulled, scale_part)

    def gauss_newton_product(self, batch: tuple[Tensor, Tensor], direction: Heads) -> Tensor:
        """The Gauss-Newton matrix of the loss times a direction, flat, shape ``(p,)``."""
        changed = self._curvature.product(self._move(batch, direction)[2])
        u, v = self._units
        pulls = [self._scale * (changed @ v), self._scale * (changed.mT @ u)]
        pulled = [
            self._off(side, pull - unit * (unit * pull).sum(-1, keepdim=True))
            for side, (unit, pull) in enumerate(zip(self._units, pulls, strict=True))
        ]
        return _flat(batch, pulled, None if direction.log_scale is None else (changed * self._scaled).sum())

    def _move(self, batch: tuple[Tensor, Tensor], direction: Heads) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """By how much of their length embeddings grow, how they turn, and how ``S`` changes."""
        along, turned = [], []
        for features, head, unit, length in zip(batch, direction[:2], self._units, self._lengths, strict=True):
            step = (features @ head).div_(length)
            grows = (unit * step).sum(-1, keepdim=True)
            along.append(grows)
            turned.append(step - unit * grows)
        u, v = self._units
        moved = self._scale * (turned[0] @ v.mT + u @ turned[1].mT)
        if direction.log_scale is not None:
            moved = moved + direction.log_scale * self._scaled
        return along, turned, moved

    def _off(self, side: int, pull: Tensor) -> Tensor:
        off: Tensor = pull / self._lengths[side]
        return off


def _flat(batch: tuple[Tensor, Tensor], pulled: list[Tensor], scale_part: Tensor | None) -> Tensor:
    parts = [
        (features.flatten(0, -2).T @ pull.flatten(0, -2)).flatten()
        for features, pull in zip(batch, pulled, strict=True)
    ]
    return torch.cat(parts if scale_part is None else [*parts, scale_part[None]])
