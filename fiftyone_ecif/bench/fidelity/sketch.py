"""Removal gradients by a forward-mode sketch: the way that was measured and not taken.

A coordinate of a projected gradient is the derivative of the roles along a
direction: one ``torch.func.jvp`` a batch for all its pairs, exact, whatever the
batch size, but one for each direction. ``tower_gradients`` is the other way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from fiftyone_ecif.influence.scope import Scope


def sketched_gradients(
    scope: Scope, theta: Tensor, batch: Any, basis: Tensor, role: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Projected gradients of both roles of every pair of a batch, ``(n, r)`` each; ``basis`` is ``(p, r)``."""
    columns = []
    for direction in basis.T:
        along = direction.contiguous()
        similarity, moved = jvp(lambda at: scope.similarity(at, batch), (theta,), (along,))[:2]
        columns.append(scope.loss.removal_tangents(similarity, moved, role))
    positive, negative = (torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))
    return positive, negative
