"""Stored gradients of a deep scope against direct scores."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.bench.fidelity.agreement import mean_pearson
from fiftyone_ecif.bench.fidelity.sizes import ROUGH, Row, Sizes
from fiftyone_ecif.bench.fidelity.sketch import sketched_gradients
from fiftyone_ecif.bench.fidelity.study import study_for
from fiftyone_ecif.bench.fidelity.world import World
from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.damping import damped
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.projections import BasisProjection, gradient_basis
from fiftyone_ecif.influence.tower_gradients import tower_gradients


def cached(world: World, sizes: Sizes) -> list[Row]:
    """Deep cached mode: gradients by reverse mode along leading directions, or by a forward-mode sketch.

    Both are kept in the same kind of directions and held against the direct
    influence on single target pairs, with the Gauss-Newton matrix as curvature.
    """
    study = study_for(world, sizes.lora, sizes.lora_pairs)
    objective, theta, target = study.objective, study.theta, study.target
    rows_of, inputs = target.batches.partition[0], target.batches[0]
    gradients = torch.func.jacrev(lambda at: target.batch_losses(at, rows_of, inputs), chunk_size=8)(theta)[:4]
    direct = np.array([np.sum(study.influence(study.solution("ggn", row, ROUGH)), axis=0) for row in gradients])
    order = torch.cat(list(objective.batches.partition)).argsort()
    sources = (objective, ContrastiveLoss(study.scope, target.batches, 1))
    half = sizes.directions // 2
    drawn = gradient_basis(theta, [(source, half) for source in sources])
    curvature = BasisProjection(study.scope, drawn).gauss_newton(objective, theta)

    def row(
        way: str, size: float, columns: Tensor, gradients_of: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    ) -> Row:
        basis = drawn[:, columns]
        start = time.perf_counter()
        parts = [gradients_of(batch, basis) for batch in objective.batches]
        seconds = time.perf_counter() - start
        positive, negative = (torch.cat([part[side] for part in parts])[order].numpy() for side in (0, 1))
        store = CachedGradients(positive, negative, damped(curvature[columns][:, columns].numpy()), len(positive))
        scores = np.sum(store.influence((gradients @ basis).numpy()), axis=0)
        return {"way": way, "size": size, "seconds": seconds, "pearson": mean_pearson(scores, direct)}

    found = []
    for rank in (16, half, 2 * half):
        columns = torch.cat([torch.arange(rank // 2), half + torch.arange(rank // 2)])
        sketch = partial(sketched_gradients, study.scope, theta)
        found.append(row("forward sketch, directions", rank, columns, sketch))
    whole, first = torch.arange(2 * half), objective.batches[0]
    exact, _ = tower_gradients(study.scope, theta, first, tolerance=0.0)
    for tolerance in (0.0, 0.001, 0.01, 0.1):
        reverse = partial(tower_gradients, study.scope, theta, tolerance=tolerance)

        def only_gradients(batch: Any, basis: Tensor, of: Any = reverse) -> tuple[Tensor, Tensor]:
            return of(batch, basis=basis)[0]  # type: ignore[no-any-return]

        found.append(row("leading directions, tolerance", tolerance, whole, only_gradients))
        short, spent = reverse(first)
        error = short[0] + short[1] - exact[0] - exact[1]
        found[-1] |= {
            "gradient_error": (error.norm() / (exact[0] + exact[1]).norm()).item(),
            "directions": spent,
        }
    return found
