"""Contrastive losses of a batch and what taking a pair out of it changes.

Pure functions of a similarity matrix ``S`` of shape ``(n, n)``: ``S[i, j]`` is
the logit of image ``i`` and caption ``j`` (scaled cosine similarity, no unit).
A stack of batches of one size, ``(b, n, n)``, is taken likewise: everything
keeps its leading dimensions.
Losses are in nats. Pair ``n`` enters the loss of its batch in two roles:

* as a *positive*, through its own loss;
* as a *negative*, by competing with every other pair, or with all but equal ones (:class:`SparingLoss`).

Removing it changes the batch loss by exactly the sum of the two::

    L(B) - L(B without n) = positive_n + negative_n

Source: the removal perturbation behind Eq. 3 of arXiv 2411.11667 (ECIF), which
keeps only its first order in the negative role and is printed with the softmax
inverted; :class:`fiftyone_ecif.influence.roles.Role` has all forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import logsigmoid
from typing_extensions import Self, override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.roles import Approximation, Role, parse_role


@dataclass(frozen=True)
class RoleGradient:
    """How the losses of the anchors ``k`` (rows of ``S``) carry a role of pair ``n``.

    The derivative of the role of pair ``n`` with respect to row ``k`` of ``S``
    is ``weight[k, n] * (e_n - mean[k])``, ``e_n`` being the n-th unit vector.

    Attributes:
        weight: shape ``(..., n, n)``.
        mean: shape ``(..., n, n)``; rows are probabilities, or zero.
    """

    weight: Tensor
    mean: Tensor

    def matrix(self) -> Tensor:
        """``weight`` as a matrix, shape ``(..., n, n)``."""
        return self.weight

    def aggregate(self, rows: Tensor) -> Tensor:
        """``sum_k weight[k, n] rows[k]``: what anchors have, numbers or vectors, at the pairs whose role they carry."""
        if rows.dim() < self.weight.dim():
            return (self.weight.mT @ rows[..., None])[..., 0]
        return self.weight.mT @ rows

    def scaled(self, factor: Tensor) -> RoleGradient:
        """The same with ``weight * factor``, ``factor`` of shape ``(n, n)``."""
        return replace(self, weight=self.weight * factor)

    def to(self, dtype: torch.dtype) -> Self:
        """The same, rounded."""
        return replace(self, weight=self.weight.to(dtype), mean=self.mean.to(dtype))

    def tangent(self, direction: Tensor) -> Tensor:
        """Change of the role of each pair when ``S`` moves along ``direction``, shape ``(n,)``."""
        expected = (self.mean * direction).sum(-1)
        return (self.weight * direction).sum(-2) - self.aggregate(expected)


@dataclass(frozen=True)
class SingleRoleGradient(RoleGradient):
    """A role gradient whose anchors carry the role of one pair each, which takes no products of matrices.

    Attributes:
        weight: shape ``(..., n)``: that of ``pair[k]`` at anchor ``k``; all others are zero.
        mean: as above.
        pair: shape ``(..., n)``.
    """

    pair: Tensor

    @override
    def matrix(self) -> Tensor:
        return torch.zeros_like(self.mean).scatter(-1, self.pair[..., None], self.weight[..., None])

    @override
    def aggregate(self, rows: Tensor) -> Tensor:
        weighted = (self.weight if rows.dim() == self.weight.dim() else self.weight[..., None]) * rows
        deep, size = self.pair.dim(), self.pair.shape[-1]
        stacked = torch.arange(self.pair.numel() // size, device=rows.device).view(*self.pair.shape[:-1], 1)
        flat = weighted.flatten(0, deep - 1)
        return torch.zeros_like(flat).index_add(0, (self.pair + size * stacked).flatten(), flat).view_as(weighted)

    @override
    def scaled(self, factor: Tensor) -> SingleRoleGradient:
        return replace(self, weight=self.weight * self._of_pair(factor))

    @override
    def tangent(self, direction: Tensor) -> Tensor:
        return self.aggregate(self._of_pair(direction) - (self.mean * direction).sum(-1))

    def _of_pair(self, matrix: Tensor) -> Tensor:
        return matrix.gather(-1, self.pair[..., None])[..., 0]


@dataclass(frozen=True)
class OwnRoleGradient(RoleGradient):
    """A role gradient whose anchors carry the role of their own pair.

    Attributes:
        weight: shape ``(..., n)``.
        mean: as above.
    """

    @override
    def matrix(self) -> Tensor:
        return torch.diag_embed(self.weight)

    @override
    def aggregate(self, rows: Tensor) -> Tensor:
        return (self.weight if rows.dim() == self.weight.dim() else self.weight[..., None]) * rows

    @override
    def scaled(self, factor: Tensor) -> OwnRoleGradient:
        return replace(self, weight=self.weight * _diagonal(factor))

    @override
    def tangent(self, direction: Tensor) -> Tensor:
        tangent: Tensor = self.weight * (_diagonal(direction) - vecdot(self.mean, direction))
        return tangent


@dataclass(frozen=True)
class LossCurvature:
    """The first and second derivative of a batch's loss with respect to ``S``.

    Attributes:
        slope: the gradient, shape ``(..., n, n)``.
        product: maps a change of ``S`` to the change of the slope, shapes ``(..., n, n)``.
    """

    slope: Tensor
    product: Callable[[Tensor], Tensor]


RoleGradients = tuple[list[RoleGradient], list[RoleGradient]]


class BatchLoss(ABC):
    """A loss of a batch of pairs as a function of its similarity matrix.

    Attributes:
        name: as in messages and records.
    """

    name: str

    @abstractmethod
    def pair_losses(self, similarity: Tensor) -> Tensor:
        """Each pair's share of the loss, shape ``(n,)``; the loss of the batch is their sum."""

    @abstractmethod
    def slope(self, similarity: Tensor, weights: Tensor) -> Tensor:
        """The gradient of the sum of the pair losses, each times its weight, with respect to ``S``, shape ``(n, n)``.

        Args:
            similarity: ``S``, shape ``(n, n)``.
            weights: shape ``(n,)``.
        """

    @abstractmethod
    def curvature(self, similarity: Tensor) -> LossCurvature:
        """The derivatives of the loss of the batch with respect to ``S``."""

    @abstractmethod
    def own_losses(self, similarity: Tensor) -> Tensor:
        """The value of each pair's positive role, shape ``(n,)``."""

    @abstractmethod
    def both_roles(self, similarity: Tensor, approximation: Approximation) -> RoleGradients:
        """The derivatives of both roles, rows of ``S`` as anchors; :meth:`role_gradients` leaves out what is not asked.

        Args:
            similarity: ``S``, shape ``(n, n)``.
            approximation: of the negative role, one that this loss has.
        """

    def role_gradients(self, similarity: Tensor, role: str = "exact") -> RoleGradients:
        """The derivatives of the roles with respect to ``S``, rows as anchors.

        Call it once with ``S`` (images as anchors) and once with its transpose
        (captions as anchors); a role's derivative is the sum of both.

        Args:
            similarity: ``S``, shape ``(n, n)``.
            role: one of :data:`fiftyone_ecif.influence.roles.ROLES`.

        Returns:
            ``(positive, negative)``: the role gradients that add up to each role

        Raises:
            EcifError: as :meth:`check_role`
        """
        approximation, part = self.check_role(role)
        positive, negative = self.both_roles(similarity, approximation)
        return ([] if part == "negative" else positive), ([] if part == "positive" else negative)

    def check_role(self, role: str) -> Role:
        """The role of a name, once it is known that this loss has it.

        Raises:
            EcifError: if there is no such role, or this loss has it not
        """
        return parse_role(role)

    def removal_tangents(self, similarity: Tensor, direction: Tensor, role: str = "exact") -> tuple[Tensor, Tensor]:
        """Derivative of both roles of every pair along ``direction``, in O(n^2).

        Args:
            similarity: ``S``, shape ``(n, n)``.
            direction: the derivative of ``S`` along some change of the model, same shape.
            role: one of :data:`fiftyone_ecif.influence.roles.ROLES`.

        Returns:
            ``(positive, negative)``, each of shape ``(n,)``.
        """
        parts = []
        for images, captions in zip(
            self.role_gradients(similarity, role), self.role_gradients(similarity.mT, role), strict=True
        ):
            part = torch.zeros_like(direction[..., 0, :])
            for role_gradient in images:
                part = part + role_gradient.tangent(direction)
            for role_gradient in captions:
                part = part + role_gradient.tangent(direction.mT)
            parts.append(part)
        return parts[0], parts[1]


