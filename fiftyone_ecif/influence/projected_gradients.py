"""Computing the projected gradients that a store keeps, and their curvature."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.influence.gradient_store import GradientStore, MatchRows, PairRows, TargetRows
from fiftyone_ecif.influence.objective import Batches, ContrastiveLoss
from fiftyone_ecif.influence.projections import PROJECTIONS, Projection
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.targets import Target
from fiftyone_ecif.influence.tower_gradients import TOLERANCE
from fiftyone_ecif.progress import Progress

_BATCHES_A_PART = 8


def keep_gradients(
    store: GradientStore,
    objective: ContrastiveLoss,
    theta: Tensor,
    targets: Mapping[str, Target],
    role: str = "exact",
    tolerance: float = TOLERANCE,
) -> Generator[Progress, None, Projection]:
    """Writes projected gradients and their curvature to the store, as far as they are not there.

    Args:
        store: of the partition of the objective.
        objective: over the pairs.
        theta: where, shape ``(p,)``.
        targets: name -> target.
        role ("exact"): one of ``roles.ROLES``.
        tolerance (0.01): of the gradients, see :func:`tower_gradients`.

    Returns:
        what the gradients are projected by
    """
    scope, batches, processes = objective.scope, objective.batches, objective.processes
    projection = yield from _projection(store, objective, theta, targets)
    coarse = projection.coarse()
    sources: dict[str | None, Batches] = {None: batches, **{name: target.batches for name, target in targets.items()}}
    there = {name: store.written(name) for name in sources}
    parts = [(name, start) for name, source in sources.items() for start in range(0, len(source), _BATCHES_A_PART)]
    missing = [(name, start) for name, start in processes.share(parts) if start not in there[name]]
    lacks_curvature = processes.first and store.solver.solves and not store.has_curvature()
    total = len(missing) + lacks_curvature
    for done, (name, start) in enumerate(missing, start=1):
        numbers = range(start, min(start + _BATCHES_A_PART, len(sources[name])))
        if name is None:
            rows = [
                _pair_rows(scope, theta, batches, stack, coarse, role, tolerance) for stack in batches.stacks(numbers)
            ]
            store.write_pairs(start, rows)
        else:
            found = [_target_rows(targets[name], theta, number, projection) for number in numbers]
            store.write_target(name, start, [rows for rows, _ in found], [matches for _, matches in found])
        yield Progress("Computing gradients", done, total)
    if lacks_curvature:
        matrix = store.solver.projected_curvature(projection, objective.sample(), theta)
        store.write_curvature(_array(matrix.double()))
        yield Progress("Computing gradients", total, total)
    processes.wait()
    return projection


def _pair_rows(
    scope: Scope,
    theta: Tensor,
    batches: Batches,
    stack: Sequence[int],
    projection: Projection,
    role: str,
    tolerance: float,
) -> PairRows:
    """What is kept of a stack of batches."""
    (batch,), rows = batches.each([stack]), batches.rows(stack)
    embeddings = scope.embed(theta, batch)
    positive, negative = projection.removal_gradients(theta, batch, role, tolerance, embeddings)
    images, captions = (normalize(part, dim=-1) for part in embeddings)
    cosine = images @ captions.mT
    losses = scope.loss_of(batch).own_losses(scope.logits(theta, cosine))
    return PairRows(
        row=_array(rows.flatten()),
        batch=np.repeat(np.asarray(stack, dtype=np.int64), rows.shape[-1]),
        image=_array(images.float().flatten(0, -2)),
        cosine=_array(cosine.diagonal(dim1=-2, dim2=-1).flatten()),
        loss=_array(losses.flatten()),
        positive=_array(positive.float().flatten(0, -2)),
        negative=_array(negative.float().flatten(0, -2)),
    )


def _target_rows(target: Target, theta: Tensor, number: int, projection: Projection) -> tuple[TargetRows, MatchRows]:
    """What is kept of one batch of a target."""
    batch, rows = target.batches[number], target.batches.partition[number]
    gradients = projection.jacobian(lambda scope, at: target.on(scope).batch_losses(at, rows, batch), theta)
    matches = target.batch_matches(theta, rows, batch)
    kept = TargetRows(
        row=_array(rows),
        image=_array(normalize(target.scope.embed_images(theta, batch[0]), dim=1).float()),
        loss=_array(target.batch_losses(theta, rows, batch)),
        mistake=_array(matches.mistakes),
        gradient=_array(gradients.float()),
    )
    return kept, MatchRows(_array(rows), *map(_array, matches))


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


def _projection(
    store: GradientStore, objective: ContrastiveLoss, theta: Tensor, targets: Mapping[str, Target]
) -> Generator[Progress, None, Projection]:
    """The directions that gradients are kept in, chosen once: all parts of the gradients must share them."""
    kind, processes = PROJECTIONS[objective.scope.projection], objective.processes
    known = store.directions() is not None
    processes.wait()
    if not known:
        yield Progress("Computing gradients", 0, 1)
        chosen = kind.choose(objective, theta, [target.batches for target in targets.values()])
        if processes.first:
            store.write_directions({name: _array(value) for name, value in chosen.state().items()})
        processes.wait()
    state = store.directions()
    assert state is not None
    return kind.from_state(objective.scope, {name: torch.from_numpy(matrix) for name, matrix in state.items()})
