"""Removal gradients of every pair, projected.

A gradient has as many entries as the scope has parameters, so each pair's is
kept as its coordinates in a subspace of orthonormal directions:

* heads: the derivative of a role with respect to ``S`` is known
  (``losses``), the step from ``S`` through the normalisation to a head is an
  outer product with the cached features, so the gradients of all pairs of a
  batch are matrix products. They are kept as ``input.T @ gradient @ output`` for
  each head: LoGra's Kronecker projection (arXiv 2405.13954), applied to the
  removal gradient.
* any scope: each embedding is back-propagated along the few directions in which
  removals pull it (see ``tower_gradients``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import normalize
from typing_extensions import override

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.influence.curvature import Product, gauss_newton_at, hessian_at
from fiftyone_ecif.influence.head_gradients import HeadProjection, removal_gradients
from fiftyone_ecif.influence.heads import Batch, HeadScope, head_inputs, head_outputs
from fiftyone_ecif.influence.objective import Batches, ContrastiveLoss
from fiftyone_ecif.influence.projected_point import ProjectedPoint
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.tower_gradients import TOLERANCE, tower_gradients

_PRODUCTS = 8  # vectors at a time; of matrices of a batch, which then stay in the processor's cache
_ENTRIES = 2**19  # of those matrices at a time, where a batch is small enough for more than that many
_DIRECTIONS = 128  # of a basis, at most
_VARIED = 2**14  # pairs that tell in which directions of the heads all vary most


class Projection(ABC):
    """Orthonormal directions in the space of a scope's parameters.

    Attributes:
        kind: what scopes name it by.
        suits_target: whether the directions are chosen for the target, and so change with it.
    """

    kind: str
    suits_target: bool

    @classmethod
    @abstractmethod
    def choose(cls, objective: ContrastiveLoss, theta: Tensor, targets: Sequence[Batches]) -> Projection:
        """Directions in which the gradients of an objective are worth keeping.

        Args:
            objective: over the training pairs, in a scope of this kind.
            theta: where, shape ``(p,)``.
            targets: the pairs of each target.
        """

    @classmethod
    @abstractmethod
    def from_state(cls, scope: Scope, state: Mapping[str, Tensor]) -> Projection:
        """The projection that :meth:`state` was taken from."""

    @abstractmethod
    def project(self, vectors: Tensor) -> Tensor:
        """Coordinates of flat vectors, ``(..., p)`` to ``(..., r)``."""

    @abstractmethod
    def lift(self, coordinates: Tensor) -> Tensor:
        """The flat vector with these coordinates, ``(r,)`` to ``(p,)``."""

    @abstractmethod
    def removal_gradients(
        self,
        theta: Tensor,
        batch: Any,
        role: str = "exact",
        tolerance: float = TOLERANCE,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Projected gradients of both roles of every pair of a batch, each of shape ``(n, r)``.

        Args:
            theta: where, shape ``(p,)``.
            batch: what the scope embeds.
            role ("exact"): one of ``roles.ROLES``.
            tolerance (0.01): see :func:`tower_gradients`; in closed form there is no error.
            embeddings (None): of the batch before normalisation, ``(n, d)`` each, which the closed form need not
                compute if they are known.
        """

    def coarse(self) -> Projection:
        """The same for gradients that are kept in float32."""
        return self

    @abstractmethod
    def jacobian(self, function: Callable[[Scope, Tensor], Tensor], theta: Tensor) -> Tensor:
        """Projected gradients of the entries of ``function(scope, theta)``, ``(n,)`` to ``(n, r)``.

        Args:
            function: takes a scope that embeds as that of the projection does, and its parameters.
            theta: where, shape ``(p,)``.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Named arrays from which it can be made again."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """``r``."""

    def curvature(self, product: Product, theta: Tensor) -> Tensor:
        """A curvature restricted to the subspace, shape ``(r, r)``, at the cost of ``r`` products."""
        matrix = torch.stack([self.project(product(self.lift(row))) for row in torch.eye(self.rank).to(theta)])
        return (matrix + matrix.T) / 2

    def hessian(self, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        """The Hessian of an objective at ``theta``, restricted to the subspace, shape ``(r, r)``."""
        return self.curvature(hessian_at(objective, theta), theta)

    def gauss_newton(self, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        """Its Gauss-Newton matrix, likewise."""
        return self.curvature(gauss_newton_at(objective, theta), theta)


class BasisProjection(Projection):
    """Any directions, of any scope.

    Args:
        scope: the scope.
        basis: orthonormal columns, shape ``(p, r)``.
    """

    kind = "basis"
    suits_target = True

    @classmethod
    def choose(cls, objective: ContrastiveLoss, theta: Tensor, targets: Sequence[Batches]) -> BasisProjection:
        """One half suits the training pairs, the other the targets."""
        half = _DIRECTIONS // 2
        sources = [(objective.sample(), half)]
        for batches in targets:
            source = ContrastiveLoss(objective.scope, batches, objective.pairs).sample()
            sources.append((source, max(half // len(targets), 1)))
        return cls(objective.scope, gradient_basis(theta, sources))

    @override
    @classmethod
    def from_state(cls, scope: Scope, state: Mapping[str, Tensor]) -> BasisProjection:
        return cls(scope, state["basis"].to(scope.start))

    def __init__(self, scope: Scope, basis: Tensor) -> None:
        self.scope, self.basis = scope, basis

    @override
    def project(self, vectors: Tensor) -> Tensor:
        return vectors @ self.basis

    @override
    def lift(self, coordinates: Tensor) -> Tensor:
        lifted: Tensor = self.basis @ coordinates
        return lifted

    @override
    def removal_gradients(
        self,
        theta: Tensor,
        batch: Any,
        role: str = "exact",
        tolerance: float = TOLERANCE,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return tower_gradients(self.scope, theta, batch, role, self.basis, tolerance)[0]

    @override
    def jacobian(self, function: Callable[[Scope, Tensor], Tensor], theta: Tensor) -> Tensor:
        at = partial(function, self.scope)
        columns = [jvp(at, (theta,), (direction.contiguous(),))[1] for direction in self.basis.T]
        return torch.stack(columns, dim=1)

    @override
    def state(self) -> dict[str, Tensor]:
        return {"basis": self.basis}

    @override
    @property
    def rank(self) -> int:
        return self.basis.shape[1]


def gradient_basis(theta: Tensor, sources: Sequence[tuple[ContrastiveLoss, int]]) -> Tensor:
    """Directions in which pair gradients vary most, by random sums of them.

    A randomised range finder (Halko, Martinsson and Tropp 2011): gradients summed
    with random signs span the leading directions of their covariance.

    Args:
        theta: the parameters, shape ``(p,)``.
        sources: pairs, and how many directions to draw from them.

    Returns:
        orthonormal columns, shape ``(p, r)``
    """
    drawn = [
        gradient
        for objective, count in sources
        for gradient in objective.random_gradients(theta, min(count, len(theta)), seed=count)
    ]
    basis: Tensor = torch.linalg.qr(torch.stack(drawn, dim=1)).Q
    return basis


class KroneckerProjection(Projection):
    """Directions of the heads that are outer products, in closed form.

    Args:
        scope: the head scope; its temperature, if it is attributed, is the last
            coordinate.
        image: of the image head, orthonormal columns.
        text: of the text head.
    """

    kind = "kronecker"
    suits_target = False

    @classmethod
    def choose(cls, objective: ContrastiveLoss, theta: Tensor, targets: Sequence[Batches]) -> KroneckerProjection:
        """Those in which the training pairs vary most, whatever the targets."""
        objective = objective.sample(_VARIED, objective.processes).coarse()
        scope, own = cast(HeadScope, objective.scope), objective.own_stacks()
        return principal_projection(scope, objective.placed(theta), own, processes=objective.processes)

    @override
    @classmethod
    def from_state(cls, scope: Scope, state: Mapping[str, Tensor]) -> KroneckerProjection:
        image, text = (
            HeadProjection(*(state[f"{head}-{side}"].to(scope.start) for side in ("input", "output")))
            for head in ("image", "text")
        )
        return cls(cast(HeadScope, scope), image, text)

    def __init__(self, scope: HeadScope, image: HeadProjection, text: HeadProjection) -> None:
        self.scope, self.heads = scope, (image, text)

    @override
    @property
    def rank(self) -> int:
        return sum(head.input.shape[1] * head.output.shape[1] for head in self.heads) + self.scope.with_scale

    @override
    def project(self, vectors: Tensor) -> Tensor:
        flat = vectors.reshape(-1, vectors.shape[-1])
        blocks, start = [], 0
        for head, shape in zip(self.heads, self.scope.shapes, strict=True):
            matrices = flat[:, start : start + shape.numel()].reshape(-1, *shape)
            blocks.append((head.input.T @ matrices @ head.output).flatten(1))
            start += shape.numel()
        return torch.cat([*blocks, flat[:, start:]], dim=1).view(*vectors.shape[:-1], -1)

    @override
    def lift(self, coordinates: Tensor) -> Tensor:
        blocks, start = [], 0
        for head in self.heads:
            a, b = head.input.shape[1], head.output.shape[1]
            matrix = coordinates[start : start + a * b].view(a, b)
            blocks.append((head.input @ matrix @ head.output.T).flatten())
            start += a * b
        return torch.cat([*blocks, coordinates[start:]])

    @override
    def removal_gradients(
        self,
        theta: Tensor,
        batch: Any,
        role: str = "exact",
        tolerance: float = TOLERANCE,
        embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return removal_gradients(self.scope, theta, batch, self.heads, role, embeddings)

    @override
    def coarse(self) -> KroneckerProjection:
        of_scope = self.scope.start
        dtype = Placement(str(of_scope.device), of_scope.dtype).coarse.dtype
        heads = [HeadProjection(head.input.to(dtype), head.output.to(dtype)) for head in self.heads]
        return KroneckerProjection(self.scope, heads[0], heads[1])

    @override
    def jacobian(self, function: Callable[[Scope, Tensor], Tensor], theta: Tensor) -> Tensor:
        moved = _MovedHeads(self.scope, theta, self.heads)
        at = moved.start.requires_grad_()
        value = function(moved, at)
        pulled = partial(torch.autograd.grad, value, at, retain_graph=True, is_grads_batched=True)
        at_once = Placement(str(theta.device)).pulled
        return torch.cat([pulled(rows)[0] for rows in torch.split(torch.eye(len(value)).to(value), at_once)])

    @override
    def hessian(self, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        return self._in_coordinates(objective, theta, ProjectedPoint.hessian_products)

    @override
    def gauss_newton(self, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        return self._in_coordinates(objective, theta, ProjectedPoint.gauss_newton_products)

    def _in_coordinates(
        self, objective: ContrastiveLoss, theta: Tensor, products: Callable[[ProjectedPoint, Tensor], Tensor]
    ) -> Tensor:
        """As for any projection, in coordinates throughout: products in a few directions, not in all parameters."""
        unit = torch.eye(self.rank).to(theta)
        total = torch.zeros_like(unit)
        for batch in objective.own_stacks():
            point = ProjectedPoint(self.scope, theta, batch, self.heads)
            at_once = max(_PRODUCTS, _ENTRIES // (batch[0].shape[-2] * len(batch[0].flatten(0, -2))))
            total += torch.cat([products(point, unit[at : at + at_once]) for at in range(0, self.rank, at_once)])
        matrix = objective.processes.total(total) / objective.pairs + objective.proximal * unit
        return (matrix + matrix.T) / 2

    @override
    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}-{side}": getattr(head, side)
            for name, head in zip(("image", "text"), self.heads, strict=True)
            for side in ("input", "output")
        }


class _MovedHeads(HeadScope):
    """Heads as a function of coordinates: at ``theta`` plus what they lift to.

    A pull at the embeddings goes on to a few coordinates only, not to all parameters.
    """

    def __init__(self, scope: HeadScope, theta: Tensor, projections: tuple[HeadProjection, HeadProjection]) -> None:
        self._scope, self._theta, self._projections = scope, theta, projections
        self.loss, self.with_scale = scope.loss, scope.with_scale
        ranks = [(head.input.shape[1], head.output.shape[1]) for head in projections]
        self.shapes = (torch.Size(ranks[0]), torch.Size(ranks[1]))
        self.start = theta.new_zeros(sum(a * b for a, b in ranks) + scope.with_scale)

    @override
    def embed_images(self, theta: Tensor, images: Tensor) -> Tensor:
        return self._embed(0, theta, images)

    @override
    def embed_captions(self, theta: Tensor, captions: Tensor) -> Tensor:
        return self._embed(1, theta, captions)

    @override
    def scale(self, theta: Tensor) -> Tensor | float:
        return self._scope.scale(self._moved(theta))

    @override
    def logits(self, theta: Tensor, cosine: Tensor) -> Tensor:
        return self._scope.logits(self._moved(theta), cosine)

    def _moved(self, theta: Tensor) -> Tensor:
        """The parameters with the temperature moved; the heads are moved where they embed."""
        return torch.cat([self._theta[:-1], self._theta[-1:] + theta[-1:]]) if self.with_scale else self._theta

    def _embed(self, side: int, theta: Tensor, features: Tensor) -> Tensor:
        head, projection = self._scope.split(self._theta)[side], self._projections[side]
        moved = head_inputs(features, head) @ projection.input @ self.split(theta)[side] @ projection.output.T
        return head_outputs(features, head) + moved


def principal_projection(
    scope: HeadScope, theta: Tensor, batches: Iterable[Batch], rank: int = 16, processes: ProcessGroup = ALONE
) -> KroneckerProjection:
    """The directions of the heads in which the pairs vary most.

    On the input side those are the principal directions of a head's features;
    on the output side those of the other tower's embeddings, towards which the
    contrastive loss pulls.

    Args:
        scope: the head scope.
        theta: its parameters, shape ``(p,)``.
        batches: image and caption features, ``(n, w_image)`` and ``(n, w_text)``; those that this process takes.
        rank (16): directions to keep on either side of each head, at most.
        processes (ALONE): the processes that share the batches.
    """
    heads = scope.split(theta)
    second_moments = [scope.start.new_zeros(size, size) for head in heads for size in head.shape]
    for batch in batches:
        sides = [
            side(features, head)
            for features, head in zip(batch[:2], heads, strict=True)
            for side in (head_inputs, head_outputs)
        ]
        for place, rows in enumerate(sides):
            rows = (normalize(rows, dim=-1) if place % 2 else rows).flatten(0, -2)
            second_moments[place] += rows.T @ rows
    image_input, image_output, text_input, text_output = (
        torch.linalg.eigh(processes.total(moment)).eigenvectors[:, -rank:] for moment in second_moments
    )
    return KroneckerProjection(
        scope, HeadProjection(image_input, text_output), HeadProjection(text_input, image_output)
    )


#: Projections by the kind that a scope names.
PROJECTIONS: dict[str, type[Projection]] = {each.kind: each for each in (BasisProjection, KroneckerProjection)}
