"""Whether weights were fitted to the very pairs that they are asked about."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.heads import HeadScope, head_inputs, head_outputs

_OPPOSED = -1.5  # standard errors
_BATCH = 64  # of those tried (64, 256, 1024) the one that tells fitted weights from others most clearly


def was_fitted(agreement: float) -> bool:
    """Whether weights at which training steps agree so little have been fitted to the pairs."""
    return agreement < _OPPOSED


def agreement_of_steps(scope: HeadScope, theta: Tensor, images: Tensor, texts: Tensor) -> float:
    """How far the training steps that pairs ask for go the same way, in standard errors.

    With ``g_i`` the part of the gradient of the batches' loss in the heads that goes through pair ``i``, it is the sum
    over ``i != j`` of ``g_i . g_j``, over its standard deviation if they had nothing to do with each other. Steps of
    pairs that weights were not fitted to go the same way, in as far as there is something to be learned from them.
    At a minimum over the pairs the steps cancel: the sum is minus that of ``|g_i|^2``.

    Args:
        scope: the heads.
        theta: their weights, shape ``(p,)``.
        images: features, shape ``(n, w)``.
        texts: of their captions, shape ``(n, v)``.
    """
    features, heads = (images.to(theta), texts.to(theta)), scope.split(theta)
    embeddings = [head_outputs(*side).detach().requires_grad_() for side in zip(features, heads, strict=True)]
    batches = zip(*(torch.split(normalize(side, dim=1), _BATCH) for side in embeddings), strict=True)
    loss = torch.stack([scope.loss.pair_losses(scope.logits(theta, u @ v.T)).sum() for u, v in batches]).sum()
    slopes = torch.autograd.grad(loss, embeddings)
    inputs = [head_inputs(*side) for side in zip(features, heads, strict=True)]
    products = sum((x @ x.T) * (slope @ slope.T) for x, slope in zip(inputs, slopes, strict=True))
    assert isinstance(products, Tensor)
    products.fill_diagonal_(0)
    spread = products.square().sum().mul(2).sqrt().clamp_min(torch.finfo(products.dtype).tiny)
    return float(products.sum() / spread)
