"""Scores of pairs from their features: fit, solve, gradients, one pass.

Arrays in, arrays out. What a partition fixes (the fitted parameters and the
projected gradients) is kept in the run's store and read back by the next run
with the same partition, whatever its target.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .curvature import NegativeCurvatureError, Solution, conjugate_gradient
from .errors import EcifError
from .fitting import minimise
from .gradients import HeadProjection, principal_projections, removal_gradients
from .heads import FeatureBatches, HeadScope
from .influence import batch_influence
from .objective import ContrastiveLoss, random_partition
from .progress import Progress
from .store import Store

Features = tuple[Tensor, Tensor]

_COLLAPSED = 1e-3
_MAX_DAMPING = 2**20
_BATCHES_A_PART = 8


@dataclass(frozen=True)
class Scores:
    """Influence of each pair and what tells how far to trust it.

    Attributes:
        positive: the part from the pair's own loss, shape ``(N,)``, in nats.
        negative: the part from serving as a negative of others, likewise.
        diagnostics: see :func:`fiftyone_ecif.compute_influence`.
    """

    positive: np.ndarray
    negative: np.ndarray
    diagnostics: dict[str, Any]


def score_pairs(
    store: Store,
    scope: HeadScope,
    training: Features,
    target: Features,
    *,
    fit: bool,
    proximal: float,
    batch_size: int,
    seed: int,
) -> Generator[Progress, None, Scores]:
    """Influence of training pairs on the mean loss of target pairs.

    Args:
        store: of this partition of these pairs.
        scope: the heads.
        training: image and caption features, ``(N, w_image)`` and ``(N, w_text)``.
        target: likewise, of the target pairs.
        fit: whether to bring the heads to a stationary point first.
        proximal: strength of the pull to the heads as loaded.
        batch_size: pairs that compete in one softmax, at most.
        seed: of the partitions.

    Raises:
        EcifError: if the fit or the solve does not converge, or an embedding
            has collapsed
    """
    partition = random_partition(len(training[0]), batch_size, seed)
    batches = FeatureBatches(*training, partition)
    objective = ContrastiveLoss(scope, batches, len(training[0]), proximal)
    theta, relative_gradient_norm = yield from _stationary_point(store, objective, fit)
    smallest_norm = _smallest_norm(scope, theta, batches)

    target_batches = FeatureBatches(*target, random_partition(len(target[0]), batch_size, seed))
    gradient, target_loss = ContrastiveLoss(scope, target_batches, len(target[0])).gradient_and_value(theta)
    solution, damping = yield from _solve(objective, theta, gradient)
    yield from _keep_gradients(store, scope, theta, batches)

    positive, negative = np.empty(len(training[0])), np.empty(len(training[0]))
    for done, (rows, batch) in enumerate(zip(partition, batches, strict=True), start=1):
        parts = batch_influence(scope, theta, batch, solution.vector, len(training[0]))
        positive[rows], negative[rows] = (part.numpy() for part in parts)
        yield Progress("Scoring", done, len(partition))
    diagnostics = {
        "parameters": len(theta),
        "relative_gradient_norm": relative_gradient_norm,
        "damping": damping,
        "solve_residual": solution.residual,
        "solve_iterations": solution.iterations,
        "condition_number": solution.condition_number,
        "smallest_norm": smallest_norm,
        "training_loss": objective.loss(theta).item(),
        "target_loss": target_loss.item(),
    }
    return Scores(positive, negative, diagnostics)


def _stationary_point(
    store: Store, objective: ContrastiveLoss, fit: bool
) -> Generator[Progress, None, tuple[Tensor, float]]:
    """The parameters to score at and their relative gradient norm, from the store where they are."""
    table = store.table("parameters")
    if table.parts():
        found = table.read("0", "theta", "relative_gradient_norm")
        return torch.from_numpy(found["theta"][0]), float(found["relative_gradient_norm"][0])
    theta = objective.scope.start
    if fit:
        tolerance = 1e-5
        for fitted, relative in minimise(objective, tolerance):
            theta = fitted
            yield Progress("Fitting the heads", _percent(relative, tolerance), 100)
    else:
        relative = (objective.gradient_and_value(theta)[0].norm() / objective.gradient_scale(theta)).item()
    table.write("0", {"theta": theta.numpy()[None], "relative_gradient_norm": np.array([relative])})
    return theta, relative


def _smallest_norm(scope: HeadScope, theta: Tensor, batches: FeatureBatches) -> float:
    """The shortest embedding over the median, before normalisation; the smaller of both towers."""
    norms = torch.cat([scope.embedding_norms(theta, batch) for batch in batches])
    smallest = (norms.min(0).values / norms.median(0).values).min().item()
    if not smallest >= _COLLAPSED:
        raise EcifError(
            f"An embedding has collapsed: its length before normalisation is {smallest:.1e} of the median, and no "
            "score can be trusted then. Raise proximal, or use weights that are not overfitted"
        )
    return smallest


def _solve(
    objective: ContrastiveLoss, theta: Tensor, right: Tensor
) -> Generator[Progress, None, tuple[Solution, float]]:
    """Solves with the Hessian, damped where it is not positive, and says by how much.

    Away from a minimum the Hessian can have negative curvature. The least power
    of two of the proximal strength that mends it along the solve is then added.
    """
    tolerance, damping = 1e-6, 0.0

    def product(vector: Tensor) -> Tensor:
        return objective.hessian_product(theta, vector) + damping * vector

    while True:
        try:
            for solution in conjugate_gradient(product, right, tolerance):
                yield Progress("Solving", _percent(solution.residual, tolerance), 100)
            return solution, damping
        except NegativeCurvatureError:
            damping = 2 * damping or objective.proximal
            if damping > _MAX_DAMPING * objective.proximal:
                raise


def _percent(value: float, goal: float) -> int:
    """How far a value that falls geometrically from 1 is on its way to the goal."""
    return int(100 * min(max(math.log(max(value, goal)) / math.log(goal), 0.0), 1.0))


def _keep_gradients(
    store: Store, scope: HeadScope, theta: Tensor, batches: FeatureBatches
) -> Generator[Progress, None, None]:
    """Writes the partition and the projected gradients to the store, as far as they are not there."""
    table = store.table("gradients")
    starts = range(0, len(batches), _BATCHES_A_PART)
    missing = [start for start in starts if f"{start:09d}" not in table.parts()]
    if missing:
        projections = _projections(store, scope, theta, batches)
    for done, start in enumerate(missing, start=1):
        columns: dict[str, list[Tensor]] = {"row": [], "batch": [], "cosine": [], "positive": [], "negative": []}
        for number in range(start, min(start + _BATCHES_A_PART, len(batches))):
            batch, rows = batches[number], batches.partition[number]
            positive, negative = removal_gradients(scope, theta, batch, projections)
            columns["row"].append(rows)
            columns["batch"].append(torch.full_like(rows, number))
            columns["cosine"].append(scope.similarity(theta, batch).diagonal() / scope.scale)
            columns["positive"].append(positive.float())
            columns["negative"].append(negative.float())
        table.write(f"{start:09d}", {name: torch.cat(values).numpy() for name, values in columns.items()})
        yield Progress("Computing gradients", done, len(missing))


def _projections(
    store: Store, scope: HeadScope, theta: Tensor, batches: FeatureBatches
) -> tuple[HeadProjection, HeadProjection]:
    """The projections of both heads, computed once: all parts of the gradients must share them."""
    table = store.table("projections")
    if len(table.parts()) < 4:
        for head, projection in zip(
            ("image", "text"), principal_projections(scope, theta, batches.images, batches.texts), strict=True
        ):
            table.write(f"{head}-input", {"matrix": projection.input.numpy()})
            table.write(f"{head}-output", {"matrix": projection.output.numpy()})
    image, text = (
        HeadProjection(
            *(torch.from_numpy(table.read(f"{head}-{side}", "matrix")["matrix"]) for side in ("input", "output"))
        )
        for head in ("image", "text")
    )
    return image, text
