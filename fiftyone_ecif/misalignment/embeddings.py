"""Pairs as the audited model sees them: unit embeddings, and who is near whom."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.heads import FeatureBatches
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.misalignment.duplicates import Duplicates
from fiftyone_ecif.misalignment.neighbours import Neighbours, nearest

NEIGHBOURS = 30
_FEW_NEIGHBOURS = 5  # of lemon_z
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class DetectorInputs:
    """Pairs and the model that is asked about them.

    Attributes:
        objective: over the pairs, in the heads scope.
        theta: the parameters, shape ``(p,)``.
        duplicates: among the pairs.
        gradients: of the pairs, if the model was trained on them.
        influence: of the pairs on a validation set, shape ``(N,)``, if there is one.
        seed: of partitions and folds.
        device: where neighbours are looked for.
        trained: whether the weights as loaded are known to have been trained on the pairs.
    """

    objective: ContrastiveLoss
    theta: Tensor
    duplicates: Duplicates
    gradients: CachedGradients | None = None
    influence: np.ndarray | None = None
    seed: int = 0
    device: str = "cpu"
    trained: bool = False

    @property
    def batches(self) -> FeatureBatches:
        """The features of the pairs, by the batches of the objective."""
        assert isinstance(self.objective.batches, FeatureBatches)
        return self.objective.batches

    def embeddings(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and captions, float32, on the CPU, shape ``(N, d)`` each."""
        scope, batches = self.objective.scope, self.batches
        found: list[Tensor] = []
        for start in range(0, len(batches.images), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            parts = (
                scope.embed_images(theta, batches.images[rows].to(theta)),
                scope.embed_captions(theta, batches.texts[rows].to(theta)),
            )
            units = [normalize(part, dim=1).float().cpu() for part in parts]
            found = found or [part.new_empty(len(batches.images), part.shape[1]) for part in units]
            for whole, part in zip(found, units, strict=True):
                whole[rows] = part
        return found[0], found[1]

    @cached_property
    def model(self) -> EmbeddingSpace:
        """The pairs as the audited model sees them."""
        return EmbeddingSpace(*self.embeddings(self.theta), torch.from_numpy(self.duplicates.pair), self.device)


class EmbeddingSpace:
    """Unit embeddings of pairs and who is near whom.

    Args:
        images: shape ``(N, d)``.
        captions: likewise.
        group: numbers of shape ``(N,)``; copies of a pair, which are not to vouch for it, share one.
        device ("cpu"): where neighbours are looked for.
    """

    def __init__(self, images: Tensor, captions: Tensor, group: Tensor, device: str = "cpu") -> None:
        self.images, self.captions, self.group, self.device = images, captions, group, device

    @cached_property
    def distance(self) -> Tensor:
        """``1 - s_ii``, shape ``(N,)``."""
        return 1 - (self.images * self.captions).sum(1)

    @cached_property
    def neighbours(self) -> tuple[Neighbours, Neighbours]:
        """The nearest images and the nearest captions."""
        images, captions = (nearest(side, NEIGHBOURS, self.group, self.device) for side in (self.images, self.captions))
        return images, captions

    def disagreement(self, count: int, near: float = 0.1, doubt: float = 5.0) -> tuple[Tensor, Tensor]:
        """LEMoN's terms ``a`` and ``b``, shape ``(N,)`` each: what nearest images and captions say.

        Args:
            count: neighbours.
            near (0.1): how much less a neighbour counts that is farther away.
            doubt (5.0): how much less one counts whose own image and caption are far apart.
        """
        terms = []
        for side, other in zip(self.neighbours, (self.captions, self.images), strict=True):
            rows, similarity = side.rows[:, :count], side.similarity[:, :count]
            trust = torch.exp(-doubt * self.distance[rows]) * torch.exp(-near * (1 - similarity))
            terms.append((self.other_distance(side, other, count) * trust).mean(1))
        return terms[0], terms[1]

    def other_distance(self, near: Neighbours, other: Tensor, count: int) -> Tensor:
        """Distance to each neighbour on the other side, shape ``(N, count)``."""
        parts = [
            1 - torch.einsum("nd,nkd->nk", own, other[rows[:, :count]])
            for own, rows in zip(torch.split(other, ROWS_AT_ONCE), torch.split(near.rows, ROWS_AT_ONCE), strict=True)
        ]
        return torch.cat(parts)

    def lemon_z(self) -> Tensor:
        """The sum of LEMoN's three terms, each standardised, shape ``(N,)``: higher = more suspicious."""
        a, b = self.disagreement(_FEW_NEIGHBOURS)
        return standardised(self.distance) + standardised(a) + standardised(b)


def standardised(values: Tensor) -> Tensor:
    """Values less their mean, over their standard deviation; zeros where they do not vary."""
    return (values - values.mean()) / values.std(correction=0).clamp_min(torch.finfo(values.dtype).tiny)
