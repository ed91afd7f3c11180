"""What kind of mistakes there are: what kind of decoys the suspicious pairs look like."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

_COST = 0.05  # sklearn's C
_STEPS = 60


class KindsOfMistakes:
    """Tells kinds of decoys apart by their signals, and of how many kinds the wrong pairs are.

    Args:
        signals: of the decoys, normal scores, shape ``(M, S)``.
        kind: of each decoy, shape ``(M,)``.
    """

    def __init__(self, signals: np.ndarray, kind: np.ndarray) -> None:
        balanced = len(kind) / np.bincount(kind)[kind] / len(np.unique(kind))
        self._model = LogisticRegression(C=_COST, max_iter=200).fit(signals, kind, sample_weight=balanced)

    def shares(self, signals: np.ndarray, probability: np.ndarray) -> np.ndarray:
        """The share of each kind among the wrong pairs, by expectation and maximisation (Saerens et al. 2002).

        Args:
            signals: of the pairs, as those of the decoys, shape ``(N, S)``.
            probability: that a pair is wrong, shape ``(N,)``.

        Returns:
            shape ``(kinds,)``
        """
        alike = self._model.predict_proba(signals)
        shares = np.full(alike.shape[1], 1 / alike.shape[1])
        for _ in range(_STEPS):
            of_each = alike * shares
            of_each /= of_each.sum(1, keepdims=True)
            shares = probability @ of_each / probability.sum()
        return shares
