"""Scores of pairs: fit, solve, gradients, one pass.

Arrays in, arrays out. What a partition fixes (the fitted parameters, the
projected gradients and the curvature between them) is kept in the run's store
and read back by the next run with the same store: for heads whatever its target,
for deeper scopes, whose gradients are kept in directions that suit the target,
with the same target.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .cached import read_effects, stored_influence
from .curvature import Solution, curvature_at, solve
from .errors import EcifError
from .fitting import minimise
from .gradients import (
    BasisProjection,
    Projection,
    gradient_basis,
    principal_projection,
    projection_from_state,
)
from .heads import HeadScope
from .influence import batch_influence
from .objective import Batches, ContrastiveLoss
from .progress import Progress
from .ranks import ALONE, Ranks
from .scope import Scope
from .store import Store, Table
from .targets import Target

_COLLAPSED = 1e-3
_BATCHES_A_PART = 8
_SAMPLED_PAIRS = 512  # that directions and the curvature between them are computed on
_DIRECTIONS = 128  # of a scope that is not the heads
_PAIR_COLUMNS = ("row", "batch", "image", "cosine", "loss", "positive", "negative")
_TARGET_COLUMNS = ("row", "image", "loss", "mistake", "gradient")


@dataclass(frozen=True)
class Method:
    """How influence is computed.

    Attributes:
        fit: whether to bring the scope to a stationary point first.
        proximal: strength of the pull to the parameters as loaded.
        role: one of ``choices.ROLES``.
        solver: one of ``choices.SOLVERS``.
        damping: relative to the mean eigenvalue of the curvature.
        keep_gradients: whether projected gradients are computed and stored.
    """

    fit: bool = False
    proximal: float = 1.0
    role: str = "exact"
    solver: str = "hessian"
    damping: float = 0.0
    keep_gradients: bool = True


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
    store: Store, scope: Scope, batches: Batches, targets: Mapping[str, Target], method: Method, ranks: Ranks = ALONE
) -> Generator[Progress, None, Scores]:
    """Influence of training pairs on the mean losses of targets.

    Args:
        store: of this partition of these pairs.
        scope: what is attributed.
        batches: the training pairs.
        targets: name -> target; the name is a table's in the store.
        method: how.
        ranks (ALONE): the processes that share the batches; each calls this and
            gets all scores.

    Raises:
        EcifError: if the fit or a solve does not converge, or an embedding has
            collapsed
    """
    pairs = sum(len(rows) for rows in batches.partition)
    objective = ContrastiveLoss(scope, batches, pairs, method.proximal, ranks)
    theta, relative_gradient_norm = yield from stationary_point(store, objective, method.fit)
    smallest_norm = _smallest_norm(objective, theta)
    product = curvature_at(objective, theta, method.solver) if method.solver in ("hessian", "ggn") else None

    solutions: list[Solution] = []
    gradients: list[Tensor] = []
    losses: list[float] = []
    for target in targets.values():
        gradient, loss = target.gradient_and_value(theta)
        gradients.append(gradient)
        losses.append(loss.item())
        if product is not None:
            solutions.append((yield from solving(solve(product, gradient, method.damping))))
    diagnostics: dict[str, Any] = {
        "parameters": len(theta),
        "relative_gradient_norm": relative_gradient_norm,
        "smallest_norm": smallest_norm,
        "training_loss": ContrastiveLoss(scope, batches, pairs, ranks=ranks).loss(theta).item(),  # without the pull
        "target_loss": float(np.mean(losses)),
    }
    if solutions:
        diagnostics |= {
            "damping": max(solution.damping for solution in solutions),
            "solve_residual": max(solution.residual for solution in solutions),
            "solve_iterations": sum(solution.iterations for solution in solutions),
            "condition_number": max(solution.condition_number for solution in solutions),
        }

    projection: Projection | None = None
    if method.keep_gradients or method.solver == "logra":
        projection = yield from keep_gradients(store, objective, theta, targets, method)
        projected = np.stack([projection.project(gradient).cpu().double().numpy() for gradient in gradients])
        from_store = partial(stored_influence, store, method.solver, method.damping, projected, pairs)
        if objective.ranks.first:
            read_effects(store, method.solver, method.damping, pairs)  # which writes them: tracing is then quick
        objective.ranks.wait()
    if method.solver == "logra":
        positive, negative = (from_store(columns=[part]).astype(np.float64) for part in ("positive", "negative"))
    else:
        vectors = [solution.vector for solution in solutions] or gradients
        positive, negative = yield from direct_influence(objective, theta, vectors, method.role)
        if projection is not None:
            diagnostics["cached_correlation"] = _correlation(from_store(), positive + negative)
    return Scores(positive, negative, diagnostics)


def stationary_point(
    store: Store, objective: ContrastiveLoss, fit: bool
) -> Generator[Progress, None, tuple[Tensor, float]]:
    """The parameters to score at and their relative gradient norm, from the store where they are."""
    table = store.table("parameters")
    start = objective.scope.start
    known = bool(table.parts())
    objective.ranks.wait()  # before one writes what another looks for
    if known:
        found = table.read("0", "theta", "relative_gradient_norm")
        return torch.from_numpy(found["theta"][0]).to(start), float(found["relative_gradient_norm"][0])
    theta = start
    if fit:
        tolerance = 1e-5 if start.dtype == torch.float64 else 1e-3
        for fitted, relative in minimise(objective, tolerance):
            theta = fitted
            yield Progress("Fitting", _percent(relative, tolerance), 100)
    else:
        relative = (objective.gradient_and_value(theta)[0].norm() / objective.gradient_scale(theta)).item()
    if objective.ranks.first:
        table.write("0", {"theta": theta.cpu().numpy()[None], "relative_gradient_norm": np.array([relative])})
    return theta, relative


def direct_influence(
    objective: ContrastiveLoss, theta: Tensor, vectors: list[Tensor], role: str
) -> Generator[Progress, None, tuple[np.ndarray, np.ndarray]]:
    """Influence of every pair along some solutions, by one forward-mode pass a batch and solution.

    Args:
        objective: over the pairs, ``N`` of them.
        theta: the parameters, shape ``(p,)``.
        vectors: ``H^-1 grad f`` of each target, shape ``(p,)``.
        role: one of ``choices.ROLES``.

    Returns:
        the positive and the negative part, ``(len(vectors), N)`` each; positive = valuable
    """
    scores = torch.zeros(2, len(vectors), objective.pairs, dtype=torch.float64)
    batches = objective.batches
    own = objective.ranks.share(range(len(batches)))
    for done, index in enumerate(own, start=1):
        batch, rows = batches[index], batches.partition[index]
        for number, vector in enumerate(vectors):
            parts = batch_influence(objective.scope, theta, batch, vector, objective.pairs, role)
            scores[:, number, rows] = torch.stack(parts).detach().cpu().double()
        yield Progress("Scoring", done, len(own))
    positive, negative = objective.ranks.total(scores).numpy()
    return positive, negative


def _smallest_norm(objective: ContrastiveLoss, theta: Tensor) -> float:
    """The shortest embedding over the median, before normalisation; the smaller of both towers."""
    with torch.no_grad():
        own = [
            torch.stack([part.norm(dim=1) for part in objective.scope.embed(theta, objective.batches[index])], dim=1)
            for index in objective.ranks.share(range(len(objective.batches)))
        ]
    norms = torch.cat(objective.ranks.gather([part.cpu() for part in own]))
    smallest = (norms.min(0).values / norms.median(0).values).min().item()
    if not smallest >= _COLLAPSED:
        raise EcifError(
            f"An embedding has collapsed: its length before normalisation is {smallest:.1e} of the median, and no "
            "score can be trusted then. Raise proximal, or use weights that are not overfitted"
        )
    return smallest


def solving(steps: Generator[float, None, Solution]) -> Generator[Progress, None, Solution]:
    """A solve that shows its progress."""
    try:
        while True:
            yield Progress("Solving", _percent(next(steps), 1e-6), 100)
    except StopIteration as end:
        solution: Solution = end.value
        return solution


def _percent(value: float, goal: float) -> int:
    """How far a value that falls geometrically from 1 is on its way to the goal."""
    return int(100 * min(max(math.log(max(value, goal)) / math.log(goal), 0.0), 1.0))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over targets of Pearson's correlation, 0 where there is no variance."""
    found = [np.corrcoef(x, y)[0, 1] if x.std() and y.std() else 0.0 for x, y in zip(a, b, strict=True)]
    return float(np.mean(found))