class SoftmaxLoss(BatchLoss):
    """CLIP's loss: each image picks its caption among those of the batch, and each caption its image.

    With ``P`` the softmax of ``S`` over captions and ``Q`` over images::

        l_n = logsumexp_j S_nj + logsumexp_j S_jn - 2 S_nn
        positive_n = l_n
        negative_n = -sum_{k != n} [log(1 - P_kn) + log(1 - Q_nk)]   exact
                   ~  sum_{k != n} [P_kn + Q_nk]                      taylor
        printed as    sum_{k != n} [1 / P_kn + 1 / Q_nk]              as_printed

    ``open_clip.ClipLoss`` is the sum of the pair losses divided by ``2 n``.

    Two pairs that the model cannot tell apart, and what each role gains as their logits rise:

    >>> SoftmaxLoss().pair_losses(torch.zeros(2, 2))
    tensor([1.3863, 1.3863])
    >>> SoftmaxLoss().removal_tangents(torch.zeros(2, 2), torch.eye(2))
    (tensor([-1., -1.]), tensor([-1., -1.]))
    """

    name = "softmax"

    @override
    def pair_losses(self, similarity: Tensor) -> Tensor:
        return similarity.logsumexp(-1) + similarity.logsumexp(-2) - 2 * _diagonal(similarity)

    @override
    def slope(self, similarity: Tensor, weights: Tensor) -> Tensor:
        slope = weights[..., :, None] * similarity.softmax(-1)
        slope.addcmul_(weights[..., None, :], similarity.softmax(-2))
        _diagonal(slope).sub_(weights, alpha=2)
        return slope

    @override
    def curvature(self, similarity: Tensor) -> LossCurvature:
        by_image, by_caption = similarity.softmax(-1), similarity.softmax(-2)
        slope = by_image + by_caption
        _diagonal(slope).sub_(2)

        def product(direction: Tensor) -> Tensor:
            change = slope * direction
            _diagonal(change).add_(_diagonal(direction), alpha=2)
            change.addcmul_(by_image, vecdot(by_image, direction, dim=-1)[..., :, None], value=-1)
            return change.addcmul_(by_caption, vecdot(by_caption, direction, dim=-2)[..., None, :], value=-1)

        return LossCurvature(slope, product)

    @override
    def own_losses(self, similarity: Tensor) -> Tensor:
        return self.pair_losses(similarity)

    def both_roles(self, similarity: Tensor, approximation: Approximation) -> RoleGradients:
        """As in :meth:`BatchLoss.both_roles`.

        In the exact role no weight can overflow. An anchor gives more than half
        of its weight to at most one other pair; ``1 - P`` is then computed from
        the rest of the row and not by subtraction, so duplicate captions need
        no clamping. Likewise a pair's own softmax, near one for a pair that is
        learned well, is left out of its mean: ``e_n - P`` is ``1 - P_n`` times
        ``e_n`` less the mean of the others. An anchor that no other pair competes
        for has no weight.
        """
        mean = similarity.softmax(-1)
        each = _numbers(mean)
        others = _without_own(mean.clone())
        share = others.sum(-1)
        others = others / share.clamp_min(torch.finfo(share.dtype).tiny)[..., None]
        positive: list[RoleGradient] = [OwnRoleGradient(-share, others)]
        if mean.shape[-1] == 1:
            negative: list[RoleGradient] = [RoleGradient(torch.zeros_like(mean), mean)]
        elif approximation == "taylor":
            negative = [RoleGradient(_without_own(mean.clone()), mean)]
        elif approximation == "as_printed":
            inverse = mean.reciprocal().masked_fill(similarity.isneginf(), 0)
            negative = [RoleGradient(-_without_own(inverse), mean)]
        else:
            most, top = mean.max(-1)
            rest = similarity.scatter(-1, top[..., None], -torch.inf).softmax(-1)
            light = _without_own(mean.scatter(-1, top[..., None], 0))
            own = top == each
            negative = [
                RoleGradient(light / (1 - light), mean),
                SingleRoleGradient(most.masked_fill(own, 0), torch.where(own[..., None], mean, rest), top),
            ]
        return positive, negative


