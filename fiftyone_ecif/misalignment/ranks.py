"""Scores as ranks."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def ranked(scores: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1], the highest score 1; equal scores share one."""
    ranks: np.ndarray = rankdata(scores) / len(scores)
    return ranks
