"""Computing the projected gradients that a store keeps, and their curvature."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.objective import Batches, ContrastiveLoss
from fiftyone_ecif.influence.projections import (
    BasisProjection,
    Projection,
    gradient_basis,
    principal_projection,
    projection_from_state,
)
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.influence.targets import Target
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.store.tables import Store, Table

_BATCHES_A_PART = 8
_SAMPLED_PAIRS = 512  # that directions and the curvature between them are computed on
_DIRECTIONS = 128  # of a scope that is not the heads
_PAIR_COLUMNS = ("row", "batch", "image", "cosine", "loss", "positive", "negative")
_TARGET_COLUMNS = ("row", "image", "loss", "mistake", "gradient")


def keep_gradients(
    store: Store, objective: ContrastiveLoss, theta: Tensor, targets: Mapping[str, Target], options: ScoringOptions
) -> Generator[Progress, None, Projection]:
    """Writes projected gradients and their curvature to the store, as far as they are not there."""
    scope, batches, processes = objective.scope, objective.batches, objective.processes
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
        for name, target, start in processes.share(work)
        if f"{start:09d}" not in there[name]
    ]
    curvature = store.table("projected-curvature")
    solver = SOLVERS[options.solver]
    lacks_curvature = processes.first and solver.solves and solver.name not in curvature.parts()
    total = len(missing) + lacks_curvature
    for done, (table, target, start) in enumerate(missing, start=1):
        if target is None:
            _write_pairs(table, scope, theta, batches, start, projection, options.role)
        else:
            _write_targets(table, target, theta, start, projection)
        yield Progress("Computing gradients", done, total)
    if lacks_curvature:
        part = _sample(scope, batches, objective.proximal)
        matrix = solver.projected_curvature(projection, part, theta)
        curvature.write(solver.name, {"matrix": matrix.cpu().double().numpy()})
        yield Progress("Computing gradients", total, total)
    processes.wait()
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
    table, scope, batches, processes = (
        store.table("projection"),
        objective.scope,
        objective.batches,
        objective.processes,
    )
    known = "whole" in table.parts()
    processes.wait()
    if not known:
        yield Progress("Computing gradients", 0, 1)
        if isinstance(scope, HeadScope):
            own = (batches[index] for index in processes.share(range(len(batches))))
            chosen: Projection = principal_projection(scope, theta, own, processes=processes)
        else:
            share = max(_DIRECTIONS // 2 // len(targets), 1)
            sources = [(_sample(scope, batches), _DIRECTIONS // 2)]
            sources += [(_sample(scope, target.batches), share) for target in targets.values()]
            chosen = BasisProjection(scope, gradient_basis(theta, sources))
        for name, value in chosen.state().items() if processes.first else ():
            table.write(name, {"matrix": value.cpu().numpy()})
        if processes.first:
            table.write("whole", {"matrix": np.ones(1)})  # the last: all that belongs to it is there
        processes.wait()
    names = [name for name in table.parts() if name != "whole"]
    state = {name: torch.from_numpy(table.read(name, "matrix")["matrix"]) for name in names}
    return projection_from_state(scope, state)
