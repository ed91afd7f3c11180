"""The training objective over a fixed partition, its gradient and Hessian products.

    L(theta) = (1/N) sum_B L_B(theta) + (proximal/2) |theta - theta_0|^2

``L_B`` is the sum of the pair losses of batch ``B`` (see ``contrastive``), ``N``
the number of pairs. The regulariser pulls to the starting weights: with cosine
similarity the loss does not see the scale of the weights, so decay to zero has
no stationary point.

All vectors are flat parameter vectors of shape ``(p,)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp

from .contrastive import pair_losses


class Scope(Protocol):
    """The parameters that are attributed, and the similarity as a function of them.

    Attributes:
        start: the weights as loaded, a flat vector of shape ``(p,)``.
    """

    start: Tensor

    def similarity(self, theta: Tensor, batch: Any) -> Tensor:
        """``S`` of a batch under the parameters ``theta``, shape ``(n, n)``."""


def random_partition(pairs: int, batch_size: int, seed: int) -> list[Tensor]:
    """Splits pairs at random into batches whose sizes differ by at most one.

    Args:
        pairs: how many there are.
        batch_size: the largest size of a batch.
        seed: fixes the order.

    Returns:
        the row indices of each batch
    """
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(-(-pairs // batch_size)))


class ContrastiveLoss:
    """Mean pair loss over a sequence of batches, as a function of a scope's parameters.

    Args:
        scope: what varies.
        batches: what :meth:`Scope.similarity` takes, one entry a batch.
        pairs: the number of pairs in all batches.
        proximal (0.0): the strength of the pull to ``scope.start``.
    """

    def __init__(self, scope: Scope, batches: Sequence[Any], pairs: int, proximal: float = 0.0) -> None:
        self.scope = scope
        self.batches = batches
        self.pairs = pairs
        self.proximal = proximal

    def loss(self, theta: Tensor) -> Tensor:
        """The value, a scalar, in nats."""
        offset = theta - self.scope.start
        parts = [self._batch_mean(theta, batch) for batch in self.batches]
        return torch.stack(parts).sum() + self.proximal / 2 * offset.dot(offset)

    def gradient_and_value(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, shape ``(p,)``, and the value, a scalar."""
        offset = theta - self.scope.start
        gradient, value = self.proximal * offset, self.proximal / 2 * offset.dot(offset)
        for batch in self.batches:
            part, loss = grad_and_value(self._batch_mean)(theta, batch)
            gradient, value = gradient + part, value + loss
        return gradient, value

    def gradient_scale(self, theta: Tensor) -> Tensor:
        """The root mean square norm of a pair's loss gradient: the unit for the norm of the mean gradient.

        Estimated with random signs, at the cost of one gradient: the squared
        norm of ``sum_i sign_i grad l_i`` is on average the sum of the squared
        norms (Hutchinson's estimator).
        """
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros((), dtype=theta.dtype)
        for batch in self.batches:
            signs = 2.0 * torch.randint(2, (len(batch[0]),), generator=generator).to(theta) - 1
            total = total + grad(self._weighted_loss)(theta, batch, signs).square().sum()
        return (total / self.pairs).sqrt()

    def hessian_product(self, theta: Tensor, vector: Tensor) -> Tensor:
        """The exact Hessian at ``theta`` times ``vector``, forward over reverse, shape ``(p,)``."""
        product = self.proximal * vector
        for batch in self.batches:
            gradient = partial(grad(self._batch_mean), batch=batch)
            product = product + jvp(gradient, (theta,), (vector,))[1]
        return product

    def _batch_mean(self, theta: Tensor, batch: Any) -> Tensor:
        return pair_losses(self.scope.similarity(theta, batch)).sum() / self.pairs

    def _weighted_loss(self, theta: Tensor, batch: Any, weights: Tensor) -> Tensor:
        return pair_losses(self.scope.similarity(theta, batch)) @ weights
