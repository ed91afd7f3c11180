"""What to look at next, and how good a score is on what was looked at."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score

from fiftyone_ecif.errors import EcifError

_ELSEWHERE = 0.25  # share of the proposals that are drawn from everywhere
_DRAWS = 1000


def propose(probability: np.ndarray, known: np.ndarray, count: int, seed: int = 0) -> list[int]:
    """Rows to look at next: the most uncertain, and a few from everywhere.

    Args:
        probability: of being misaligned, shape ``(N,)``.
        known: which rows need no look any more, bool, shape ``(N,)``.
        count: how many.
        seed (0): of those from everywhere.

    Raises:
        EcifError: if ``count`` is below 1
    """
    if count < 1:
        raise EcifError(f"count={count} must be at least 1")
    left = np.flatnonzero(~known)
    uncertain = left[np.argsort(np.abs(probability[left] - 0.5), kind="stable")][: round(count * (1 - _ELSEWHERE))]
    others = np.setdiff1d(left, uncertain)
    drawn = np.random.default_rng(seed).permutation(others)[: count - len(uncertain)]
    return [int(row) for row in (*uncertain, *drawn)]


def auroc_with_interval(scores: np.ndarray, wrong: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """AUROC and its 95 % bootstrap interval.

    Args:
        scores: of pairs that were judged, higher = more suspicious, shape ``(n,)``.
        wrong: whether they are misaligned, some of them, bool, shape ``(n,)``.
        seed (0): of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    groups = np.flatnonzero(wrong), np.flatnonzero(~wrong)
    drawn = []
    for _ in range(_DRAWS):
        rows = np.concatenate([generator.choice(group, len(group)) for group in groups])
        drawn.append(roc_auc_score(wrong[rows], scores[rows]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(roc_auc_score(wrong, scores)), float(low), float(high)
