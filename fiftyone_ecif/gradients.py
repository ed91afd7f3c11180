"""Removal gradients of every pair in the head scope, projected, without a backward pass.

The derivative of a role with respect to ``S`` is known (``contrastive``), the
step from ``S`` through the normalisation to a head is an outer product with the
cached features, so the gradients of all pairs of a batch are matrix products.
They are kept projected, ``input.T @ gradient @ output`` for each head: LoGra's
Kronecker projection (arXiv 2405.13954), applied to the removal gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .contrastive import Pull, removal_pulls
from .heads import Batch, HeadScope


@dataclass(frozen=True)
class HeadProjection:
    """The projection of one head's gradient, shape ``(w, d)`` to ``(a, b)``.

    Attributes:
        input: shape ``(w, a)``.
        output: shape ``(d, b)``.
    """

    input: Tensor
    output: Tensor


def principal_projections(
    scope: HeadScope, theta: Tensor, images: Tensor, texts: Tensor, rank: int = 16
) -> tuple[HeadProjection, HeadProjection]:
    """Projections on the directions in which the pairs vary most.

    On the input side those are the principal directions of a head's features;
    on the output side those of the other tower's embeddings, towards which the
    contrastive loss pulls.

    Args:
        scope: the head scope.
        theta: its parameters, shape ``(p,)``.
        images: image features, shape ``(N, w_image)``.
        texts: caption features, shape ``(N, w_text)``.
        rank (16): directions to keep on either side of each head, at most.

    Returns:
        the projections of the image head and of the text head
    """
    inputs = [_principal_directions(features.double(), rank) for features in (images, texts)]
    image_output, text_output = (
        _principal_directions(normalize(features.double() @ head, dim=1), rank)
        for features, head in zip((images, texts), scope.split(theta), strict=True)
    )
    return HeadProjection(inputs[0], text_output), HeadProjection(inputs[1], image_output)


def _principal_directions(rows: Tensor, rank: int) -> Tensor:
    directions: Tensor = torch.linalg.eigh(rows.T @ rows).eigenvectors
    return directions[:, -rank:]


@dataclass(frozen=True)
class _Side:
    """One tower of a batch: unit embeddings and projected pieces of its gradient."""

    embedding: Tensor  # (n, d)
    lever: Tensor  # (n, a): scale * projected features / |embedding before normalisation|
    output: Tensor  # (d, b)

    def outer(self, levers: Tensor, pulls: Tensor) -> Tensor:
        """Row-wise outer products with the projected pulls, shape ``(n, a * b)``."""
        return torch.einsum("ka,kb->kab", levers, pulls @ self.output).flatten(1)

    @property
    def width(self) -> int:
        return self.lever.shape[1] * self.output.shape[1]


def removal_gradients(
    scope: HeadScope, theta: Tensor, batch: Batch, projections: tuple[HeadProjection, HeadProjection]
) -> tuple[Tensor, Tensor]:
    """Projected gradients of both roles of every pair of a batch.

    Args:
        scope: the head scope.
        theta: its parameters, shape ``(p,)``.
        batch: image and caption features, ``(n, w_image)`` and ``(n, w_text)``.
        projections: of the image head and of the text head.

    Returns:
        ``(positive, negative)``, each of shape ``(n, r)`` with ``r`` the sum of
        both heads' ``a * b``; the image head's block comes first.
    """
    images, texts = (
        _side(features, head, scope.scale, projection)
        for features, head, projection in zip(batch, scope.split(theta), projections, strict=True)
    )
    cosine = images.embedding @ texts.embedding.T
    roles = []
    for image_pulls, text_pulls in zip(
        removal_pulls(scope.scale * cosine), removal_pulls(scope.scale * cosine.T), strict=True
    ):
        image_block = torch.zeros(len(cosine), images.width, dtype=cosine.dtype, device=cosine.device)
        text_block = torch.zeros(len(cosine), texts.width, dtype=cosine.dtype, device=cosine.device)
        for pull in image_pulls:
            anchors, others = _pull_gradients(pull, images, texts, cosine)
            image_block, text_block = image_block + anchors, text_block + others
        for pull in text_pulls:
            anchors, others = _pull_gradients(pull, texts, images, cosine.T)
            image_block, text_block = image_block + others, text_block + anchors
        roles.append(torch.cat([image_block, text_block], dim=1))
    return roles[0], roles[1]


def _side(features: Tensor, head: Tensor, scale: float, projection: HeadProjection) -> _Side:
    embedding = features @ head
    lever = scale * (features @ projection.input) / embedding.norm(dim=1, keepdim=True)
    return _Side(normalize(embedding, dim=1), lever, projection.output)


def _pull_gradients(pull: Pull, anchor: _Side, other: _Side, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """What one pull contributes to the gradients of the anchors' head and of the others'.

    With ``u`` the anchors' and ``v`` the others' embeddings, the role of pair
    ``n`` pulls anchor ``k`` by ``weight[k, n] (v_n - mean_k V)`` and each other
    ``j`` by ``weight[k, n] ([j = n] - mean[k, j]) u_k``; the normalisation takes
    off the part along the embedding itself.
    """
    u, v = anchor.embedding, other.embedding
    weight, mean = pull.weight, pull.mean

    centre = mean @ v
    off_centre = centre - (u * centre).sum(1, keepdim=True) * u
    to_anchor = (
        anchor.outer(weight.T @ anchor.lever, v)
        - weight.T @ anchor.outer(anchor.lever, off_centre)
        - (weight * cosine).T @ anchor.outer(anchor.lever, u)
    )

    pulled = weight.T @ u
    own = pulled - (v * pulled).sum(1, keepdim=True) * v
    shared = other.outer(mean @ other.lever, u) - (mean * cosine) @ other.outer(other.lever, v)
    to_other = other.outer(other.lever, own) - weight.T @ shared
    return to_anchor, to_other
