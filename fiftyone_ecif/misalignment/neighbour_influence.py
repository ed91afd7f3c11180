"""What a pair does to the loss of pairs that are like it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.damping import damped
from fiftyone_ecif.misalignment.embeddings import ROWS_AT_ONCE

_DAMPING = 1.0  # of the curvature, relative to its mean eigenvalue


def neighbour_influence(
    gradients: np.ndarray, curvature: np.ndarray, near: Sequence[Tensor], damping: float = _DAMPING
) -> np.ndarray:
    """The mean over neighbours ``m`` of ``cos(H^-1 g_n, g_m)``: positive where the pair helps them, shape ``(N,)``.

    Args:
        gradients: ``g``, projected, shape ``(N, r)``.
        curvature: ``H`` between the directions, shape ``(r, r)``.
        near: neighbours by rows, shape ``(N, k)`` each.
        damping (1.0): added to the curvature, relative to its mean eigenvalue.

    Raises:
        EcifError: if the curvature is zero or not finite
    """
    factor = cho_factor(damped(curvature, damping))
    units = normalize(torch.from_numpy(gradients), dim=1)
    means = []
    for start in range(0, len(units), ROWS_AT_ONCE):
        solved = cho_solve(factor, gradients[start : start + ROWS_AT_ONCE].T.astype(np.float64)).T
        rows = torch.cat([side[start : start + ROWS_AT_ONCE] for side in near], dim=1)
        steps = normalize(torch.from_numpy(solved), dim=1).to(units)
        means.append(
            torch.cat(
                [
                    torch.einsum("nr,nkr->nk", step, units[own]).mean(1)
                    for step, own in zip(torch.split(steps, 256), torch.split(rows, 256), strict=True)
                ]
            )
        )
    agreement: np.ndarray = torch.cat(means).numpy()
    return agreement
