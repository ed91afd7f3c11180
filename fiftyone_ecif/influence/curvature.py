"""Products with the curvature of the objective at one point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.influence.head_point import HeadPoint, Heads, Pull
from fiftyone_ecif.influence.heads import HeadScope, HeadSum
from fiftyone_ecif.influence.objective import ContrastiveLoss

Product = Callable[[Tensor], Tensor]


class CoarseProduct(NamedTuple):
    """Products with nearly the same matrix, which are cheaper.

    Attributes:
        product: maps ``v`` to nearly ``H v``.
        error: maps ``v`` to about how far off that is, ``|H v - product(v)|``, rather more than less; None if only
            an exact product tells.
    """

    product: Product
    error: Callable[[Tensor], Tensor] | None = None


def hessian_at(objective: ContrastiveLoss, theta: Tensor) -> Product:
    """Products with the exact Hessian at one point, for as many vectors as a solve needs.

    The same as :meth:`ContrastiveLoss.hessian_product`, faster: in closed form
    for the heads, else a pass back through the graph of a gradient. What the
    first batches need for that is kept, as far as there is room; that of the
    others is made anew for each product.

    Args:
        objective: what the curvature is of.
        theta: where, shape ``(p,)``.
    """
    return _sum_over_batches(objective, theta, HeadPoint.hessian_product, _hessian_graph)


def gauss_newton_at(objective: ContrastiveLoss, theta: Tensor) -> Product:
    """Products with the Gauss-Newton matrix at one point, as :meth:`ContrastiveLoss.gauss_newton_product`.

    Args:
        objective: what the curvature is of.
        theta: where, shape ``(p,)``.
    """
    return _sum_over_batches(objective, theta, HeadPoint.gauss_newton_product, _gauss_newton_graph)


_Part = Callable[[Tensor, bool], Tensor]  # a batch's: of a vector, and whether it will be asked again


def _sum_over_batches(
    objective: ContrastiveLoss,
    theta: Tensor,
    closed: Callable[[HeadPoint, Any, Heads], Pull],
    graph: Callable[[ContrastiveLoss, Tensor, Any], _Part],
) -> Product:
    """What the batches and the pull to the start add up to."""
    if isinstance(objective.scope, HeadScope):
        return _ClosedForms(objective, objective.scope, theta, closed)
    return _Graphs(objective, theta.detach().clone().requires_grad_(), graph)


class _ClosedForms:
    """Products of the heads: what a stack of batches needs beside its features is kept, as far as there is room.

    Not of an objective that has a coarse form: its products only check what those of the other lead to.
    """

    def __init__(
        self,
        objective: ContrastiveLoss,
        scope: HeadScope,
        theta: Tensor,
        product: Callable[[HeadPoint, Any, Heads], Pull],
    ) -> None:
        self._objective, self._scope, self._product = objective, scope, product
        self._theta = objective.placed(theta)
        self._stacks = objective.stacks()
        self._kept: list[HeadPoint] = []
        self._room = Placement(str(theta.device)).room if objective.is_coarse else 0

    def __call__(self, vector: Tensor) -> Tensor:
        total, direction = HeadSum(self._scope, vector), self._scope.at(self._objective.placed(vector))
        for number, batch in enumerate(self._objective.batches.each(self._stacks)):
            if number < len(self._kept):
                point = self._kept[number]
            else:
                point = self._scope.point(self._theta, batch)
                if point.nbytes <= self._room and number == len(self._kept):
                    self._kept.append(point)
                    self._room -= point.nbytes
            total.add(batch, self._product(point, self._scope.inputs(batch), direction))
        product = self._objective.processes.total(total.total()) / self._objective.pairs
        return product + self._objective.proximal * vector


class _Graphs:
    """Products through the graphs of the batches, those of the first ones kept."""

    def __init__(
        self,
        objective: ContrastiveLoss,
        point: Tensor,
        part_of: Callable[[ContrastiveLoss, Tensor, Any], _Part],
    ) -> None:
        self._objective, self._point, self._part_of = objective, point, part_of
        self._stacks = objective.stacks()
        self._kept: list[_Part] = []
        held, room = _HeldBytes(), Placement(str(point.device)).room
        for batch in objective.batches.each(self._stacks):
            with torch.autograd.graph.saved_tensors_hooks(held.add, lambda tensor: tensor):
                part = part_of(objective, point, batch)
            if held.total > room:
                break
            self._kept.append(part)

    def __call__(self, vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for part in self._kept:
            total = total + part(vector, True)
        for batch in self._objective.batches.each(self._stacks[len(self._kept) :]):
            total = total + self._part_of(self._objective, self._point, batch)(vector, False)
        return self._objective.processes.total(total) + self._objective.proximal * vector


def _hessian_graph(objective: ContrastiveLoss, point: Tensor, batch: Any) -> _Part:
    gradient = _gradient(objective.batch_loss(objective.scope.similarity(point, batch), batch), point)
    return lambda vector, keeps: _pull(gradient, point, vector, keeps)


def _gauss_newton_graph(objective: ContrastiveLoss, point: Tensor, batch: Any) -> _Part:
    similarity = objective.scope.similarity(point, batch)
    values = similarity.detach().clone().requires_grad_()
    slope = _gradient(objective.batch_loss(values, batch), values)
    rows = torch.zeros_like(values).requires_grad_()
    pulled = _gradient(similarity, point, rows)  # linear in the rows: pulled back, it pushes forward

    def part(vector: Tensor, keeps: bool) -> Tensor:
        pushed = _pull(pulled, rows, vector, retain=True)
        return _pull(similarity, point, _pull(slope, values, pushed, keeps), keeps)

    return part


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
