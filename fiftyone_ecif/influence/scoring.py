"""Scores of pairs: fit, solve, gradients, one pass.

Arrays in, arrays out. What a partition fixes (the fitted parameters, the
projected gradients and the curvature between them) is kept in the run's store
and read back by the next run with the same store: for heads whatever its target,
for deeper scopes, whose gradients are kept in directions that suit the target,
with the same target.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.collapse import COLLAPSED, smallest_norm
from fiftyone_ecif.influence.direct import direct_influence
from fiftyone_ecif.influence.fitting import stationary_point
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.linear_solve import Solution, solve, solving
from fiftyone_ecif.influence.objective import Batches, ContrastiveLoss
from fiftyone_ecif.influence.projected_gradients import keep_gradients
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.influence.targets import Target
from fiftyone_ecif.progress import Progress, piece
from fiftyone_ecif.store.tables import Store


@dataclass(frozen=True)
class Scores:
    """Influence of each pair on each target and what tells how far to trust it.

    Attributes:
        positive: the part from the pair's own loss, shape ``(T, N)``.
        negative: the part from serving as a negative of others, likewise.
        diagnostics: see :func:`fiftyone_ecif.compute_influence`.
    """

    positive: np.ndarray
    negative: np.ndarray
    diagnostics: dict[str, Any]


def score_pairs(
    store: Store,
    scope: Scope,
    batches: Batches,
    targets: Mapping[str, Target],
    options: ScoringOptions,
    processes: ProcessGroup = ALONE,
) -> Generator[Progress, None, Scores]:
    """Influence of training pairs on the mean losses of targets.

    Args:
        store: of this partition of these pairs.
        scope: what is attributed.
        batches: the training pairs.
        targets: name -> target; the name is a table's in the store.
        options: how.
        processes (ALONE): the processes that share the batches; each calls this and
            gets all scores.

    Raises:
        EcifError: if the solver or the role is not available, the fit or a solve does
            not converge, or an embedding has collapsed
    """
    scope.loss.check_role(options.role)
    pairs = sum(len(rows) for rows in batches.partition)
    kept = GradientStore(store, pairs, options.solver, options.damping)
    solver = kept.solver
    objective = ContrastiveLoss(scope, batches, pairs, options.proximal, processes)
    theta, relative_gradient_norm = yield from stationary_point(kept, objective, options.fit, options.must_converge)
    smallest_norm = _smallest_norm(objective, theta)
    product = solver.product(objective, theta) if solver.solves else None
    coarse = solver.coarse_product(objective, theta) if solver.solves else None

    solutions: list[Solution] = []
    gradients: list[Tensor] = []
    losses: list[float] = []
    for number, target in enumerate(targets.values()):
        gradient, loss = target.gradient_and_value(theta)
        gradients.append(gradient)
        losses.append(loss.item())
        if product is not None:
            steps = solving(solve(product, gradient, options.damping, coarse=coarse))
            solutions.append((yield from piece(steps, number, len(targets))))
    diagnostics: dict[str, Any] = {
        "parameters": len(theta),
        "relative_gradient_norm": relative_gradient_norm,
        "smallest_norm": smallest_norm,
        "target_loss": float(np.mean(losses)),
    }
    if solutions:
        diagnostics |= {
            "damping": max(solution.damping for solution in solutions),
            "solve_residual": max(solution.residual for solution in solutions),
            "solve_iterations": sum(solution.iterations for solution in solutions),
            "condition_number": max(solution.condition_number for solution in solutions),
        }

    projected: np.ndarray | None = None
    if options.keep_gradients or solver.needs_gradients:
        projection = yield from keep_gradients(
            kept, objective, theta, targets, options.role, options.gradient_tolerance
        )
        projected = np.stack([projection.project(gradient).cpu().double().numpy() for gradient in gradients])
        if objective.processes.first:
            kept.effects()  # which writes them: tracing is then quick
        objective.processes.wait()
    if solver.needs_gradients:
        assert projected is not None
        positive, negative = (kept.influence(projected, [role]).astype(np.float64) for role in ("positive", "negative"))
        mean_loss = ContrastiveLoss(scope, batches, pairs, processes=processes).loss(theta).item()  # unpulled
    else:
        vectors = [solution.vector for solution in solutions] or gradients
        positive, negative, mean_loss = yield from direct_influence(objective, theta, vectors, options.role)
        if projected is not None:
            diagnostics["cached_correlation"] = _correlation(kept.influence(projected), positive + negative)
    return Scores(positive, negative, diagnostics | {"training_loss": mean_loss})


def _smallest_norm(objective: ContrastiveLoss, theta: Tensor) -> float:
    """See :func:`smallest_norm`; refused where an embedding has collapsed."""
    smallest = smallest_norm(objective.coarse(), theta)
    if not smallest >= COLLAPSED:
        raise EcifError(
            f"An embedding has collapsed: its length before normalisation is {smallest:.1e} of the median, and no "
            "score can be trusted then. Raise proximal, or use weights that are not overfitted"
        )
    return smallest


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over targets of Pearson's correlation, 0 where there is no variance."""
    found = [np.corrcoef(x, y)[0, 1] if x.std() and y.std() else 0.0 for x, y in zip(a, b, strict=True)]
    return float(np.mean(found))
