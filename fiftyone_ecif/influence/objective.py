"""The training objective over a fixed partition, its gradient and Hessian products.

    L(theta) = (1/N) sum_B L_B(theta) + (proximal/2) |theta - theta_0|^2

``L_B`` is the sum of the pair losses of batch ``B`` (see ``contrastive``), ``N``
the number of pairs. The regulariser pulls to the starting weights: with cosine
similarity the loss does not see the scale of the weights, so decay to zero has
no stationary point.

All vectors are flat parameter vectors of shape ``(p,)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope, HeadSum
from fiftyone_ecif.influence.scope import Scope

_TYPICAL = 8192  # pairs whose gradients tell how large one is


class Batches(Protocol):
    """Pairs in batches, as :meth:`Scope.similarity` takes them.

    Attributes:
        partition: the row indices of each batch.
    """

    partition: Sequence[Tensor]

    def regrouped(self, partition: Sequence[Tensor]) -> Batches:
        """The same pairs in other batches."""

    def stacks(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of batches, those that are given as one together."""

    def rows(self, stack: Sequence[int]) -> Tensor:
        """The row indices of a stack of batches, shape ``(n,)``, or ``(b, n)`` where these come in stacks."""

    def each(self, stacks: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Each stack, as :meth:`Scope.similarity` takes it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class OneByOne(Sequence[Any]):
    """Batches that are given one at a time, without a dimension before the others.

    Attributes:
        partition: the row indices of each batch.
    """

    partition: Sequence[Tensor]

    def stacks(self, numbers: Sequence[int]) -> list[list[int]]:
        """Each batch on its own."""
        return [[number] for number in numbers]

    def rows(self, stack: Sequence[int]) -> Tensor:
        """The row indices of the batch in a stack, shape ``(n,)``."""
        return self.partition[stack[0]]

    def each(self, stacks: Sequence[Sequence[int]]) -> Iterator[Any]:
        """The batch of each stack."""
        return (self[number] for (number,) in stacks)

    def __len__(self) -> int:
        return len(self.partition)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


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


def partition_without(partition: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The batches that are left when some rows are taken out; each pair stays where it was."""
    left = [batch[~torch.isin(batch, rows)] for batch in partition]
    return [batch for batch in left if len(batch)]


class ContrastiveLoss:
    """Mean pair loss over a sequence of batches, as a function of a scope's parameters.

    Args:
        scope: what varies.
        batches: the pairs.
        pairs: what the sum of the pair losses is divided by.
        proximal (0.0): the strength of the pull to ``scope.start``.
        processes (ALONE): the processes that share the batches; all must then call
            the same methods, and all get the same results.
    """

    def __init__(
        self, scope: Scope, batches: Batches, pairs: int, proximal: float = 0.0, processes: ProcessGroup = ALONE
    ) -> None:
        self.scope = scope
        self.batches = batches
        self.pairs = pairs
        self.proximal = proximal
        self.processes = processes

    def without(self, rows: Tensor) -> ContrastiveLoss:
        """The objective as if some pairs had never been in it; the others keep their batch and their weight."""
        left = self.batches.regrouped(partition_without(self.batches.partition, rows))
        return ContrastiveLoss(self.scope, left, self.pairs, self.proximal, self.processes)

    def coarse(self) -> ContrastiveLoss:
        """The same on features in the precision of steps (:attr:`Placement.coarse`); totals keep that of ``theta``."""
        if not self.is_coarse:
            assert isinstance(self.batches, FeatureBatches)
            return ContrastiveLoss(self.scope, self.batches.coarse(), self.pairs, self.proximal, self.processes)
        return self

    @property
    def is_coarse(self) -> bool:
        """Whether there is no coarser form."""
        if not (isinstance(self.scope, HeadScope) and isinstance(self.batches, FeatureBatches)):
            return True
        return self.batches.placement == self.batches.placement.coarse

    def sample(self, pairs: int = 512, processes: ProcessGroup = ALONE) -> ContrastiveLoss:
        """The objective on its first batches only: enough for directions and the curvature between them.

        Args:
            pairs (512): at most, unless the first batch alone has more.
            processes (ALONE): those that share these batches.
        """
        count, chosen = 0, list[Tensor]()
        for rows in self.batches.partition:
            if not chosen or count + len(rows) <= pairs:
                chosen, count = [*chosen, rows], count + len(rows)
        return ContrastiveLoss(self.scope, self.batches.regrouped(chosen), count, self.proximal, processes)

    def loss(self, theta: Tensor) -> Tensor:
        """The value, a scalar, in nats."""
        value, offset = theta.new_zeros(()), theta - self.scope.start
        with torch.no_grad():
            for batch in self.own_stacks():
                value = value + self._batch_mean(self.placed(theta), batch)
        return self.processes.total(value) + self.proximal / 2 * offset.dot(offset)

    def gradient_and_value(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, shape ``(p,)``, and the value, a scalar."""
        offset = theta - self.scope.start
        gradient, value = torch.zeros_like(theta), theta.new_zeros(())
        if isinstance(self.scope, HeadScope):
            pulled = HeadSum(self.scope, theta)
            for batch in self.own_stacks():
                at = self.scope.point(self.placed(theta), batch)
                pulled.add(batch, at.gradient(self.scope.with_scale))
                value = value + at.loss / self.pairs
            gradient = pulled.total() / self.pairs
        else:
            for batch in self.own_stacks():
                part, loss = grad_and_value(self._batch_mean)(theta, batch)
                gradient, value = gradient + part, value + loss
        gradient, value = self.processes.total(gradient), self.processes.total(value)
        return gradient + self.proximal * offset, value + self.proximal / 2 * offset.dot(offset)

    def random_gradients(self, theta: Tensor, count: int, seed: int = 0) -> Iterator[Tensor]:
        """Sums of the pair gradients with random signs, each of shape ``(p,)``, at the cost of a gradient.

        Without the pull to the start. Together they span the directions in
        which the pairs' gradients vary most.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            total = torch.zeros_like(theta)
            signs = [self._signs(rows, generator).to(theta) for rows in self.batches.partition]
            for index in self._shared():
                total = total + grad(self._weighted_loss)(theta, self.batches[index], signs[index])
            yield self.processes.total(total)

    def gradient_scale(self, theta: Tensor) -> Tensor:
        """The root mean square norm of a pair's loss gradient: the unit for the norm of the mean gradient.

        Estimated from the first pairs, batch by batch with random signs, at the
        cost of their gradient: the squared norm of ``sum_i sign_i grad l_i`` is on
        average the sum of the squared norms (Hutchinson's estimator).
        """
        some = self.sample(_TYPICAL, self.processes)
        total, theta = theta.new_zeros(()), self.placed(theta)
        signs = {
            n: self._signs(some.batches.partition[n], torch.Generator().manual_seed(n)).to(theta)
            for n in some._shared()
        }
        if isinstance(self.scope, HeadScope):
            for stack, batch in zip(some.stacks(), some.own_stacks(), strict=True):
                weights = torch.stack([signs[n] for n in stack])
                pull = self.scope.point(theta, batch).weighted_gradient(weights, self.scope.with_scale)
                total = total + self.scope.squared(batch, pull)
        else:
            for n, weights in signs.items():
                total = total + grad(self._weighted_loss)(theta, some.batches[n], weights).square().sum()
        return (self.processes.total(total) / some.pairs).sqrt()

    def hessian_product(self, theta: Tensor, vector: Tensor) -> Tensor:
        """The exact Hessian at ``theta`` times ``vector``, forward over reverse, shape ``(p,)``."""
        product = torch.zeros_like(vector)
        for batch in self.own_stacks():
            gradient = partial(grad(self._batch_mean), batch=batch)
            product = product + jvp(gradient, (theta,), (vector,))[1]
        return self.processes.total(product) + self.proximal * vector

    def gauss_newton_product(self, theta: Tensor, vector: Tensor) -> Tensor:
        """The generalised Gauss-Newton matrix times ``vector``, shape ``(p,)``.

        ``J^T H_S J`` with ``J`` the Jacobian of a batch's similarity matrix and
        ``H_S`` the Hessian of its loss with respect to that: never negative.
        """
        product = torch.zeros_like(vector)
        for batch in self.own_stacks():
            similarity = partial(self.scope.similarity, batch=batch)
            value, direction = jvp(similarity, (theta,), (vector,))[:2]
            curved = jvp(grad(partial(self.batch_loss, batch=batch)), (value,), (direction,))[1]
            product = product + vjp(similarity, theta)[1](curved)[0]
        return self.processes.total(product) + self.proximal * vector

    def batch_loss(self, similarity: Tensor, batch: Any) -> Tensor:
        """What a batch adds to the value, as a function of its similarity matrix, a scalar."""
        return self.scope.loss_of(batch).pair_losses(similarity).sum() / self.pairs

    def stacks(self) -> list[list[int]]:
        """The numbers of the batches that this process takes, by the stack that they are given in."""
        return self.batches.stacks(self._shared())

    def own_stacks(self) -> Iterator[Any]:
        """The batches that this process takes, in stacks."""
        return self.batches.each(self.stacks())

    def placed(self, theta: Tensor) -> Tensor:
        """A vector in the precision of the features."""
        return theta.to(self.batches.placement.dtype) if isinstance(self.batches, FeatureBatches) else theta

    def _shared(self) -> Sequence[int]:
        """The numbers of the batches that this process takes."""
        return self.processes.share(range(len(self.batches)))

    @staticmethod
    def _signs(rows: Tensor, generator: torch.Generator) -> Tensor:
        return 2 * torch.randint(2, (len(rows),), generator=generator) - 1

    def _batch_mean(self, theta: Tensor, batch: Any) -> Tensor:
        return self.batch_loss(self.scope.similarity(theta, batch), batch)

    def _weighted_loss(self, theta: Tensor, batch: Any, weights: Tensor) -> Tensor:
        losses = self.scope.loss_of(batch).pair_losses(self.scope.similarity(theta, batch))
        return (losses * weights).sum()
