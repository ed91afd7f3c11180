"""Influence from stored gradients: many targets without the model.

Projected gradients in, scores out, without torch. With ``g`` a pair's removal
gradient and ``H`` the curvature, both in the projected space of ``r``
directions, the influence of the pair on a target with gradient ``f`` is
``f . H^-1 g / N``: one matrix product for any number of targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.store.tables import Store


def damped(curvature: np.ndarray, damping: float = 0.0) -> np.ndarray:
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

    def influence(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positive and the negative part of the influence of every pair on many targets.

        Args:
            targets: projected gradients of the targets' losses, shape ``(M, r)``.

        Returns:
            two arrays of shape ``(M, n)``, in nats; positive = valuable
        """
        solved = self._half_solve(self._half_solve(targets.T), transposed=True).T / self.pairs
        return solved @ self.positive.T, solved @ self.negative.T

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
        lengths: np.ndarray = np.linalg.norm(self._whitened, axis=0)
        return lengths.clip(min=np.finfo(float).tiny)

    def self_influence(self) -> np.ndarray:
        """Change of each pair's own loss if it had not been trained on, shape ``(n,)``, in nats.

        Large for pairs that the model can only fit by learning them by heart.
        """
        own = self._half_solve(self.positive.T)
        scores: np.ndarray = (own * self._whitened).sum(0) / self.pairs
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
    curvature = read_curvature(store, solver, damping)
    return CachedGradients(found["positive"][order], found["negative"][order], curvature, len(order))


def read_curvature(store: Store, solver: str, damping: float = 0.0) -> np.ndarray:
    """The curvature of a run between its projected gradients, positive definite, shape ``(r, r)``."""
    table = store.table("projected-curvature")
    if solver not in table.parts():
        gradients = store.table("gradients")
        found = (gradients.read(part, "positive", "negative") for part in gradients.parts())
        matrix = SOLVERS[solver].stored_curvature(part["positive"] + part["negative"] for part in found)
        table.write(solver, {"matrix": matrix})
    return damped(table.read(solver, "matrix")["matrix"], damping)


def read_effects(store: Store, solver: str, damping: float, pairs: int) -> dict[str, np.ndarray]:
    """What each pair does on its own, kept in the store once computed; one part of the gradients in memory at a time.

    Args:
        store: the run's.
        solver: what stands for the curvature.
        damping: added to it, relative to its mean eigenvalue.
        pairs: ``N``.

    Returns:
        ``length`` (:attr:`CachedGradients.lengths`) and ``own``
        (:meth:`CachedGradients.self_influence`), each of shape ``(N,)``

    Raises:
        EcifError: if some of the gradients are not in the store
    """
    table, part = store.table("effects"), f"{solver}-{damping}"
    if part not in table.parts():
        curvature = read_curvature(store, solver, damping)
        effects = {name: np.empty(pairs) for name in ("length", "own")}
        for rows, found in _parts(store, pairs, "positive", "negative"):
            cached = CachedGradients(found["positive"], found["negative"], curvature, pairs)
            effects["length"][rows], effects["own"][rows] = cached.lengths, cached.self_influence()
        table.write(part, effects)
    return table.read(part, "length", "own")


def stored_influence(
    store: Store,
    solver: str,
    damping: float,
    targets: np.ndarray,
    pairs: int,
    columns: Sequence[str] = ("positive", "negative"),
) -> np.ndarray:
    """:meth:`CachedGradients.influence` of every pair without all gradients in memory.

    Args:
        store: the run's.
        solver: what stands for the curvature.
        damping: added to it, relative to its mean eigenvalue.
        targets: projected gradients of the targets' losses, shape ``(M, r)``.
        pairs: ``N``.
        columns: the parts to add up.

    Returns:
        shape ``(M, N)``, float32, in nats; positive = valuable
    """
    solved = cho_solve((cholesky(read_curvature(store, solver, damping), lower=True), True), targets.T).T / pairs
    single = solved.astype(np.float32)  # as the gradients are: to convert those takes longer than all the rest
    return stored_products(store, single, pairs, *columns)


def stored_products(store: Store, vectors: np.ndarray, pairs: int, *columns: str) -> np.ndarray:
    """Products with the sum of some columns of every pair, one part in memory at a time.

    Args:
        store: the run's.
        vectors: float32, shape ``(M, r)``.
        pairs: ``N``.
        *columns: of the table of gradients, shape ``(N, r)`` each.

    Returns:
        shape ``(M, N)``, float32, in the order of the pairs

    Raises:
        EcifError: if some of them are not in the store
    """
    products = np.empty((len(vectors), pairs), dtype=np.float32)
    for rows, found in _parts(store, pairs, *columns):
        products[:, rows] = np.sum([vectors @ found[name].T for name in columns], axis=0)
    return products


def stored_pair(store: Store, row: int, *columns: str) -> dict[str, np.ndarray] | None:
    """What the store holds of one pair, without reading the others; None if there is nothing."""
    table = store.table("gradients")
    for part in table.parts():
        (found,) = np.nonzero(table.read(part, "row")["row"] == row)
        if len(found):
            return {name: values[found[0]] for name, values in table.read(part, *columns).items()}
    return None


def _parts(store: Store, pairs: int, *columns: str) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Columns of the stored gradients part by part, with the pairs that the rows belong to.

    Raises:
        EcifError: after the last part, if not every pair was in one
    """
    table, seen = store.table("gradients"), np.zeros(pairs, dtype=bool)
    for found in table.read_each("row", *columns):
        yield found["row"], found
        seen[found["row"]] = True
    if not seen.all():
        raise EcifError(
            f"{table.folder} lacks the gradients of {pairs - seen.sum()} of {pairs} pairs. "
            "Run compute_influence again with overwrite=True"
        )