def keep_gradients(
    store: Store, objective: ContrastiveLoss, theta: Tensor, targets: Mapping[str, Target], method: Method
) -> Generator[Progress, None, Projection]:
    """Writes projected gradients and their curvature to the store, as far as they are not there."""
    scope, batches, ranks = objective.scope, objective.batches, objective.ranks
    projection = yield from _projection(store, objective, theta, targets)
    tables: dict[str, Target | None] = {"gradients": None, **targets}
    there = {name: set(store.table(name).parts()) for name in tables}
    work = [
        (name, target, start)
        for name, target in tables.items()
        for start in range(0, len(target.batches if target else batches), _BATCHES_A_PART)
    ]
    missing = [
        (store.table(name), target, start)
        for name, target, start in ranks.share(work)
        if f"{start:09d}" not in there[name]
    ]
    curvature = store.table("projected-curvature")
    wanted = ranks.first and method.solver in ("hessian", "ggn")
    lacks_curvature = wanted and method.solver not in curvature.parts()
    total = len(missing) + lacks_curvature
    for done, (table, target, start) in enumerate(missing, start=1):
        if target is None:
            _write_pairs(table, scope, theta, batches, start, projection, method.role)
        else:
            _write_targets(table, target, theta, start, projection)
        yield Progress("Computing gradients", done, total)
    if lacks_curvature:
        part = _sample(scope, batches, objective.proximal)
        matrix = projection.objective_curvature(part, theta, method.solver)
        curvature.write(method.solver, {"matrix": matrix.cpu().double().numpy()})
        yield Progress("Computing gradients", total, total)
    ranks.wait()
    return projection


