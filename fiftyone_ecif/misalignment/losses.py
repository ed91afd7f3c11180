"""Losses of pairs as the audited model has them, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fiftyone_ecif.influence.objective import random_partition
from fiftyone_ecif.misalignment.embeddings import DetectorInputs

_PARTITIONS = 10


def neg_clip_losses(inputs: DetectorInputs) -> Tensor:
    """How much better other images and captions fit: the mean over random partitions, shape ``(N,)``, float64.

    ``(logsumexp_j z_ij + logsumexp_j z_ji) / 2 - z_ii`` with the logits ``z`` of a
    batch, where pairs that share the image or the caption do not compete.

    Args:
        inputs: the pairs and the model; batches are of the size of its largest.
    """
    scope, space, theta = inputs.objective.scope, inputs.model, inputs.theta.cpu()
    size = max(len(rows) for rows in inputs.batches.partition)
    total = torch.zeros(inputs.objective.pairs, dtype=torch.float64)
    for number in range(_PARTITIONS):
        for rows in random_partition(inputs.objective.pairs, size, inputs.seed + number):
            similarity = scope.logits(theta, (space.images[rows] @ space.captions[rows].T).double())
            own = similarity.diagonal()
            for group in (inputs.duplicates.image, inputs.duplicates.caption):
                of = torch.from_numpy(group)[rows]
                false = (of[:, None] == of) & ~torch.eye(len(rows), dtype=torch.bool)
                similarity = similarity.masked_fill(false, -torch.inf)
            total[rows] += (similarity.logsumexp(0) + similarity.logsumexp(1)) / 2 - own
    return total / _PARTITIONS


def own_losses(inputs: DetectorInputs) -> Tensor:
    """Each pair's own loss in the batch that it was trained in, in nats, shape ``(N,)``, float64."""
    scope, space, theta = inputs.objective.scope, inputs.model, inputs.theta.cpu()
    losses = torch.zeros(inputs.objective.pairs, dtype=torch.float64)
    for rows in inputs.batches.partition:
        cosine = (space.images[rows] @ space.captions[rows].T).double()
        losses[rows] = scope.loss.own_losses(scope.logits(theta, cosine))
    return losses
