"""Removal gradients of the heads, projected, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.heads import Batch, HeadScope
from fiftyone_ecif.influence.losses import RoleGradient


@dataclass(frozen=True)
class HeadProjection:
    """The projection of one head's gradient, shape ``(w, d)`` to ``(a, b)``.

    Attributes:
        input: shape ``(w, a)``.
        output: shape ``(d, b)``.
    """

    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class _Side:
    """One tower of a batch, and what its gradient is projected by."""

    embedding: Tensor  # (n, d), of unit length
    scaled_input: Tensor  # (n, a): scale * projected features / |embedding before normalisation|
    output: Tensor  # (d, b)


def removal_gradients(
    scope: HeadScope,
    theta: Tensor,
    batch: Batch,
    projections: tuple[HeadProjection, HeadProjection],
    role: str = "exact",
    embeddings: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Projected gradients of both roles of every pair of a batch, in the precision of what they are projected by.

    What tells the pairs apart, their similarity and its softmax, is in that of ``theta``.

    Args:
        scope: the head scope.
        theta: its parameters, shape ``(p,)``.
        batch: image and caption features, ``(n, w_image)`` and ``(n, w_text)``.
        projections: of the image head and of the text head.
        role ("exact"): see ``roles.ROLES``.
        embeddings (None): of the batch, ``(n, d)`` each, if they are known.

    Returns:
        ``(positive, negative)``, each of shape ``(n, r)`` with ``r`` the sum of
        both heads' ``a * b``; the image head's block comes first, and the
        temperature, if it is in scope, last.
    """
    scale, kept = scope.scale(theta), projections[0].input.dtype
    found = scope.embed(theta, batch) if embeddings is None else embeddings
    units = [normalize(side, dim=-1) for side in found]
    cosine = units[0] @ units[1].mT
    similarity = scope.logits(theta, cosine)
    images, texts = (
        _Side(
            unit.to(kept),
            (scale * (features.to(kept) @ head.input) / side.norm(dim=-1, keepdim=True)).to(kept),
            head.output,
        )
        for features, side, unit, head in zip(scope.inputs(batch), found, units, projections, strict=True)
    )
    rounded = cosine.to(kept)
    by_image, by_text = _Anchors(images, texts, rounded), _Anchors(texts, images, rounded.mT)
    roles, loss = [], scope.loss_of(batch)
    for of_images, of_captions in zip(
        loss.role_gradients(similarity, role), loss.role_gradients(similarity.mT, role), strict=True
    ):
        gradients = [by_image.gradients(role_gradient.to(kept)) for role_gradient in of_images]
        gradients += [by_text.gradients(role_gradient.to(kept))[::-1] for role_gradient in of_captions]
        nothing = (torch.zeros_like(by_image.along_anchor), torch.zeros_like(by_image.along_other))
        blocks = [sum(parts[1:], start=parts[0]) for parts in zip(*(gradients or [nothing]), strict=True)]
        roles.append(torch.cat(blocks, dim=-1))
    if scope.with_scale:
        along_scale = loss.removal_tangents(similarity, scale * cosine, role)
        roles = [
            torch.cat([block, part[..., None].to(kept)], dim=-1) for block, part in zip(roles, along_scale, strict=True)
        ]
    return roles[0], roles[1]


def _outer(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Row-wise outer products, ``(n, a)`` and ``(n, b)`` to ``(n, a * b)``."""
    return (inputs[..., :, None] * outputs[..., None, :]).flatten(-2)


class _Anchors:
    """What role gradients contribute to the projected gradients of the anchors' head and of the others'.

    With ``u`` the anchors' and ``v`` the others' embeddings, the role of pair
    ``n`` pulls anchor ``k`` by ``weight[k, n] (v_n - mean_k V)`` and each other
    ``j`` by ``weight[k, n] ([j = n] - mean[k, j]) u_k``; the normalisation takes
    off the part along the embedding itself. Weights and means are multiplied
    with projected coordinates only, not with embeddings of full width.
    """

    def __init__(self, anchor: _Side, other: _Side, cosine: Tensor) -> None:
        self.anchor, self.other, self.cosine = anchor, other, cosine
        # embeddings in the output coordinates of the anchors' head, and of the others'
        self.u_anchor, self.v_anchor = (side.embedding @ anchor.output for side in (anchor, other))
        self.u_other, self.v_other = (side.embedding @ other.output for side in (anchor, other))
        self.along_anchor = _outer(anchor.scaled_input, self.u_anchor)
        self.along_other = _outer(other.scaled_input, self.v_other)

    def gradients(self, role_gradient: RoleGradient) -> tuple[Tensor, Tensor]:
        """Of the anchors' head and of the others', ``(n, a * b)`` each."""
        to_centre, shared = self._of_mean(role_gradient.mean)
        along = role_gradient.scaled(self.cosine)
        to_anchor = (
            _outer(role_gradient.aggregate(self.anchor.scaled_input), self.v_anchor)
            - role_gradient.aggregate(to_centre)
            - along.aggregate(self.along_anchor)
        )
        length = along.aggregate(torch.ones_like(self.cosine[..., :1]))
        own = role_gradient.aggregate(self.u_other) - length * self.v_other
        to_other = _outer(self.other.scaled_input, own) - role_gradient.aggregate(shared)
        return to_anchor, to_other

    def _of_mean(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """What the mean of the others does to the anchor, and to the others."""
        weighted = mean * self.cosine
        off_centre = mean @ self.v_anchor - weighted.sum(-1, keepdim=True) * self.u_anchor
        shared = _outer(mean @ self.other.scaled_input, self.u_other) - weighted @ self.along_other
        return _outer(self.anchor.scaled_input, off_centre), shared
