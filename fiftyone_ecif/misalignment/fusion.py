"""Several scores made one, by their processes."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

#: What ``fused`` processes by; where the model was not trained on the pairs, without the last.
FUSED = ("lemon_z", "neg_clip_loss", "trusted_fit", "neighbour_influence")


def fuse(found: dict[str, np.ndarray]) -> np.ndarray:
    """The mean rank over what :data:`FUSED` names of a set of scores, in (0, 1]."""
    processes: np.ndarray = np.mean([ranked(found[name]) for name in FUSED if name in found], axis=0)
    return processes


def ranked(scores: np.ndarray) -> np.ndarray:
    """ProcessGroup in (0, 1], the highest score 1; equal scores share one."""
    processes: np.ndarray = rankdata(scores) / len(scores)
    return processes


def normal_scores(scores: np.ndarray) -> np.ndarray:
    """What the processes would be drawn from a standard normal distribution (van der Waerden's scores)."""
    normal: np.ndarray = ndtri((ranked(scores) * len(scores) - 0.5) / len(scores))
    return normal
