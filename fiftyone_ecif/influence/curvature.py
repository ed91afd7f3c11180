"""Products with the curvature of the objective at one point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fiftyone_ecif.influence.objective import ContrastiveLoss

_KEPT_BYTES = 2**28  # that the graphs of an objective may hold

Product = Callable[[Tensor], Tensor]
_Part = Callable[[Tensor, bool], Tensor]  # a batch's: of a vector, and whether it will be asked again


def hessian_at(objective: ContrastiveLoss, theta: Tensor) -> Product:
    """Products with the exact Hessian at one point, for as many vectors as a solve needs.

    The same as :meth:`ContrastiveLoss.hessian_product`, two to three times as
    fast: a product is a pass back through the graph of a gradient. The graphs
    of the first batches are kept, as many as fit into 256 MiB; those of the
    others are made anew for each product.

    Args:
        objective: what the curvature is of.
        theta: where, shape ``(p,)``.
    """
    point = theta.detach().clone().requires_grad_()

    def part_of(batch: Any) -> _Part:
        gradient = _gradient(_mean_loss(objective, objective.scope.similarity(point, batch)), point)
        return lambda vector, keeps: _pull(gradient, point, vector, keeps)

    return _sum_over_batches(objective, part_of)


def gauss_newton_at(objective: ContrastiveLoss, theta: Tensor) -> Product:
    """Products with the Gauss-Newton matrix at one point, as :meth:`ContrastiveLoss.gauss_newton_product`.

    Args:
        objective: what the curvature is of.
        theta: where, shape ``(p,)``.
    """
    point = theta.detach().clone().requires_grad_()

    def part_of(batch: Any) -> _Part:
        similarity = objective.scope.similarity(point, batch)
        values = similarity.detach().clone().requires_grad_()
        slope = _gradient(_mean_loss(objective, values), values)
        rows = torch.zeros_like(values).requires_grad_()
        pulled = _gradient(similarity, point, rows)  # linear in the rows: pulled back, it pushes forward

        def part(vector: Tensor, keeps: bool) -> Tensor:
            pushed = _pull(pulled, rows, vector, retain=True)
            return _pull(similarity, point, _pull(slope, values, pushed, keeps), keeps)

        return part

    return _sum_over_batches(objective, part_of)


def _sum_over_batches(objective: ContrastiveLoss, part_of: Callable[[Any], _Part]) -> Product:
    """What the batches and the pull to the start add up to."""
    kept, held = [], _HeldBytes()
    for batch in objective.own_batches():
        with torch.autograd.graph.saved_tensors_hooks(held.add, lambda tensor: tensor):
            part = part_of(batch)
        if held.total > _KEPT_BYTES:
            break
        kept.append(part)

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for part in kept:
            total = total + part(vector, True)
        for batch in objective.own_batches(len(kept)):
            total = total + part_of(batch)(vector, False)
        return objective.processes.total(total) + objective.proximal * vector

    return product


def _mean_loss(objective: ContrastiveLoss, similarity: Tensor) -> Tensor:
    """What a batch adds to the objective, a scalar."""
    return objective.scope.loss.pair_losses(similarity).sum() / objective.pairs


def _gradient(output: Tensor, point: Tensor, rows: Tensor | None = None) -> Tensor:
    """The gradient, with its graph."""
    return torch.autograd.grad(output, point, rows, create_graph=True)[0]


def _pull(output: Tensor, point: Tensor, rows: Tensor, retain: bool) -> Tensor:
    return torch.autograd.grad(output, point, rows, retain_graph=retain)[0]


class _HeldBytes:
    """What graphs hold on to, each piece of memory once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.total = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor.detach()  # the tensor itself would be a cycle, never freed: saved outputs hold their graph