def _sample(scope: Scope, batches: Batches, proximal: float = 0.0) -> ContrastiveLoss:
    """The objective on the first batches: enough for directions and their curvature."""
    count, chosen = 0, list[Tensor]()
    for rows in batches.partition:
        if not chosen or count + len(rows) <= _SAMPLED_PAIRS:
            chosen, count = [*chosen, rows], count + len(rows)
    return ContrastiveLoss(scope, batches.regrouped(chosen), count, proximal)


def _write_pairs(
    table: Table, scope: Scope, theta: Tensor, batches: Batches, start: int, projection: Projection, role: str
) -> None:
    columns: dict[str, list[Tensor]] = {name: [] for name in _PAIR_COLUMNS}
    for number in range(start, min(start + _BATCHES_A_PART, len(batches))):
        batch, rows = batches[number], batches.partition[number]
        positive, negative = projection.removal_gradients(theta, batch, role)
        images, captions = (normalize(part, dim=1) for part in scope.embed(theta, batch))
        cosine = images @ captions.T
        columns["row"].append(rows)
        columns["image"].append(images.float())
        columns["batch"].append(torch.full_like(rows, number))
        columns["cosine"].append(cosine.diagonal())
        columns["loss"].append(scope.loss.own_losses(scope.logits(theta, cosine)))
        columns["positive"].append(positive.float())
        columns["negative"].append(negative.float())
    table.write(f"{start:09d}", _arrays(columns))


def _write_targets(table: Table, target: Target, theta: Tensor, start: int, projection: Projection) -> None:
    columns: dict[str, list[Tensor]] = {name: [] for name in _TARGET_COLUMNS}
    for number in range(start, min(start + _BATCHES_A_PART, len(target.batches))):
        batch, rows = target.batches[number], target.batches.partition[number]
        columns["row"].append(rows)
        columns["image"].append(normalize(target.scope.embed_images(theta, batch[0]), dim=1).float())
        columns["loss"].append(target.batch_losses(theta, rows, batch))
        columns["mistake"].append(target.batch_mistakes(theta, rows, batch))
        gradients = projection.jacobian(lambda at, r=rows, b=batch: target.batch_losses(at, r, b), theta)  # type: ignore[misc]
        columns["gradient"].append(gradients.float())
    table.write(f"{start:09d}", _arrays(columns))


def _arrays(columns: Mapping[str, list[Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.cat(values).detach().cpu().numpy() for name, values in columns.items()}


def _projection(
    store: Store, objective: ContrastiveLoss, theta: Tensor, targets: Mapping[str, Target]
) -> Generator[Progress, None, Projection]:
    """The directions that gradients are kept in, chosen once: all parts of the gradients must share them."""
    table, scope, batches, ranks = store.table("projection"), objective.scope, objective.batches, objective.ranks
    known = "whole" in table.parts()
    ranks.wait()
    if not known:
        yield Progress("Computing gradients", 0, 1)
        if isinstance(scope, HeadScope):
            own = (batches[index] for index in ranks.share(range(len(batches))))
            chosen: Projection = principal_projection(scope, theta, own, ranks=ranks)
        else:
            share = max(_DIRECTIONS // 2 // len(targets), 1)
            sources = [(_sample(scope, batches), _DIRECTIONS // 2)]
            sources += [(_sample(scope, target.batches), share) for target in targets.values()]
            chosen = BasisProjection(scope, gradient_basis(theta, sources))
        for name, value in chosen.state().items() if ranks.first else ():
            table.write(name, {"matrix": value.cpu().numpy()})
        if ranks.first:
            table.write("whole", {"matrix": np.ones(1)})  # the last: all that belongs to it is there
        ranks.wait()
    names = [name for name in table.parts() if name != "whole"]
    state = {name: torch.from_numpy(table.read(name, "matrix")["matrix"]) for name in names}
    return projection_from_state(scope, state)
