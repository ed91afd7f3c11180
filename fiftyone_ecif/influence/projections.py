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
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.functional import normalize
from typing_extensions import override

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.influence.curvature import Product, gauss_newton_at, hessian_at
from fiftyone_ecif.influence.head_gradients import HeadProjection, removal_gradients
from fiftyone_ecif.influence.heads import Batch, HeadScope, head_inputs, head_outputs
from fiftyone_ecif.influence.objective import Batches, ContrastiveLoss, OneByOne
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.tower_gradients import TOLERANCE, tower_gradients

_CHUNK = 32  # vectors at a time
_PRODUCTS = 8  # likewise; of matrices of a batch, which then stay in the processor's cache
_ENTRIES = 2**19  # of those matrices at a time, where a batch is small enough for more than that many
_DIRECTIONS = 128  # of a basis, at most


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
        self, theta: Tensor, batch: Any, role: str = "exact", tolerance: float = TOLERANCE
    ) -> tuple[Tensor, Tensor]:
        """Projected gradients of both roles of every pair of a batch, each of shape ``(n, r)``.

        Args:
            theta: where, shape ``(p,)``.
            batch: images and captions, ``n`` of each.
            role ("exact"): see ``roles.ROLES``.
            tolerance (0.01): see :func:`tower_gradients`; in closed form there is no error.
        """

    @abstractmethod
    def jacobian(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        """Projected gradients of the entries of ``function(theta)``, ``(n,)`` to ``(n, r)``."""

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
        self, theta: Tensor, batch: Any, role: str = "exact", tolerance: float = TOLERANCE
    ) -> tuple[Tensor, Tensor]:
        return tower_gradients(self.scope, theta, batch, role, self.basis, tolerance)[0]

    @override
    def jacobian(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        columns = [jvp(function, (theta,), (direction.contiguous(),))[1] for direction in self.basis.T]
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
        scope, own = cast(HeadScope, objective.scope), objective.own_stacks()
        return principal_projection(scope, theta, own, processes=objective.processes)

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
        self, theta: Tensor, batch: Any, role: str = "exact", tolerance: float = TOLERANCE
    ) -> tuple[Tensor, Tensor]:
        return removal_gradients(self.scope, theta, batch, self.heads, role)

    @override
    def jacobian(self, function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
        value, pull_back = vjp(function, theta)[:2]
        pulled = torch.vmap(lambda row: self.project(pull_back(row)[0]), chunk_size=_CHUNK)
        rows: Tensor = pulled(torch.eye(len(value)).to(value))
        return rows

    @override
    def hessian(self, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        return self._in_coordinates(objective, theta, ContrastiveLoss.hessian_product)

    @override
    def gauss_newton(self, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        return self._in_coordinates(objective, theta, ContrastiveLoss.gauss_newton_product)

    def _in_coordinates(
        self,
        objective: ContrastiveLoss,
        theta: Tensor,
        product: Callable[[ContrastiveLoss, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """As for any projection, in coordinates throughout: products in a few directions, not in all parameters."""
        moved = _MovedHeads(self, theta)
        # of a scope the loss asks for the similarity only
        along = ContrastiveLoss(moved, moved.batches(objective.batches), objective.pairs, objective.proximal)  # type: ignore[arg-type]
        at_once = max(_PRODUCTS, _ENTRIES // max(map(len, objective.batches.partition)) ** 2)
        columns = torch.vmap(lambda row: product(along, moved.start, row), chunk_size=at_once)
        matrix: Tensor = columns(torch.eye(self.rank).to(theta))
        return (matrix + matrix.T) / 2

    @override
    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}-{side}": getattr(head, side)
            for name, head in zip(("image", "text"), self.heads, strict=True)
            for side in ("input", "output")
        }


class _MovedSide(NamedTuple):
    """One tower of a batch at ``theta``, and what moves it."""

    projected_input: Tensor  # (n, a): projected features
    along: Tensor  # (n, b): embeddings in the directions that they move in
    across: Tensor  # (n, b of the other side): and in those of the other tower
    squared: Tensor  # (n,): squared lengths of the embeddings

    def moved(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """How far each embedding moves, ``(n, b)``, and one over its length then, ``(n,)``."""
        # the directions are orthonormal, so that what it moves by is as long as its coordinates
        by = self.projected_input @ coordinates.view(self.projected_input.shape[1], -1)
        return by, (self.squared + (2 * self.along + by).mul(by).sum(1)).rsqrt()


class _MovedHeads:
    """The similarity of a head scope as a function of coordinates: at ``theta`` plus what they lift to.

    An embedding moves in the ``b`` output directions of its head only, so that
    inner products of full width are computed once, at ``theta``.
    """

    def __init__(self, projection: KroneckerProjection, theta: Tensor) -> None:
        self.projection, self.theta = projection, theta
        self.loss = projection.scope.loss
        self.start = theta.new_zeros(projection.rank)

    def batches(self, batches: Batches) -> _MovedBatches:
        """The same batches as inner products of the embeddings at ``theta``, and both sides."""
        scope, outputs = self.projection.scope, [head.output for head in self.projection.heads]
        made = []
        for batch in batches:
            embeddings = scope.embed(self.theta, batch)
            images, captions = (
                _MovedSide(features @ head.input, rows @ own, rows @ other, rows.square().sum(1))
                for features, rows, head, own, other in zip(
                    scope.inputs(batch), embeddings, self.projection.heads, outputs, outputs[::-1], strict=True
                )
            )
            made.append((embeddings[0] @ embeddings[1].T, images, captions))
        return _MovedBatches(made, batches.partition)

    def similarity(self, theta: Tensor, batch: tuple[Tensor, _MovedSide, _MovedSide]) -> Tensor:
        """``S`` of a batch at these coordinates, shape ``(n, n)``."""
        inner, images, captions = batch
        cut = images.projected_input.shape[1] * images.along.shape[1]
        end = cut + captions.projected_input.shape[1] * captions.along.shape[1]
        image, image_unit = images.moved(theta[:cut])
        caption, caption_unit = captions.moved(theta[cut:end])
        overlap = self.projection.heads[0].output.T @ self.projection.heads[1].output
        inner = inner + image @ (captions.across + caption @ overlap.T).T + images.across @ caption.T
        scope, at = self.projection.scope, self.theta
        if scope.with_scale:
            at = torch.cat([at[:-1], at[-1:] + theta[-1:]])
        return scope.logits(at, inner * (image_unit[:, None] * caption_unit))


class _MovedBatches(OneByOne):
    """Batches of :class:`_MovedHeads`."""

    def __init__(self, made: list[tuple[Tensor, _MovedSide, _MovedSide]], partition: Sequence[Tensor]) -> None:
        self._made, self.partition = made, partition

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._made[index]


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
    second_moments = [theta.new_zeros(size, size) for head in heads for size in head.shape]
    for batch in batches:
        sides = [
            side(features, head)
            for features, head in zip(batch, heads, strict=True)
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
