"""What taking pairs out of a batch does to its embeddings, and the few directions in which most of that goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.losses import BatchLoss, RoleGradient
from fiftyone_ecif.influence.scope import Scope

_MORE = 8  # random vectors beyond the directions that are looked for
_FIRST = 16  # directions that are looked for at first
_ROWS = 2**22  # numbers of the pulls at a time


class Directions(NamedTuple):
    """Directions of the embeddings of one tower, and the pulls along them.

    Attributes:
        directions: of each embedding ``k`` as it is before normalisation, shape ``(n, q, d)``.
        coefficients: the removal of pair ``m`` pulls embedding ``k``, in either
            role, by about ``sum_q coefficients[k, :, m, q] directions[k, q]``; shape
            ``(n, 2, n, q)``.
        needed: how many of its directions an embedding needs, shape ``(n,)``.
    """

    directions: Tensor
    coefficients: Tensor
    needed: Tensor


class Pulls:
    """The derivative of both roles of every pair of a batch with respect to every embedding.

    Args:
        scope: what the similarities are computed by.
        loss: of the batch.
        theta: its parameters, shape ``(p,)``.
        images: embeddings before normalisation, shape ``(n, d)``.
        captions: likewise.
        role ("exact"): see ``roles.ROLES``.

    Attributes:
        cosine: of images and captions, shape ``(n, n)``.
    """

    def __init__(
        self, scope: Scope, loss: BatchLoss, theta: Tensor, images: Tensor, captions: Tensor, role: str = "exact"
    ) -> None:
        self._lengths = [side.norm(dim=1) for side in (images, captions)]
        self._units = units = [normalize(side, dim=1) for side in (images, captions)]
        self.cosine = units[0] @ units[1].T
        similarity = scope.logits(theta, self.cosine)
        self._scale = (scope.logits(theta, self.cosine + 1) - similarity)[0, 0]
        #: of either side as anchors, of either role
        self._gradients = [loss.role_gradients(each, role) for each in (similarity, similarity.T)]

    def of(self, tower: int, rows: Tensor) -> Tensor:
        """On some embeddings, in units of their length, shape ``(k, 2, n, d)``: by role and by pair that is removed.

        Row ``k`` of ``S`` moves with anchor ``k`` and with all others: removing
        pair ``n`` pulls anchor ``k`` by ``weight[k, n] (v_n - mean_k V)``, and
        other ``j`` by ``sum_k weight[k, n] ([j = n] - mean[k, j]) v_k``, ``v`` being
        the other side in both cases. The normalisation takes off what is along
        the embedding itself.

        Args:
            tower: 0 for images, 1 for captions.
            rows: which embeddings, shape ``(k,)``.
        """
        own, others = self._units[tower][rows], self._units[1 - tower]
        pulled = []
        for as_anchor, as_other in zip(self._gradients[tower], self._gradients[1 - tower], strict=True):
            part = own.new_zeros(len(rows), len(others), own.shape[1])
            for gradient in as_anchor:
                weight = gradient.matrix()[rows][..., None]
                part += weight * (others - (gradient.mean[rows] @ others)[:, None])
            for gradient in as_other:
                part -= _carried(gradient, gradient.mean[:, rows, None] * others[:, None]).transpose(0, 1)
                part[torch.arange(len(rows)), rows] += gradient.aggregate(others)[rows]
            pulled.append(part)
        whole = self._scale * torch.stack(pulled, dim=1)
        along = (whole * own[:, None, None]).sum(-1, keepdim=True)
        tangent: Tensor = whole - along * own[:, None, None]
        return tangent

    def leading(self, neglected: float) -> list[Directions]:
        """The leading directions of the pulls on each embedding, of images and of captions, as few as are needed.

        They are the right singular vectors of an embedding's pulls, and those of
        the largest singular values of all embeddings are taken. Pulls are compared
        in units of an embedding's length, which its derivatives grow with.

        Args:
            neglected: share of the length of all pulls that may be left out. With 0
                nothing is, but for rounding.
        """
        count, width = self._units[0].shape
        if neglected == 0:
            return [self._all_directions(tower) for tower in (0, 1)]
        size = _FIRST
        while True:
            size = min(size, count, width)
            found = [self._found(tower, size) for tower in (0, 1)]
            energies = torch.stack([energy for _, _, energy in found])
            kept = torch.stack([coefficients.double().square().sum((1, 2)) for _, coefficients, _ in found])
            spare = neglected**2 * energies.sum() - (energies.sum() - kept.sum()).clamp_min(0)
            if spare >= 0 or size == min(count, width):
                break
            size *= 2
        smallest = kept.flatten().sort().values
        left_out = int((smallest.cumsum(0) <= spare).sum())
        least = smallest[left_out] if left_out < len(smallest) else torch.inf
        return [self._directions(tower, *found[tower][:2], (kept[tower] >= least).sum(-1)) for tower in (0, 1)]

    def _directions(self, tower: int, directions: Tensor, coefficients: Tensor, needed: Tensor) -> Directions:
        return Directions(directions / self._lengths[tower][:, None, None], coefficients, needed)

    def _all_directions(self, tower: int) -> Directions:
        """A basis of all directions that an embedding can be pulled in, for each."""
        own, others = self._units[tower], self._units[1 - tower]
        count, width = own.shape
        if width <= count:
            directions = torch.eye(width).to(own).expand(count, -1, -1)
        else:  # towards the other side, but for what is along the embedding itself
            directions = torch.stack([torch.linalg.qr((others - (others @ u)[:, None] * u).T).Q.T for u in own])
        coefficients = torch.cat([self.of(tower, rows) @ directions[rows, None].mT for rows in self._chunks()])
        return self._directions(tower, directions, coefficients, torch.full((count,), directions.shape[1]))

    def _found(self, tower: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leading directions, the largest first; pulls along them; squared length of all pulls of each embedding.

        A randomised range finder (Halko, Martinsson and Tropp 2011).
        """
        generator = torch.Generator().manual_seed(0)
        own = self._units[tower]
        random = torch.randn(own.shape[1], min(size + _MORE, *own.shape), generator=generator).to(own)
        parts = []
        for rows in self._chunks():
            pulls = self.of(tower, rows).flatten(1, 2)
            basis = torch.linalg.qr(pulls.mT @ (pulls @ random)).Q
            basis = torch.linalg.qr(pulls.mT @ (pulls @ basis)).Q
            along = pulls @ basis
            turn = torch.linalg.eigh(along.double().mT @ along.double()).eigenvectors.flip(-1).to(own)
            energy = torch.linalg.vector_norm(pulls, dim=(1, 2), dtype=torch.float64).square()
            parts.append(((basis @ turn).mT, (along @ turn).unflatten(1, (2, -1)), energy))
        directions, coefficients, energies = (torch.cat(each) for each in zip(*parts, strict=True))
        return directions, coefficients, energies

    def _chunks(self) -> Sequence[Tensor]:
        count, width = self._units[0].shape
        rows = torch.arange(count, device=self._units[0].device)
        return torch.split(rows, max(1, _ROWS // (2 * count * width)))


def _carried(gradient: RoleGradient, rows: Tensor) -> Tensor:
    """What the anchors have, ``(n, k, d)``, at the pairs whose role they carry: :meth:`RoleGradient.aggregate`."""
    return gradient.aggregate(rows.flatten(1)).view(-1, *rows.shape[1:])
