"""Exact removal gradients by reverse mode, truncated to the heaviest negatives of each anchor.

The other way to a pair's removal gradient in a deep scope, beside the
forward-mode sketch of ``gradients``. Anchor ``k`` is back-propagated once for
each of its ``m`` heaviest pulls, alone through its tower, and the result goes to
the pair that pulls. With ``m`` the size of the batch it is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.functional import normalize

from ..scope import Scope


def truncated_gradients(scope: Scope, theta: Tensor, batch: Any, pulls: int) -> tuple[Tensor, float]:
    """Removal gradients of a batch, both roles summed.

    Args:
        scope: what varies.
        theta: its parameters, shape ``(p,)``.
        batch: images and captions.
        pulls: how many pairs, by the size of their pull, each anchor is
            back-propagated for.

    Returns:
        the gradients, shape ``(n, p)``, and the share of the pulls' size that is kept
    """
    embeddings = [normalize(part, dim=1) for part in scope.embed(theta, batch)]
    cosine = embeddings[0] @ embeddings[1].T

    # how the removal of each pair pulls each embedding: (pair n, anchor k, d)
    def removals(images: Tensor, captions: Tensor) -> Tensor:
        losses = scope.loss.pair_losses(scope.logits(theta, images @ captions.T))
        kept = []
        for n in range(len(cosine)):
            rows = torch.arange(len(cosine)) != n
            left = scope.loss.pair_losses(scope.logits(theta, images[rows] @ captions[rows].T))
            kept.append(losses.sum() - left.sum())
        return torch.stack(kept)

    upstream = torch.func.jacrev(removals, argnums=(0, 1))(*embeddings)
    gradients, kept, total = torch.zeros(len(cosine), len(theta), dtype=theta.dtype), 0.0, 0.0
    for side, (pull, inputs, embed) in enumerate(
        zip(upstream, batch, (scope.embed_images, scope.embed_captions), strict=True)
    ):
        sizes = pull.norm(dim=2)  # (n, k)
        chosen = sizes.topk(min(pulls, len(cosine)), dim=0).indices  # (m, k)
        total += sizes.sum().item()
        kept += sizes.gather(0, chosen).sum().item()

        def one(sample: Tensor, cotangents: Tensor, embed: Any = embed) -> Tensor:
            _, pull_back = vjp(lambda at: normalize(embed(at, sample[None]), dim=1)[0], theta)
            rows: Tensor = torch.vmap(lambda cotangent: pull_back(cotangent)[0])(cotangents)
            return rows

        anchors = torch.arange(len(cosine))
        for k in anchors.tolist():
            rows = one(inputs[k], pull[chosen[:, k], k])
            gradients.index_add_(0, chosen[:, k], rows)
        assert side < 2
    return gradients, kept / total
