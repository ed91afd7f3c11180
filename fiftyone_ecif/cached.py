"""Influence from stored gradients: many targets without the model.

Projected gradients in, scores out, without torch. With ``g`` a pair's removal
gradient and ``H`` the curvature, both in the projected space of ``r``
directions, the influence of the pair on a target with gradient ``f`` is
``f . H^-1 g / N``: one matrix product for any number of targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from .errors import EcifError
from .store import Store

_COVARIANCE_DAMPING = 0.1


def gradient_covariance(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """LoGra's stand-in for the curvature (arXiv 2405.13954), shape ``(r, r)``.

    The mean outer product of the removal gradients, damped by a tenth of its
    mean eigenvalue.
    """
    gradients = (positive + negative).astype(np.float64)
    covariance = gradients.T @ gradients / len(gradients)
    damping = _COVARIANCE_DAMPING * np.trace(covariance) / len(covariance)
    damped: np.ndarray = covariance + damping * np.eye(len(covariance))
    return damped


def mended(curvature: np.ndarray, damping: float = 0.0) -> np.ndarray:
    """A symmetric matrix, damped; more so, by the least of ``2^-10, 2^-9 ...``, where that does not make it positive.

    Args:
        curvature: shape ``(r, r)``.
        damping (0.0): at least; relative to the mean eigenvalue.

    Raises:
        EcifError: if it is zero or not finite
    """
    mean = abs(np.trace(curvature)) / len(curvature)
    if not (np.isfinite(curvature).all() and mean > 0):
        raise EcifError("The projected curvature is not usable: it is zero or not finite. Load other weights")
    least = np.linalg.eigvalsh(curvature)[0]
    while least + damping * mean <= 1e-6 * mean:
        damping = 2 * damping or 2.0**-10
    shifted: np.ndarray = curvature + damping * mean * np.eye(len(curvature))
    return shifted


@dataclass(frozen=True)
class CachedGradients:
    """Projected removal gradients of all pairs and the curvature between them.

    Attributes:
        positive: of the positive role, shape ``(N, r)``.
        negative: of the negative role, shape ``(N, r)``.
        curvature: positive definite, shape ``(r, r)``.
    """

    positive: np.ndarray
    negative: np.ndarray
    curvature: np.ndarray

    def influence(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positive and the negative part of the influence of every pair on many targets.

        Args:
            targets: projected gradients of the targets' losses, shape ``(M, r)``.

        Returns:
            two arrays of shape ``(M, N)``, in nats; positive = valuable
        """
        solved = self._half_solve(self._half_solve(targets.T), transposed=True).T / len(self.positive)
        return solved @ self.positive.T, solved @ self.negative.T

    def relative_influence(self, targets: np.ndarray) -> np.ndarray:
        """Influence over the length of what the pair does to the model, shape ``(M, N)``.

        ``influence_n / |H^-1/2 g_n|``: pairs that move everything do not win every
        query (relative influence, arXiv 2003.11630). Without a unit that matters.
        """
        positive, negative = self.influence(targets)
        relative: np.ndarray = (positive + negative) / self.lengths
        return relative

    @property
    def lengths(self) -> np.ndarray:
        """What each pair does to the model, ``|H^-1/2 g_n|``, shape ``(N,)``."""
        lengths: np.ndarray = np.linalg.norm(self._whitened, axis=0)
        return lengths.clip(min=np.finfo(float).tiny)

    def self_influence(self) -> np.ndarray:
        """Change of each pair's own loss if it had not been trained on, shape ``(N,)``, in nats.

        Large for pairs that the model can only fit by learning them by heart.
        """
        own = self._half_solve(self.positive.T)
        scores: np.ndarray = (own * self._whitened).sum(0) / len(self.positive)
        return scores

    @cached_property
    def _whitened(self) -> np.ndarray:
        return self._half_solve((self.positive + self.negative).T)

    @cached_property
    def _factor(self) -> np.ndarray:
        factor: np.ndarray = cholesky(self.curvature, lower=True)
        return factor

    def _half_solve(self, columns: np.ndarray, transposed: bool = False) -> np.ndarray:
        solved: np.ndarray = solve_triangular(self._factor, columns, lower=True, trans=int(transposed))
        return solved


def read_cached(store: Store, solver: str, damping: float = 0.0) -> CachedGradients:
    """The projected gradients of a run, rows in the order of the pairs, and their curvature.

    Args:
        store: the run's.
        solver: what stands for the curvature.
        damping (0.0): added to it, relative to its mean eigenvalue.

    Raises:
        EcifError: if they are not in the store, or it is damaged
    """
    found = store.table("gradients").read_all("row", "positive", "negative")
    order = np.argsort(found["row"])
    return CachedGradients(found["positive"][order], found["negative"][order], read_curvature(store, solver, damping))


def read_curvature(store: Store, solver: str, damping: float = 0.0) -> np.ndarray:
    """The curvature of a run between its projected gradients, positive definite, shape ``(r, r)``."""
    table = store.table("projected-curvature")
    if solver in ("logra", "identity") and solver not in table.parts():
        found = store.table("gradients").read_all("positive", "negative")
        logra = solver == "logra"
        table.write(solver, {"matrix": gradient_covariance(**found) if logra else np.eye(found["positive"].shape[1])})
    return mended(table.read(solver, "matrix")["matrix"], damping)


def read_lengths(store: Store, solver: str, damping: float = 0.0) -> np.ndarray:
    """What each pair does to the model, as :attr:`CachedGradients.lengths`, kept in the store once computed."""
    table, part = store.table("lengths"), f"{solver}-{damping}"
    if part not in table.parts():
        table.write(part, {"length": read_cached(store, solver, damping).lengths})
    lengths: np.ndarray = table.read(part, "length")["length"]
    return lengths


def stored_influence(store: Store, solver: str, damping: float, targets: np.ndarray) -> np.ndarray:
    """Both parts of :meth:`CachedGradients.influence` together, without all gradients in memory, shape ``(M, N)``."""
    solved = cho_solve((cholesky(read_curvature(store, solver, damping), lower=True), True), targets.T).T
    single = solved.astype(np.float32)  # as the gradients are: to convert those takes longer than all the rest
    products = stored_products(store, single, "positive", "negative").astype(np.float64)
    influence: np.ndarray = products / products.shape[1]
    return influence


def stored_products(store: Store, vectors: np.ndarray, *columns: str) -> np.ndarray:
    """Products with the sum of some columns of every pair, one part in memory at a time.

    Args:
        store: the run's.
        vectors: shape ``(M, r)``.
        *columns: of the table of gradients, shape ``(N, r)`` each.

    Returns:
        shape ``(M, N)``, in the order of the pairs
    """
    table, rows, products = store.table("gradients"), [], []
    for part in table.parts():
        found = table.read(part, "row", *columns)
        rows.append(found["row"])
        products.append(np.sum([vectors @ found[name].T for name in columns], axis=0))
    return np.concatenate(products, axis=1)[:, np.argsort(np.concatenate(rows))]


def stored_pair(store: Store, row: int, *columns: str) -> dict[str, np.ndarray] | None:
    """What the store holds of one pair, without reading the others; None if there is nothing."""
    table = store.table("gradients")
    for part in table.parts():
        (found,) = np.nonzero(table.read(part, "row")["row"] == row)
        if len(found):
            return {name: values[found[0]] for name, values in table.read(part, *columns).items()}
    return None