class SigmoidLoss(BatchLoss):
    """SigLIP's loss (arXiv 2303.15343): each image and caption of the batch either belong together or not.

    Removing a pair takes out the terms it is in, so both roles are exact as they
    stand, and ``taylor`` is the same::

        positive_n = softplus(-S_nn)
        negative_n = sum_{k != n} [softplus(S_nk) + softplus(S_kn)]

    The share of a pair in the loss is its positive term and half of its negative
    ones; ``open_clip.SigLipLoss`` is the mean of the shares.

    >>> SigmoidLoss().pair_losses(torch.zeros(2, 2))
    tensor([1.3863, 1.3863])
    """

    name = "sigmoid"

    @override
    def pair_losses(self, similarity: Tensor) -> Tensor:
        others = -logsigmoid(-similarity)  # torch's softplus is off by 2e-9 above 20
        negative = others.sum(-2) + others.sum(-1) - 2 * _diagonal(others)
        return self.own_losses(similarity) + negative / 2

    @override
    def slope(self, similarity: Tensor, weights: Tensor) -> Tensor:
        slope = (weights[..., :, None] + weights[..., None, :]) / 2 * similarity.sigmoid()
        _diagonal(slope).copy_(-weights * (-_diagonal(similarity)).sigmoid())
        return slope

    @override
    def curvature(self, similarity: Tensor) -> LossCurvature:
        slope, rest = similarity.sigmoid(), (-similarity).sigmoid()  # 1 - slope would lose what is small
        curved = slope * rest
        _diagonal(slope).copy_(-_diagonal(rest))
        return LossCurvature(slope, curved.mul)

    @override
    def own_losses(self, similarity: Tensor) -> Tensor:
        return -logsigmoid(_diagonal(similarity))

    @override
    def check_role(self, role: str) -> Role:
        found = super().check_role(role)
        if found.approximation == "as_printed":
            raise EcifError(f"{role=} is a formula for the softmax loss; this model has a sigmoid loss")
        return found

    @override
    def both_roles(self, similarity: Tensor, approximation: Approximation) -> RoleGradients:
        none = torch.zeros_like(similarity)
        own = -(-_diagonal(similarity)).sigmoid() / 2  # half with images, half with captions as anchors
        positive: list[RoleGradient] = [OwnRoleGradient(own, none)]
        negative: list[RoleGradient] = [RoleGradient(_without_own(similarity.sigmoid()), none)]
        return positive, negative


