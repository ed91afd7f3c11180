"""Removal gradients in any scope, by reverse mode, without a backward pass for each pair.

The removal of a pair pulls the embeddings of its batch by vectors that are known
in closed form (``pulls``), and each embedding depends on its own image or
caption only. So each is back-propagated along the few directions in which
nearly all pulls on it go, and what comes out is combined to the gradients of all
pairs and roles: the same backward passes serve them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.influence.losses import BatchLoss
from fiftyone_ecif.influence.pulls import Pulls
from fiftyone_ecif.influence.scope import Scope

#: Relative error of stored gradients, by default.
TOLERANCE = 1e-2
_MARGIN = 0.7  # what is left out of the pulls weighed up to 1.3 times as much in gradients


def tower_gradients(
    scope: Scope,
    theta: Tensor,
    batch: Any,
    role: str = "exact",
    basis: Tensor | None = None,
    tolerance: float = TOLERANCE,
    embeddings: tuple[Tensor, Tensor] | None = None,
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
            length of all gradients. It is chosen by the pulls, and no bound; 0 for no
            error but rounding.
        embeddings (None): of the batch before normalisation, if they are known, ``(n, d)`` each.

    Returns:
        the gradients of the positive and the negative role, ``(n, r)`` each, and
        the mean number of directions that an embedding was back-propagated along
    """
    with torch.no_grad():
        embeddings = scope.embed(theta, batch) if embeddings is None else embeddings
        loss = scope.loss_of(batch)
        pulls = Pulls(scope, loss, theta, *embeddings, role)
        leading = pulls.leading(_MARGIN * tolerance)
    count = len(embeddings[0])
    gradients = theta.new_zeros(2, count, len(theta) if basis is None else basis.shape[1])
    spent, at_once = 0, Placement(str(theta.device)).samples
    for tower, inputs, found in zip(("image", "text"), batch[:2], leading, strict=True):
        for rows in torch.split(found.needed.argsort(descending=True), at_once):
            needed = int(found.needed[rows[0]])
            if needed == 0:
                break
            along = scope.sample_gradients(theta, tower, inputs[rows], found.directions[rows, :needed], basis)
            gradients += torch.einsum("kamq,kqr->amr", found.coefficients[rows, :, :, :needed], along)
            spent += needed * len(rows)
    direct = _along_logits(scope, loss, theta, pulls.cosine, role)
    if direct is not None:
        gradients += direct if basis is None else direct @ basis
    return (gradients[0], gradients[1]), spent / (2 * count)


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
