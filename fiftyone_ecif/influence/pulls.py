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
        each, pulls = torch.arange(len(own)), own.new_zeros(len(own), 2, *others.shape)
        for role, as_anchor, as_other in zip(
            pulls.unbind(1), self._gradients[tower], self._gradients[1 - tower], strict=True
        ):
            for gradient in as_anchor:
                weight = gradient.matrix()[..., None]
                role.addcmul_(weight, others).addcmul_(weight, (gradient.mean @ others)[:, None], value=-1)
            for gradient in as_other:
                role -= _carried(gradient, gradient.mean[..., None] * others[:, None]).transpose(0, 1)
                role[each, each] += gradient.aggregate(others)
        pulls *= self._scale
        along = (pulls.flatten(1, 2) @ own[..., None]).view(*pulls.shape[:3], 1)
        return pulls.addcmul_(along, own[:, None, None], value=-1)

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
        pulls: shape ``(k, 2, n, d)``, as :meth:`Pulls.of` gives them.
        spared (0.0): a share of their energy. The weakest pulls, equally many on each embedding, that have no more
            together are never taken out, which spares most of the work: few pairs compete with each other.

    Attributes:
        on_all: the sum over the embeddings of what is left, by role and pair, shape ``(2 n, d)``.
    """

    def __init__(self, pulls: Tensor, spared: float = 0.0) -> None:
        pulls = pulls.flatten(1, 2)
        self.on_all = pulls.sum(0)
        lengths, self._pairs = torch.linalg.vector_norm(pulls, dim=2).sort(1, descending=True)
        energy = lengths.square().sum(0)
        left = energy.flip(0).cumsum(0).flip(0)  # by how many of each are taken out
        count = max(int((left > spared * energy.sum()).sum()), 1)
        self._lengths, self._pairs = lengths[:, :count], self._pairs[:, :count]
        self._pulls = pulls.gather(1, self._pairs[..., None].expand(-1, -1, pulls.shape[2]))
        self._weak = left[count:][:1].sum()

    @property
    def energy(self) -> Tensor:
        """The sum of the squares of what is left."""
        energy: Tensor = self._weak + self._lengths.square().sum()
        return energy

    def take(self) -> tuple[Tensor, Tensor]:
        """Takes out what goes in the direction in which most does: the greatest pull, after a step of the power method.

        Whichever direction it is, what was taken out and what is left add up to
        the pulls, and after ``min(n, d)`` of them nothing is left but rounding and what was spared.
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
        self._lengths = torch.linalg.vector_norm(self._pulls, dim=2)
        taken = along.new_zeros(len(along), len(self.on_all)).scatter_(1, self._pairs, along)
        self.on_all.addmm_(taken.T, direction[:, 0], alpha=-1)
        return direction[:, 0], taken


def _unit(rows: Tensor) -> Tensor:
    """Unit vectors, also of what is nearly nothing; zeros of nothing."""
    return normalize(rows, dim=-1, eps=_NOTHING)


def _carried(gradient: RoleGradient, rows: Tensor) -> Tensor:
    """What the anchors have, ``(n, n, d)``, at the pairs whose role they carry: :meth:`RoleGradient.aggregate`."""
    return gradient.aggregate(rows.flatten(1)).view(-1, *rows.shape[1:])
