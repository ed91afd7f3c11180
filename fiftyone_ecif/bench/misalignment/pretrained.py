"""A stand-in for a pretrained CLIP, from packages alone: a classifier and a sentence encoder, joined without training.

The image head is what a classifier of ImageNet knows of its classes, written in the
sentence encoder's space: the classifier's weights times the embeddings of the classes'
names. Half of the classes are used, so pairs of the other half are zero-shot.
"""

from __future__ import annotations

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.bench.misalignment.frozen_towers import class_weights, frozen_features
from fiftyone_ecif.influence.heads import HeadScope

_WIDTH = 96  # directions that are kept
_SCALE = 30.0


def pretrained_heads(
    images: Tensor, texts: Tensor, audited: Tensor, any_image: str, seed: int
) -> tuple[HeadScope, tuple[Tensor, Tensor]]:
    """Heads made of half of the classes of ImageNet, and what they take, shape ``(N, 96)`` each.

    Args:
        images: features by the frozen towers, shape ``(N, 1280)``.
        texts: likewise, shape ``(N, 384)``.
        audited: rows whose mean is taken off the images, and whose embeddings have a median length of 1.
        any_image: a file, as towers take pairs; it plays no part.
        seed: fixes which half.

    Raises:
        EcifError: if the towers are not installed
    """
    info, weights = ImageNetInfo("imagenet-1k"), class_weights().double()
    classes = [info.index_to_description(place).split(",")[0].lower() for place in range(len(weights))]
    _, names = frozen_features([any_image] * len(classes), [f"a photo of a {name}" for name in classes])
    seen = torch.from_numpy(np.random.default_rng(seed).permutation(len(classes))[: len(classes) // 2])
    mean = names[seen].double().mean(0)
    head = (weights[seen] - weights[seen].mean(0)).T @ normalize(names[seen].double() - mean, dim=1)
    centred, named = images.double() - images[audited].double().mean(0), texts.double() - mean
    left, strength, right = torch.linalg.svd(head, full_matrices=False)
    strength = strength[:_WIDTH] / (centred[audited] @ head).norm(dim=1).median()
    sides = centred @ left[:, :_WIDTH], (named @ right.T)[:, :_WIDTH] / named[audited].norm(dim=1).median()
    scope = HeadScope(torch.diag(strength), torch.eye(len(strength), dtype=torch.float64), _SCALE)
    return scope, (sides[0].float(), sides[1].float())
