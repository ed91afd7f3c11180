"""The contrastive loss of a batch and what taking a pair out of it changes.

Pure functions of a similarity matrix ``S`` of shape ``(n, n)``: ``S[i, j]`` is
the scaled cosine similarity of image ``i`` and caption ``j`` (a logit, no
unit). Losses are in nats. Pair ``n`` enters the loss of its batch in two roles:

* as a *positive*, through its own loss ``l_n``;
* as a *negative*, by standing in the softmax of every other pair.

Removing it changes the batch loss by exactly the sum of the two::

    L(B) - L(B without n) = positive_n + negative_n
    positive_n = l_n
    negative_n = -sum_{k != n} [log(1 - P_kn) + log(1 - Q_nk)]

with ``P`` the softmax of ``S`` over captions and ``Q`` over images. Source:
the removal perturbation behind Eq. 3 of arXiv 2411.11667 (ECIF), which keeps
only its first order; this is the exact form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pull:
    """How the losses of the anchors ``k`` (rows of ``S``) carry a role of pair ``n``.

    The derivative of the role of pair ``n`` with respect to row ``k`` of ``S``
    is ``weight[k, n] * (e_n - mean[k])``, ``e_n`` being the n-th unit vector.

    Attributes:
        weight: shape ``(n, n)``.
        mean: shape ``(n, n)``, rows are probabilities.
    """

    weight: Tensor
    mean: Tensor

    def tangent(self, direction: Tensor) -> Tensor:
        """Change of the role of each pair when ``S`` moves along ``direction``, shape ``(n,)``."""
        expected = (self.mean * direction).sum(1, keepdim=True)
        return (self.weight * (direction - expected)).sum(0)


def pair_losses(similarity: Tensor) -> Tensor:
    """Loss of each pair in its batch, both directions summed, shape ``(n,)``.

    ``open_clip.ClipLoss`` is their sum divided by ``2 n``.
    """
    return similarity.logsumexp(1) + similarity.logsumexp(0) - 2 * similarity.diagonal()


def removal_roles(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """What each pair adds to the loss of its batch, as a positive and as a negative.

    Returns:
        ``(positive, negative)``, each of shape ``(n,)``; the sum is the loss of
        the batch minus the loss of the batch without the pair.
    """
    negative = _negative_values(similarity) + _negative_values(similarity.T)
    return pair_losses(similarity), negative


def removal_tangents(similarity: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Derivative of both roles of every pair along ``direction``, in O(n^2).

    Args:
        similarity: ``S``, shape ``(n, n)``.
        direction: the derivative of ``S`` along some change of the model, same shape.

    Returns:
        ``(positive, negative)``, each of shape ``(n,)``.
    """
    positive, negative = (
        torch.stack(
            [pull.tangent(direction) for pull in images] + [pull.tangent(direction.T) for pull in captions]
        ).sum(0)
        for images, captions in zip(removal_pulls(similarity), removal_pulls(similarity.T), strict=True)
    )
    return positive, negative


def removal_pulls(similarity: Tensor) -> tuple[list[Pull], list[Pull]]:
    """The derivatives of the roles with respect to ``S``, rows as anchors.

    Call it once with ``S`` (images as anchors) and once with its transpose
    (captions as anchors); a role's derivative is the sum of both.

    No weight can overflow. An anchor gives more than half of its weight to at
    most one other pair; ``1 - P`` is then computed from the rest of the row and
    not by subtraction, so duplicate captions need no clamping.

    Returns:
        ``(positive, negative)``: the pulls that add up to each role.
    """
    mean = similarity.softmax(1)
    positive = [Pull(-torch.eye(len(mean), dtype=mean.dtype, device=mean.device), mean)]
    if len(mean) == 1:
        return positive, [Pull(torch.zeros_like(mean), mean)]
    top = similarity.argmax(1, keepdim=True)
    rest = similarity.scatter(1, top, -torch.inf).softmax(1)
    heavy = torch.zeros_like(mean).scatter(1, top, mean.gather(1, top)).fill_diagonal_(0)
    light = mean.scatter(1, top, 0).fill_diagonal_(0)
    return positive, [Pull(light / (1 - light), mean), Pull(heavy, rest)]


def _negative_values(similarity: Tensor) -> Tensor:
    if len(similarity) == 1:
        return torch.zeros_like(similarity[0])
    top = similarity.argmax(1, keepdim=True)
    total = similarity.logsumexp(1, keepdim=True)
    rest = similarity.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    log_others = torch.log1p(-similarity.softmax(1).scatter(1, top, 0)).scatter(1, top, rest - total)
    return -log_others.fill_diagonal_(0).sum(0)
