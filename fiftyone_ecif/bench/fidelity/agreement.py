"""How well predictions agree with the truth, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr, zscore
from torch import Tensor


def agreement(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Pearson, Spearman and slope of true against predicted, means over seeds, with a bootstrap interval."""
    predicted, true = np.concatenate([p for p, _ in parts]), np.concatenate([t for _, t in parts])
    if not np.isfinite(predicted).all():
        return {"pearson": 0.0, "spearman": 0.0, "slope": 0.0}
    mean, low, high = bootstrap(predicted, true, pearson)
    slope = float(predicted @ true / (predicted @ predicted))
    return {
        "pearson": mean,
        "pearson_low": low,
        "pearson_high": high,
        "spearman": spearman(predicted, true),
        "slope": slope,
    }


def bootstrap(
    a: np.ndarray, b: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray], float], draws: int = 300
) -> tuple[float, float, float]:
    """The statistic and its 95 % percentile interval over rows drawn again."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(draws):
        rows = rng.integers(len(a), size=len(a))
        drawn.append(statistic(a[rows], b[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return statistic(a, b), float(low), float(high)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where a side does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) and np.std(b) else 0.0


def mean_pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of the rows' Pearson correlations."""
    return float(np.mean([pearson(x, y) for x, y in zip(a, b, strict=True)]))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    return float(spearmanr(a, b).statistic)


def mean_spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Of the columns; all at once, since a bootstrap asks for it often."""
    a, b = (zscore(rankdata(side, axis=0)) for side in (a, b))
    return float(np.mean(a * b))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors."""
    return float(a.dot(b) / (a.norm() * b.norm()))
