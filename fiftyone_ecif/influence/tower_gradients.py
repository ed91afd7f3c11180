"""Removal gradients in any scope, by reverse mode, without a backward pass for each pair.

The removal of a pair pulls the embeddings of its batch by vectors that are known
in closed form (``pulls``), and each embedding depends on its own image or
caption only. So each is back-propagated along the few directions in which
nearly all pulls on it go, and what comes out is combined to the gradients of all
pairs and roles: the same backward passes serve them all. What is left of the
pulls goes through the linear map that fits all these passes best, as the
embeddings of a tower depend on its parameters in part in the same way. How far
passes are from what those before them foretell says how much is still missing,
and so through which tower the next one goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from fiftyone_ecif.influence.losses import BatchLoss
from fiftyone_ecif.influence.pulls import Pulls, Remainder
from fiftyone_ecif.influence.scope import TOWERS, SampleGradients, Scope

#: Relative error of stored gradients, by default.
TOLERANCE = 1e-2
# errors were mostly up to 1.35 times as large as they were estimated, once 1.5 times; of embeddings of two kinds twice
_MARGIN = 0.7
_SPARED = 0.05  # energy of pulls that no pass is made for, over what may be missing
_RIDGES = 1e-2, 1e2  # the least that float32 can do with, and what leaves nothing in common


@torch.no_grad()
def tower_gradients(
    scope: Scope,
    theta: Tensor,
    batch: Any,
    role: str = "exact",
    basis: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[tuple[Tensor, Tensor], float]:
    """Gradients of both roles of every pair of a batch.

    Args:
        scope: what varies.
        theta: its parameters, shape ``(p,)``.
        batch: images and captions, ``n`` of each.
        role ("exact"): see ``roles.ROLES``.
        basis (None): directions to keep coordinates of, orthonormal columns,
            shape ``(p, r)``; by default all of the gradient.
        tolerance (0.01): what the length of the error is to stay below, over the
            length of all gradients. It is compared with an estimate, and no bound; 0 for no
            error but rounding.

    Returns:
        the gradients of the positive and the negative role, ``(n, r)`` each, and
        how many directions an embedding was back-propagated along, the mean of both towers
    """
    loss = scope.loss_of(batch)
    backward = [scope.sample_gradients(theta, name, inputs, basis) for name, inputs in zip(TOWERS, batch, strict=False)]
    pulls = Pulls(scope, loss, theta, backward[0].embeddings, backward[1].embeddings, role)
    count, width = pulls.shape
    gradients = theta.new_zeros(2 * count, len(theta) if basis is None else basis.shape[1])
    sides = [_Side(pulls, number, backward[number], gradients, tolerance) for number in (0, 1)]
    unfinished = list(sides)
    while unfinished:
        side = max(unfinished, key=lambda each: each.missing)
        side.step()
        if side.passes == min(count, width):
            unfinished.remove(side)
        if sum(each.missing for each in sides) <= (_MARGIN * tolerance) ** 2 * float(gradients.square().sum()):
            break
    for side in sides:
        gradients += side.left.on_all @ side.common.map
    passes = sum(side.passes for side in sides)
    direct = _along_logits(scope, loss, theta, pulls.cosine, role)
    roles = gradients.view(2, count, -1)
    if direct is not None:
        roles += direct if basis is None else direct @ basis
    return (roles[0], roles[1]), passes / 2


class _Side:
    """The passes through one tower.

    Args:
        pulls: on the embeddings.
        number: 0 for images, 1 for captions.
        backward: gradients of the embeddings along directions.
        gradients: what they are added to, shape ``(2n, r)``.
        tolerance: see :func:`tower_gradients`.

    Attributes:
        common: the map that the embeddings have in common, as far as it is known.
        left: of the pulls, each times the root of the embeddings' spread, so that its length is what it matters.
        missing: the squared length, as estimated, of what gradients would miss if what is left went through that map.
        passes: that were made.
    """

    def __init__(
        self, pulls: Pulls, number: int, backward: SampleGradients, gradients: Tensor, tolerance: float
    ) -> None:
        self._along, self._lengths, self._gradients = backward.along, pulls.lengths[number], gradients
        self._root = pulls.root_of_spread(number)
        self.common = _CommonMap(pulls.shape[1], gradients)
        self.left = Remainder(pulls.of(number) @ self._root, _SPARED * tolerance**2)
        self.missing, self.passes = float("inf"), 0

    def step(self) -> None:
        """Makes one more pass."""
        directions, along = self.left.take()
        pulled = torch.linalg.solve_triangular(self._root, directions, upper=False, left=False)
        found = self._along(pulled / self._lengths)
        self._gradients.addmm_(along.T, found)
        self.common.learn(directions, found, along)
        self.missing, self.passes = self.common.error(self.left), self.passes + 1


class _CommonMap:
    """The linear map from directions to gradients that the embeddings of a tower have in common.

    Each embedding has a map of its own. That map is taken for the common one plus what is independent of all
    others, so that the common one is found by a ridge regression. Its error follows from what passes find beside it.

    Args:
        width: ``d``, of the embeddings.
        like: gradients, shape ``(..., r)``.

    Attributes:
        map: shape ``(d, r)``.
    """

    def __init__(self, width: int, like: Tensor) -> None:
        self._unit = torch.eye(width).to(like)
        self._seen, self._found = torch.zeros_like(self._unit), like.new_zeros(width, like.shape[-1])
        self._inverse, self.map = self._unit, self._found
        self._own: list[float] = []
        self._added: list[float] = []
        self._all: list[float] = []

    def learn(self, directions: Tensor, found: Tensor, along: Tensor) -> None:
        """Fits the map to one more direction of each embedding.

        Args:
            directions: unit vectors, shape ``(k, d)``.
            found: what came back along them, shape ``(k, r)``.
            along: the length of the pulls along them, shape ``(k, 2n)``.
        """
        doubt = 1 + ((directions @ self._inverse) * directions).sum(1, keepdim=True)
        missed = (found - directions @ self.map) * doubt.rsqrt()
        weights = along.square().sum(1)
        own, whole = weights @ missed.square().sum(1), weights @ found.square().sum(1)
        total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        squares = torch.stack([own, (along.T @ missed).square().sum(), whole]) / total
        for kept, square in zip((self._own, self._added, self._all), squares.tolist(), strict=True):
            kept.append(square)
        self._seen.addmm_(directions.T, directions)
        self._found.addmm_(directions.T, found)
        own_square, (least, most) = _of_last(self._own), _RIDGES
        shared = sum(self._all) / len(self._all) - own_square
        ridge = min(max(own_square / shared, least), most) if shared > 0 else most
        self._inverse = torch.linalg.inv(self._seen + ridge * self._unit)
        self.map = self._inverse @ self._found

    def error(self, left: Remainder) -> float:
        """The squared length, as estimated, of what is missing if what is left of pulls goes through the map.

        What embeddings have of their own adds up to more where some are alike, as much as in the last passes.
        """
        on_all = left.on_all
        own_square = max(_of_last(self._own), _of_last(self._added))
        return own_square * float(left.energy + ((on_all @ self._inverse) * on_all).sum())


def _of_last(values: list[float]) -> float:
    last = values[-2:]
    return sum(last) / len(last)


def _along_logits(scope: Scope, loss: BatchLoss, theta: Tensor, cosine: Tensor, role: str) -> Tensor | None:
    """The part of the gradients by which temperature and bias in scope act directly, ``(2, n, p)``, or None."""
    places = scope.logit_parameters(theta)
    if not places:
        return None
    gradients = theta.new_zeros(2, len(cosine), len(theta))
    for place in places:
        direction = torch.zeros_like(theta)
        direction[place] = 1
        similarity, moved = jvp(lambda at: scope.logits(at, cosine), (theta,), (direction,))[:2]
        for number, tangent in enumerate(loss.removal_tangents(similarity, moved, role)):
            gradients[number, :, place] = tangent
    return gradients
