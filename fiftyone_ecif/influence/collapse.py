"""Embeddings that shrink to nothing, near which no derivative can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from fiftyone_ecif.influence.objective import ContrastiveLoss

#: The length of an embedding over the median, below which no score can be trusted.
COLLAPSED = 1e-3


def smallest_norm(objective: ContrastiveLoss, theta: Tensor) -> float:
    """The shortest embedding over the median, before normalisation; the smaller of both towers.

    Args:
        objective: over the pairs.
        theta: the scope's parameters, shape ``(p,)``.
    """
    theta = objective.placed(theta)
    with torch.no_grad():
        own = [
            torch.stack([part.norm(dim=-1).flatten() for part in objective.scope.embed(theta, batch)], dim=1)
            for batch in objective.own_stacks()
        ]
    norms = torch.cat(objective.processes.gather([part.cpu() for part in own]))
    return (norms.min(0).values / norms.median(0).values).min().item()
