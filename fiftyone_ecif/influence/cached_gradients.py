"""Influence from projected gradients: many targets without the model.

With ``g`` a pair's removal gradient and ``H`` the curvature, both in the
projected space of ``r`` directions, the influence of the pair on a target with
gradient ``f`` is ``f . H^-1 g / N``: one matrix product for any number of
targets. Arrays in, arrays out, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky


def influence_vectors(curvature: np.ndarray, gradients: np.ndarray, pairs: int) -> np.ndarray:
    """``H^-1 f / N``: what the product with a removal gradient is the influence of.

    >>> influence_vectors(np.diag([4.0, 16.0]), np.array([[1.0, 1.0]]), 2).tolist()
    [[0.125, 0.03125]]

    Args:
        curvature: ``H``, positive definite, shape ``(r, r)``.
        gradients: ``f``, shape ``(M, r)``.
        pairs: ``N``.
    """
    solved: np.ndarray = cho_solve((cholesky(curvature, lower=True), True), gradients.T).T / pairs
    return solved


@dataclass(frozen=True)
class CachedGradients:
    """Projected removal gradients of all pairs, or of some, and the curvature between them.

    Attributes:
        positive: of the positive role, shape ``(n, r)``.
        negative: of the negative role, shape ``(n, r)``.
        curvature: positive definite, shape ``(r, r)``.
        pairs: ``N``, how many there are in all.
    """

    positive: np.ndarray
    negative: np.ndarray
    curvature: np.ndarray
    pairs: int

    def of_others(self, positive: np.ndarray, negative: np.ndarray) -> CachedGradients:
        """Other pairs with the same curvature, which is factorised once for all."""
        others = replace(self, positive=positive, negative=negative)
        others.__dict__["_inverse"] = self._inverse
        return others

    def influence(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positive and the negative part of the influence of every pair on many targets.

        Args:
            targets: projected gradients of the targets' losses, shape ``(M, r)``.

        Returns:
            two arrays of shape ``(M, n)``, in nats; positive = valuable
        """
        vectors = influence_vectors(self.curvature, targets, self.pairs)
        return vectors @ self.positive.T, vectors @ self.negative.T

    def relative_influence(self, targets: np.ndarray) -> np.ndarray:
        """Influence over the length of what the pair does to the model, shape ``(M, n)``.

        ``influence_n / |H^-1/2 g_n|``: pairs that move everything do not win every
        query (relative influence, arXiv 2003.11630). Without a unit that matters.
        """
        positive, negative = self.influence(targets)
        relative: np.ndarray = (positive + negative) / self.lengths
        return relative

    @property
    def lengths(self) -> np.ndarray:
        """What each pair does to the model, ``|H^-1/2 g_n|``, shape ``(n,)``."""
        squared = np.einsum("nr,nr->n", self._removed, self._moves)
        lengths: np.ndarray = np.sqrt(squared.clip(min=np.finfo(float).tiny))
        return lengths

    def self_influence(self) -> np.ndarray:
        """Change of each pair's own loss if it had not been trained on, shape ``(n,)``, in nats.

        Large for pairs that the model can only fit by learning them by heart.
        """
        scores: np.ndarray = np.einsum("nr,nr->n", self.positive, self._moves) / self.pairs
        return scores

    @cached_property
    def _removed(self) -> np.ndarray:
        removed: np.ndarray = self.positive.astype(np.float64) + self.negative
        return removed

    @cached_property
    def _moves(self) -> np.ndarray:
        """``H^-1 g`` of each pair: one product with the inverse is faster than solving for each."""
        moves: np.ndarray = self._removed @ self._inverse
        return moves

    @cached_property
    def _inverse(self) -> np.ndarray:
        inverse: np.ndarray = cho_solve((cholesky(self.curvature, lower=True), True), np.eye(len(self.curvature)))
        return inverse
