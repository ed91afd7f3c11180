"""What a run keeps on the disk: projected gradients, and what is computed from them without the model or torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.cached_gradients import CachedGradients, influence_vectors
from fiftyone_ecif.influence.damping import damped
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.store.tables import Store, Table

_WHOLE = "whole"  # the part that says that all directions are there


class MissingRowsError(EcifError):
    """Some of what a run kept is not in its store any more."""


class PairRows(NamedTuple):
    """What is kept of some training pairs.

    Attributes:
        row: which pairs they are, shape ``(n,)``.
        batch: the number of each one's batch, shape ``(n,)``.
        image: unit image embeddings, float32, shape ``(n, d)``.
        cosine: cosine similarity of image and caption, shape ``(n,)``.
        loss: the value of the positive role, in nats, shape ``(n,)``.
        positive: projected gradients of the positive role, float32, shape ``(n, r)``.
        negative: of the negative role, likewise.
    """

    row: np.ndarray
    batch: np.ndarray
    image: np.ndarray
    cosine: np.ndarray
    loss: np.ndarray
    positive: np.ndarray
    negative: np.ndarray


class TargetRows(NamedTuple):
    """What is kept of some pairs of a target.

    Attributes:
        row: which pairs they are, shape ``(m,)``.
        image: unit image embeddings, float32, shape ``(m, d)``.
        loss: of each pair, shape ``(m,)``.
        mistake: whether the model gets it wrong, bool, shape ``(m,)``.
        gradient: projected gradients of the losses, float32, shape ``(m, r)``.
    """

    row: np.ndarray
    image: np.ndarray
    loss: np.ndarray
    mistake: np.ndarray
    gradient: np.ndarray


class MatchRows(NamedTuple):
    """What the model confuses some pairs of a target with, see :class:`fiftyone_ecif.influence.targets.Matches`.

    Attributes:
        row: which pairs they are, shape ``(m,)``.
        wrong: which row or class is the strongest wrong match in each direction, shape ``(m, k)``.
        wrong_similarity: cosine, likewise.
        right: the strongest right match.
        right_similarity: its cosine.
    """

    row: np.ndarray
    wrong: np.ndarray
    wrong_similarity: np.ndarray
    right: np.ndarray
    right_similarity: np.ndarray


class Effects(NamedTuple):
    """What each pair does on its own.

    Attributes:
        length: :attr:`CachedGradients.lengths`, shape ``(N,)``.
        own: :meth:`CachedGradients.self_influence`, shape ``(N,)``.
    """

    length: np.ndarray
    own: np.ndarray


class GradientStore:
    """What a run keeps of a partition of its pairs, in tables.

    =========================  ==================================================
    table                      columns
    =========================  ==================================================
    ``gradients``              those of :class:`PairRows`
    one for each target        those of :class:`TargetRows`
    ``{target}-matches``       those of :class:`MatchRows`; older runs have none
    ``projection``             ``matrix``: the directions, a part for each array
    ``projected-curvature``    ``matrix``, a part for each solver
    ``effects``                those of :class:`Effects`, for a solver and damping
    ``parameters``             ``theta`` and ``relative_gradient_norm``
    =========================  ==================================================

    Args:
        store: where the tables are.
        pairs: ``N``.
        solver ("hessian"): what stands for the curvature.
        damping (0.0): added to it, relative to its mean eigenvalue.

    Raises:
        EcifError: if there is no such solver
    """

    def __init__(self, store: Store, pairs: int, solver: str = "hessian", damping: float = 0.0) -> None:
        self.pairs, self.solver, self.damping = pairs, SOLVERS[solver], damping
        self._store = store

    def parameters(self) -> tuple[np.ndarray, float] | None:
        """The parameters that were scored at, shape ``(p,)``, and their relative gradient norm; None if none were."""
        table = self._store.table("parameters")
        if not table.parts():
            return None
        found = table.read("0", "theta", "relative_gradient_norm")
        return found["theta"][0], float(found["relative_gradient_norm"][0])

    def write_parameters(self, theta: np.ndarray, relative_gradient_norm: float) -> None:
        """Keeps what :meth:`parameters` gives."""
        columns = {"theta": theta[None], "relative_gradient_norm": np.array([relative_gradient_norm])}
        self._store.table("parameters").write("0", columns)

    def directions(self) -> dict[str, np.ndarray] | None:
        """The named arrays that gradients are projected by; None if none were chosen."""
        table = self._store.table("projection")
        names = table.parts()
        if _WHOLE not in names:
            return None
        return {name: table.read(name, "matrix")["matrix"] for name in names if name != _WHOLE}

    def write_directions(self, state: Mapping[str, np.ndarray]) -> None:
        """Keeps what :meth:`directions` gives."""
        for name, matrix in {**state, _WHOLE: np.ones(1)}.items():  # that one last
            self._store.table("projection").write(name, {"matrix": matrix})

    def written(self, target: str | None = None) -> set[int]:
        """The batches that parts start with which are there, of the pairs or of a target."""
        tables = [self._pairs] if target is None else [self._store.table(target), self._matches(target)]
        return set.intersection(*({int(part) for part in table.parts() if part.isdecimal()} for table in tables))

    def write_pairs(self, start: int, rows: Sequence[PairRows]) -> None:
        """Keeps some batches of pairs as one part.

        Args:
            start: the number of the first batch.
            rows: of each batch.
        """
        _write(self._pairs, start, rows)

    def write_target(self, target: str, start: int, rows: Sequence[TargetRows], matches: Sequence[MatchRows]) -> None:
        """Keeps some batches of a target's pairs, likewise."""
        _write(self._matches(target), start, matches)
        _write(self._store.table(target), start, rows)

    def has_curvature(self) -> bool:
        """Whether the curvature of the solver is there."""
        return self.solver.name in self._curvatures.parts()

    def write_curvature(self, matrix: np.ndarray) -> None:
        """Keeps the curvature of the solver, as it is without damping, shape ``(r, r)``."""
        self._curvatures.write(self.solver.name, {"matrix": matrix})

    def curvature(self) -> np.ndarray:
        """The curvature between the gradients, damped until it is positive definite, shape ``(r, r)``.

        Raises:
            EcifError: if it is not there and does not follow from the gradients, or no damping is enough
        """
        if not self.has_curvature():
            found = (self._pairs.read(part, "positive", "negative") for part in self._pairs.parts())
            self.write_curvature(self.solver.stored_curvature(part["positive"] + part["negative"] for part in found))
        return damped(self._curvatures.read(self.solver.name, "matrix")["matrix"], self.damping)

    def effects(self) -> Effects:
        """What each pair does on its own, kept once computed; one part of the gradients in memory at a time.

        Raises:
            EcifError: if some of the gradients are missing
        """
        table, part = self._store.table("effects"), f"{self.solver.name}-{self.damping}"
        if part not in table.parts():
            curvature = self.curvature()
            effects = Effects(np.empty(self.pairs), np.empty(self.pairs))
            none = np.empty((0, len(curvature)), dtype=np.float32)
            whole = CachedGradients(none, none, curvature, self.pairs)
            for rows, found in self._each("positive", "negative"):
                cached = whole.of_others(found["positive"], found["negative"])
                effects.length[rows], effects.own[rows] = cached.lengths, cached.self_influence()
            self.write_effects(effects)
        return Effects(**table.read(part, *Effects._fields))

    def write_effects(self, effects: Effects) -> None:
        """Keeps what :meth:`effects` gives."""
        self._store.table("effects").write(f"{self.solver.name}-{self.damping}", effects._asdict())

    def load(self) -> CachedGradients:
        """All gradients at once, rows in the order of the pairs, and the curvature between them.

        Raises:
            EcifError: if some of them are missing, or the store is damaged
        """
        positive, negative = self.columns("positive", "negative")
        return CachedGradients(positive, negative, self.curvature(), self.pairs)

    def columns(self, *names: str) -> list[np.ndarray]:
        """Some of the columns of :class:`PairRows`, in the order of the pairs, shape ``(N, ...)`` each.

        Raises:
            MissingRowsError: if some of the pairs are missing
        """
        return _in_order(self._pairs, self.pairs, names)

    def target(self, name: str, pairs: int) -> TargetRows:
        """What is kept of a target's pairs, in their order.

        Args:
            name: of the target.
            pairs: ``M``.

        Raises:
            MissingRowsError: if some of them are missing
        """
        return TargetRows(*_in_order(self._store.table(name), pairs, TargetRows._fields))

    def matches(self, name: str, pairs: int) -> MatchRows | None:
        """What the model confuses a target's pairs with, in their order; None if that was not kept.

        Args:
            name: of the target.
            pairs: ``M``.
        """
        try:
            return MatchRows(*_in_order(self._matches(name), pairs, MatchRows._fields))
        except MissingRowsError:
            return None

    def pair(self, row: int, *names: str) -> list[np.ndarray] | None:
        """Some of the columns of one pair, without reading those of others; None if it is not there."""
        for part in self._pairs.parts():
            (found,) = np.nonzero(self._pairs.read(part, "row")["row"] == row)
            if len(found):
                return [column[found[0]] for column in self._pairs.read(part, *names).values()]
        return None

    def influence(self, targets: np.ndarray, roles: Sequence[str] = ("positive", "negative")) -> np.ndarray:
        """Influence of every pair on many targets, without all gradients in memory.

        Args:
            targets: projected gradients of the targets' losses, shape ``(M, r)``.
            roles: the parts to add up.

        Returns:
            shape ``(M, N)``, float32, in nats; positive = valuable

        Raises:
            MissingRowsError: if some of the gradients are missing
        """
        vectors = influence_vectors(self.curvature(), targets, self.pairs)
        return self._products(vectors.astype(np.float32), *roles)  # as the gradients are: converting those takes longer

    def influence_of(self, gradient: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Influence of one pair on many targets, in nats, shape ``(M,)``; positive = valuable.

        Args:
            gradient: the pair's removal gradient, both roles added up, shape ``(r,)``.
            targets: as in :meth:`influence`.
        """
        influence: np.ndarray = targets @ influence_vectors(self.curvature(), gradient[None], self.pairs)[0]
        return influence

    def similarity(self, images: np.ndarray) -> np.ndarray:
        """Cosine similarity of every pair's image with some others.

        Args:
            images: unit embeddings, float32, shape ``(M, d)``.

        Returns:
            shape ``(M, N)``, float32

        Raises:
            MissingRowsError: if some of the pairs are missing
        """
        return self._products(images, "image")

    @property
    def _pairs(self) -> Table:
        return self._store.table("gradients")

    def _matches(self, target: str) -> Table:
        return self._store.table(f"{target}-matches")

    @property
    def _curvatures(self) -> Table:
        return self._store.table("projected-curvature")

    def _products(self, vectors: np.ndarray, *columns: str) -> np.ndarray:
        """Products with the sum of some columns of every pair, ``(M, N)``, one part in memory at a time."""
        products = np.empty((len(vectors), self.pairs), dtype=np.float32)
        for rows, found in self._each(*columns):
            products[:, rows] = np.sum([vectors @ found[name].T for name in columns], axis=0)
        return products

    def _each(self, *columns: str) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Columns of the pairs part by part, with the pairs that the rows belong to.

        Raises:
            MissingRowsError: after the last part, if not every pair was in one
        """
        seen = np.zeros(self.pairs, dtype=bool)
        for found in self._pairs.read_each("row", *columns):
            yield found["row"], found
            seen[found["row"]] = True
        if not seen.all():
            raise MissingRowsError(
                f"{self._pairs.folder} lacks the gradients of {self.pairs - seen.sum()} of {self.pairs} pairs. "
                "Run compute_influence again with overwrite=True"
            )


def target_mistakes(store: Store, targets: Sequence[str]) -> np.ndarray:
    """Which pairs of some targets the model gets wrong, in any order, bool, without reading more.

    Raises:
        MissingRowsError: if one of them is not there
    """
    found = [store.table(name).read_all("mistake")["mistake"] for name in targets]
    if not all(map(len, found)):
        raise MissingRowsError(f"{store.folder} lacks a target. Run compute_influence again with overwrite=True")
    return np.concatenate(found)


def _write(table: Table, start: int, rows: Sequence[PairRows] | Sequence[TargetRows] | Sequence[MatchRows]) -> None:
    columns: dict[str, Any] = {name: [getattr(part, name) for part in rows] for name in rows[0]._fields}
    table.write(f"{start:09d}", {name: np.concatenate(values) for name, values in columns.items()})


def _in_order(table: Table, count: int, columns: Sequence[str]) -> list[np.ndarray]:
    """Columns in the order of their rows, all of which must be there."""
    found = table.read_all(*dict.fromkeys(("row", *columns)))
    order = np.argsort(found["row"])
    if not np.array_equal(found["row"][order], np.arange(count)):
        raise MissingRowsError(
            f"{table.folder} lacks some of {count} pairs. Run compute_influence again with overwrite=True"
        )
    return [found[column][order] for column in columns]