class SparingLoss(BatchLoss):
    """A loss in which equal pairs are not each other's negatives: logits between them are taken as -infinity.

    Args:
        loss: of a batch in which all pairs compete.
        equal: which pairs do not, bool, symmetric and False on the diagonal, shape ``(..., n, n)``.
    """

    def __init__(self, loss: BatchLoss, equal: Tensor) -> None:
        self.name, self._loss, self._equal = loss.name, loss, equal

    @override
    def pair_losses(self, similarity: Tensor) -> Tensor:
        return self._loss.pair_losses(self._spared(similarity))

    @override
    def slope(self, similarity: Tensor, weights: Tensor) -> Tensor:
        return self._loss.slope(self._spared(similarity), weights)

    @override
    def curvature(self, similarity: Tensor) -> LossCurvature:
        return self._loss.curvature(self._spared(similarity))

    @override
    def own_losses(self, similarity: Tensor) -> Tensor:
        return self._loss.own_losses(self._spared(similarity))

    @override
    def check_role(self, role: str) -> Role:
        return self._loss.check_role(role)

    @override
    def both_roles(self, similarity: Tensor, approximation: Approximation) -> RoleGradients:
        return self._loss.both_roles(self._spared(similarity), approximation)

    def _spared(self, similarity: Tensor) -> Tensor:
        return similarity.masked_fill(self._equal, -torch.inf)


def equal_pairs(twins: Tensor, rows: Tensor) -> Tensor:
    """Which pairs of a batch share their image or their caption, themselves included, bool, shape ``(..., n, n)``.

    >>> equal_pairs(torch.tensor([[0, 0], [0, 1], [1, 2]]), torch.tensor([0, 1, 2])).tolist()
    [[True, True, False], [True, True, False], [False, False, True]]

    Args:
        twins: a number for the image and one for the caption of each row, shape ``(N, 2)``, the same where those are.
        rows: of the batch, shape ``(..., n)``.
    """
    found = twins[rows.to(twins.device)]
    return (found[..., :, None, :] == found[..., None, :, :]).any(-1)


def others_equal(twins: Tensor, rows: Tensor) -> Tensor:
    """As :func:`equal_pairs`, without the pairs themselves: what :class:`SparingLoss` takes."""
    return _without_own(equal_pairs(twins, rows))


def _diagonal(matrix: Tensor) -> Tensor:
    """A view, shape ``(..., n)``."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def _without_own(matrix: Tensor) -> Tensor:
    """The same matrix with zeros on its diagonal."""
    _diagonal(matrix).zero_()
    return matrix


def _numbers(matrix: Tensor) -> Tensor:
    """The number of each row in its batch, shape ``(..., n)``."""
    return torch.arange(matrix.shape[-1], device=matrix.device).expand(matrix.shape[:-1])
