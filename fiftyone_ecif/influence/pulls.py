"""What taking pairs out of a batch does to its embeddings, and the few directions in which most of that goes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.losses import BatchLoss, RoleGradient
from fiftyone_ecif.influence.scope import Scope

_NOTHING = 1e-20  # a length whose square is still a number in float32


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
        shape: of either embeddings.
        lengths: of images and of captions, ``(n, 1)`` each.
        cosine: of images and captions, shape ``(n, n)``.
    """

    def __init__(
        self, scope: Scope, loss: BatchLoss, theta: Tensor, images: Tensor, captions: Tensor, role: str = "exact"
    ) -> None:
        self.shape, self.lengths = images.shape, [side.norm(dim=1, keepdim=True) for side in (images, captions)]
        self._units = units = [normalize(side, dim=1) for side in (images, captions)]
        self.cosine = units[0] @ units[1].T
        similarity = scope.logits(theta, self.cosine)
        self._scale = (scope.logits(theta, self.cosine + 1) - similarity)[0, 0]
        #: of either side as anchors, of either role
        self._gradients = [loss.role_gradients(each, role) for each in (similarity, similarity.T)]

    def of(self, tower: int) -> Tensor:
        """On all embeddings of a tower, in units of their length, shape ``(n, 2, n, d)``: by role and removed pair.

        Row ``k`` of ``S`` moves with anchor ``k`` and with all others: removing
        pair ``n`` pulls anchor ``k`` by ``weight[k, n] (v_n - mean_k V)``, and
        other ``j`` by ``sum_k weight[k, n] ([j = n] - mean[k, j]) v_k``, ``v`` being
        the other side in both cases. The normalisation takes off what is along
        the embedding itself.

        Args:
            tower: 0 for images, 1 for captions.
        """
        own, others = self._units[tower], self._units[1 - tower]
        each, pulled = torch.arange(len(own)), []
        for as_anchor, as_other in zip(self._gradients[tower], self._gradients[1 - tower], strict=True):
            part = own.new_zeros(len(own), *others.shape)
            for gradient in as_anchor:
                part += gradient.matrix()[..., None] * (others - (gradient.mean @ others)[:, None])
            for gradient in as_other:
                part -= _carried(gradient, gradient.mean[..., None] * others[:, None]).transpose(0, 1)
                part[each, each] += gradient.aggregate(others)
            pulled.append(part)
        whole = self._scale * torch.stack(pulled, dim=1)
        along = (whole * own[:, None, None]).sum(-1, keepdim=True)
        tangent: Tensor = whole - along * own[:, None, None]
        return tangent

    def root_of_spread(self, tower: int) -> Tensor:
        """Which pulls on a tower's embeddings change its parameters most: ``L``, lower triangular, shape ``(d, d)``.

        What a pull ``r`` does to parameters is taken to be as long as ``r @ L``. ``L @ L.T`` is the
        covariance of the embeddings over its mean variance, plus the unit matrix: parameters move embeddings
        most where embeddings differ most.
        """
        own = self._units[tower]
        covariance, unit = torch.cov(own.T, correction=0).view(2 * own.shape[1:]), torch.eye(own.shape[1]).to(own)
        mean = covariance.trace().clamp(min=torch.finfo(own.dtype).eps) / len(unit)  # less is rounding
        root: Tensor = torch.linalg.cholesky(unit + covariance / mean)
        return root


class Remainder:
    """Pulls on some embeddings, of which what goes in a direction of each is taken out, again and again.

    Args:
        pulls: shape ``(k, 2, n, d)``, as :meth:`Pulls.of` gives them; they are overwritten.

    Attributes:
        on_all: the sum over the embeddings of what is left, by role and pair, shape ``(2 n, d)``.
    """

    def __init__(self, pulls: Tensor) -> None:
        self._pulls = pulls.flatten(1, 2)
        self._lengths = torch.linalg.vector_norm(self._pulls, dim=2)
        self.on_all = self._pulls.sum(0)

    @property
    def energy(self) -> Tensor:
        """The sum of the squares of what is left."""
        energy: Tensor = self._lengths.square().sum()
        return energy

    def take(self) -> tuple[Tensor, Tensor]:
        """Takes out what goes in the direction in which most does: the greatest pull, after a step of the power method.

        Whichever direction it is, what was taken out and what is left add up to
        the pulls, and after ``min(n, d)`` of them nothing is left but rounding.
        One that is not quite the leading one does nearly as well.

        Returns:
            unit vectors, ``(k, d)``, and the length of the pulls along them, by role and pair, ``(k, 2 n)``
        """
        greatest = self._lengths.argmax(1)
        direction = _unit(self._pulls[torch.arange(len(greatest)), greatest][:, None])
        # products of rows, which are faster than those of columns
        direction = _unit(_unit(direction @ self._pulls.mT) @ self._pulls)
        along = (direction @ self._pulls.mT)[:, 0]
        self._pulls.addcmul_(along[..., None], direction, value=-1)
        self.on_all.addmm_(along.T, direction[:, 0], alpha=-1)
        self._lengths = torch.linalg.vector_norm(self._pulls, dim=2)
        return direction[:, 0], along


def _unit(rows: Tensor) -> Tensor:
    """Unit vectors, also of what is nearly nothing; zeros of nothing."""
    return normalize(rows, dim=-1, eps=_NOTHING)


def _carried(gradient: RoleGradient, rows: Tensor) -> Tensor:
    """What the anchors have, ``(n, n, d)``, at the pairs whose role they carry: :meth:`RoleGradient.aggregate`."""
    return gradient.aggregate(rows.flatten(1)).view(-1, *rows.shape[1:])
