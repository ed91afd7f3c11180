"""Removal gradients in any scope, by reverse mode, without a backward pass for each pair.

The removal of pair ``n`` pulls the embedding of every pair ``k`` of its batch,
by a vector that is known in closed form (``losses``). Each embedding
depends on its own image or caption only, so it is back-propagated alone, for
the few pairs that pull it most at once, and the results go to those pairs. How
few is chosen by the share of the pulls' length that is kept; with as many as
the batch has it is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.functional import normalize

from fiftyone_ecif.influence.losses import BatchLoss, RoleGradient
from fiftyone_ecif.influence.scope import Scope

#: Share of the length of all pulls on an embedding that is kept.
KEPT = 0.999
_CHUNK = 32  # gradients at a time, of all parameters each


def truncated_gradients(
    scope: Scope, theta: Tensor, batch: Any, role: str = "exact", basis: Tensor | None = None, kept: float = KEPT
) -> tuple[tuple[Tensor, Tensor], float]:
    """Gradients of both roles of every pair of a batch.

    Args:
        scope: what varies.
        theta: its parameters, shape ``(p,)``.
        batch: images and captions, ``n`` of each.
        role ("exact"): see ``roles.ROLES``.
        basis (None): directions to keep coordinates of, orthonormal columns,
            shape ``(p, r)``; by default all of the gradient.
        kept (0.999): the least share of the length of the pulls on an embedding to
            keep; 1 keeps all.

    Returns:
        the gradients of the positive and the negative role, ``(n, r)`` each, and
        the share of an embedding's back-propagations that this took, 1 being exact
    """
    with torch.no_grad():
        images, captions = (normalize(part, dim=1) for part in scope.embed(theta, batch))
        cosine = images @ captions.T
        similarity = scope.logits(theta, cosine)
        scale = (scope.logits(theta, cosine + 1) - similarity)[0, 0]
        loss = scope.loss_of(batch)
        by_image = loss.role_gradients(similarity, role)
        by_caption = loss.role_gradients(similarity.T, role)
        count = len(cosine)
        pulled = theta.new_zeros(2, 2, count, count, images.shape[1])  # role, tower, removed pair, pulled pair
        for number, (of_images, of_captions) in enumerate(zip(by_image, by_caption, strict=True)):
            for role_gradient in of_images:
                anchors, others = _pulled(role_gradient, images, captions)
                pulled[number, 0] += scale * anchors
                pulled[number, 1] += scale * others
            for role_gradient in of_captions:
                anchors, others = _pulled(role_gradient, captions, images)
                pulled[number, 1] += scale * anchors
                pulled[number, 0] += scale * others
    width = len(theta) if basis is None else basis.shape[1]
    gradients = theta.new_zeros(2, count, width)
    spent = 0
    for tower, (inputs, embed) in enumerate(zip(batch[:2], (scope.embed_images, scope.embed_captions), strict=True)):
        lengths = pulled[:, tower].norm(dim=3).square().sum(0).sqrt()  # (removed, pulled)
        heaviest = lengths.sort(dim=0, descending=True)
        share = heaviest.values.cumsum(0) / lengths.sum(0).clamp_min(torch.finfo(lengths.dtype).tiny)
        needed = int((share < kept).sum(0).max().item()) + 1
        chosen = heaviest.indices[: min(needed, count)]  # (m, pulled)
        spent += len(chosen)
        for k in range(count):
            rows = _pull_back(embed, theta, inputs[k], pulled[:, tower, chosen[:, k], k].flatten(0, 1), basis)
            gradients.index_add_(1, chosen[:, k], rows.unflatten(0, (2, -1)))  # type: ignore[no-untyped-call]
    direct = _along_logits(scope, loss, theta, cosine, role)
    if direct is not None:
        gradients += direct if basis is None else direct @ basis
    return (gradients[0], gradients[1]), spent / (2 * count)


def _pulled(role_gradient: RoleGradient, anchors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of a role of every pair with respect to the embeddings, ``(removed, pulled, d)`` each.

    Row ``k`` of ``S`` moves with anchor ``k`` and with all others: removing pair
    ``n`` pulls anchor ``k`` by ``weight[k, n] (v_n - mean_k V)``, and other ``j``
    by ``sum_k weight[k, n] ([j = n] - mean[k, j]) u_k``.
    """
    weight, mean = role_gradient.matrix(), role_gradient.mean
    to_anchors = weight.T[:, :, None] * (others[:, None] - (mean @ others)[None])
    to_others = -torch.einsum("kn,kj,kd->njd", weight, mean, anchors)
    own = torch.arange(len(weight))
    to_others[own, own] += weight.T @ anchors
    return to_anchors, to_others


def _pull_back(
    embed: Callable[[Tensor, Tensor], Tensor], theta: Tensor, sample: Tensor, cotangents: Tensor, basis: Tensor | None
) -> Tensor:
    """Gradients of one embedding along some cotangents, ``(m, d)`` to ``(m, r)``."""
    pull_back = vjp(lambda at: normalize(embed(at, sample[None]), dim=1)[0], theta)[1]

    def one(cotangent: Tensor) -> Tensor:
        gradient: Tensor = pull_back(cotangent)[0]
        return gradient if basis is None else gradient @ basis

    rows: Tensor = torch.vmap(one, chunk_size=_CHUNK)(cotangents)
    return rows


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
