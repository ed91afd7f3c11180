"""The loss of the heads at one point and its derivatives, in closed form.

An image's features ``x`` become ``e = x A``, its unit embedding ``u = e / |e|``,
and the logits ``S = scale u v^T + bias``. With ``G`` the slope of the loss in
``S``, the image's embedding is pulled by ``m = scale G v``, and its head by
``x^T (m - u (u . m)) / |e|``; captions likewise with ``G^T u``. Products with the
Hessian differentiate that once more. Everything keeps leading dimensions, so a
stack of batches of one size, ``(b, n, w)``, is a batch.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from fiftyone_ecif.influence.losses import BatchLoss, LossCurvature


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


class Pull(NamedTuple):
    """How a batch pulls at its embeddings before normalisation, and at the temperature.

    Attributes:
        image: shape ``(..., n, d)``.
        text: likewise.
        log_scale: shape ``(...)``; None if the temperature is held fixed.
    """

    image: Tensor
    text: Tensor
    log_scale: Tensor | None


class HeadPoint:
    """A batch of features, or a stack of batches, seen from one point of the heads.

    What is kept of the batch is what products need beside its features, which
    are given again with each. What is found is how the batch pulls at its
    embeddings: :meth:`HeadSum.add` takes that on to the heads.

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
        self._similarity = (u @ v.mT).mul_(scale).add_(bias)

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        kept = [*self._units, *self._pulls, *[self._similarity] * 4]  # the slope and two softmaxes are as large
        return sum(each.nbytes for each in kept)

    @cached_property
    def _curvature(self) -> LossCurvature:
        return self._loss.curvature(self._similarity)

    @cached_property
    def _pulls(self) -> list[Tensor]:
        """At the unit embeddings."""
        return self._to_units(self._curvature.slope)

    @cached_property
    def _inward(self) -> list[Tensor]:
        """Their parts along those."""
        return [vecdot(unit, pull)[..., None] for unit, pull in zip(self._units, self._pulls, strict=True)]

    @property
    def loss(self) -> Tensor:
        """Of the batch, or of the stack, a scalar."""
        return self._loss.pair_losses(self._similarity).sum()

    @property
    def _scaled(self) -> Tensor:
        """Cosines, scaled: the slope of the logits in the logarithm of the scale."""
        scaled: Tensor = self._similarity - self._bias if self._bias else self._similarity
        return scaled

    def gradient(self, with_scale: bool) -> Pull:
        """The gradient of the loss.

        Args:
            with_scale: whether the temperature is pulled at.
        """
        return self._pull(self._curvature.slope, self._pulls, with_scale)

    def weighted_gradient(self, weights: Tensor, with_scale: bool) -> Pull:
        """The gradient of the sum of the pair losses, each times its weight, shape ``(..., n)``."""
        slope = self._loss.slope(self._similarity, weights)
        return self._pull(slope, self._to_units(slope), with_scale)

    def hessian_product(self, batch: tuple[Tensor, Tensor], direction: Heads) -> Pull:
        """The exact Hessian of the loss times a direction.

        Args:
            batch: the features, ``(..., n, w_image)`` and ``(..., n, w_text)``.
            direction: of the heads.
        """
        steps, grows, moved = self._move(batch, direction)
        changed = self._curvature.product(moved)
        slopes, changes = (self._curvature.slope, self._curvature.slope.mT), (changed, changed.mT)
        turned = [
            torch.addcmul(step, unit, more, value=-1)
            for step, unit, more in zip(steps, self._units, grows, strict=True)
        ]
        pulled = []
        for side, (unit, step, more) in enumerate(zip(self._units, steps, grows, strict=True)):
            pull, inward = self._pulls[side], self._inward[side]
            change = changes[side] @ self._units[1 - side]
            change.add_(slopes[side] @ turned[1 - side]).mul_(self._scale)
            if direction.log_scale is not None:
                change.addcmul_(pull, direction.log_scale)
            inward_change = (vecdot(step, pull) + vecdot(unit, change))[..., None] - more * inward
            # what is off the unit embedding, which turned and grew
            change.addcmul_(step, inward, value=-1).addcmul_(pull, more, value=-1)
            change.addcmul_(unit, 2 * more * inward - inward_change)
            pulled.append(change.div_(self._lengths[side]))
        scale_part = None
        if direction.log_scale is not None:
            scale_part = (changed * self._scaled + self._curvature.slope * moved).sum((-2, -1))
        return Pull(pulled[0], pulled[1], scale_part)

    def gauss_newton_product(self, batch: tuple[Tensor, Tensor], direction: Heads) -> Pull:
        """The Gauss-Newton matrix of the loss times a direction, likewise."""
        changed = self._curvature.product(self._move(batch, direction)[2])
        return self._pull(changed, self._to_units(changed), direction.log_scale is not None)

    def _to_units(self, slope: Tensor) -> list[Tensor]:
        """How a slope in ``S`` pulls at the unit embeddings of both sides."""
        u, v = self._units
        return [(slope @ v).mul_(self._scale), (slope.mT @ u).mul_(self._scale)]

    def _pull(self, slope: Tensor, pulls: list[Tensor], with_scale: bool) -> Pull:
        """What a slope in ``S`` does, given its pulls at the unit embeddings: the parts along those do nothing."""
        image, text = (
            torch.addcmul(pull, unit, vecdot(unit, pull)[..., None], value=-1).div_(length)
            for unit, pull, length in zip(self._units, pulls, self._lengths, strict=True)
        )
        return Pull(image, text, (slope * self._scaled).sum((-2, -1)) if with_scale else None)

    def _move(self, batch: tuple[Tensor, Tensor], direction: Heads) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """How embeddings step over their lengths, how much of those they grow by, and how ``S`` changes."""
        steps, grows = [], []
        for features, head, unit, length in zip(batch, direction[:2], self._units, self._lengths, strict=True):
            steps.append((features @ head).div_(length))
            grows.append(vecdot(unit, steps[-1])[..., None])
        u, v = self._units
        moved = steps[0] @ v.mT
        moved.add_(u @ steps[1].mT).mul_(self._scale)
        moved.addcmul_(grows[0] + grows[1].mT, self._scaled, value=-1)
        if direction.log_scale is not None:
            moved.addcmul_(direction.log_scale, self._scaled)
        return steps, grows, moved
