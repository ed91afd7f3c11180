"""Several scores made one, by their ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata


def fuse(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean rank over some detectors, in (0, 1], shape ``(N,)``.

    Args:
        scores: by detector, shape ``(N,)`` each.
    """
    ranks: np.ndarray = np.mean([ranked(each) for each in scores.values()], axis=0)
    return ranks


def ranked(scores: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1], the highest score 1; equal scores share one."""
    ranks: np.ndarray = rankdata(scores) / len(scores)
    return ranks


def normal_scores(scores: np.ndarray) -> np.ndarray:
    """What the ranks would be drawn from a standard normal distribution (van der Waerden's scores), shape ``(N,)``."""
    normal: np.ndarray = ndtri((ranked(scores) * len(scores) - 0.5) / len(scores))
    return normal
