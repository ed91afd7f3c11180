"""What scores depend on: batch size, temperature, damping, projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from fiftyone_ecif.bench.fidelity.agreement import agreement, pearson, spearman
from fiftyone_ecif.bench.fidelity.sizes import Row, Sizes
from fiftyone_ecif.bench.fidelity.study import Study, drive, leave_one_out, make_study, minimum, projected_scores
from fiftyone_ecif.bench.fidelity.world import World
from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.curvature import hessian_at
from fiftyone_ecif.influence.damping import damped
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import solve
from fiftyone_ecif.influence.projections import principal_projection
from fiftyone_ecif.influence.solvers import LoGra


def sensitivity(world: World, sizes: Sizes) -> list[Row]:
    """What scores depend on; each row a setting and what it does to the agreement with retraining."""
    rows: list[Row] = []
    count, pairs = max(sizes.removals // 2, 8), min(sizes.pairs, sizes.sensitivity_pairs)

    def measured(study: Study, what: str, value: Any) -> Row:
        left_out, true = leave_one_out(study, count, 0)
        gradient, _ = study.target.gradient_and_value(study.theta)
        scores = np.sum(study.influence(study.solution("hessian", gradient)), axis=0)
        return {"what": what, "value": value} | agreement([(scores[left_out.numpy()], true)])

    for proximal in (0.3, 1.0, 3.0):
        rows.append(measured(make_study(world, "heads", pairs, 0, proximal=proximal), "proximal", proximal))
    for batch_size in (32, 128, 512):
        rows.append(measured(make_study(world, "heads", pairs, 0, batch_size=batch_size), "batch_size", batch_size))
    for scale in (5.0, 20.0):
        rows.append(measured(make_study(world, "heads", pairs, 0, scale=scale), "inverse_temperature", scale))

    study = make_study(world, "heads", pairs, 0)
    left_out, true = leave_one_out(study, count, 0)
    gradient, _ = study.target.gradient_and_value(study.theta)
    base = np.sum(study.influence(study.solution("hessian", gradient)), axis=0)
    for damping in (0.0, 0.1, 1.0):
        solution = drive(solve(hessian_at(study.objective, study.theta), gradient, damping))
        scores = np.sum(study.influence(solution), axis=0)
        rows.append({"what": "damping", "value": damping} | agreement([(scores[left_out.numpy()], true)]))
    for tolerance in (1e-1, 1e-2, 1e-3):
        away = replace(study, theta=minimum(study.objective, tolerance))
        direction, _ = away.target.gradient_and_value(away.theta)
        scores = np.sum(away.influence(away.solution("hessian", direction)), axis=0)
        rows.append(
            {"what": "relative_gradient_norm", "value": tolerance} | agreement([(scores[left_out.numpy()], true)])
        )
    rows += _projection_sensitivity(study, gradient, base)
    for validation in (32, 128):
        target = world.target("heads", study.scope, 32, validation)
        part, _ = target.gradient_and_value(study.theta)
        scores = np.sum(study.influence(study.solution("hessian", part)), axis=0)
        rows.append({"what": "validation_pairs", "value": validation, "spearman": spearman(scores, base)})
    each = []
    for seed in range(1, 5):
        other = make_study(world, "heads", pairs, seed)
        part, _ = other.target.gradient_and_value(other.theta)
        each.append(np.sum(other.influence(other.solution("hessian", part)), axis=0))
    rows.append({"what": "n_partitions", "value": 1, "spearman": spearman(each[0], each[1])})
    rows.append({"what": "n_partitions", "value": 2, "spearman": spearman(each[0] + each[1], each[2] + each[3])})
    return rows


def _projection_sensitivity(study: Study, gradient: Tensor, base: np.ndarray) -> Iterator[Row]:
    """How well influence from stored gradients agrees with the direct one, by rank and curvature."""
    objective, theta, scope = study.objective, study.theta, study.scope
    assert isinstance(scope, HeadScope)
    assert isinstance(objective.batches, FeatureBatches)
    for rank in (8, 16, 32):
        projection = principal_projection(scope, theta, objective.batches, rank)
        positive, negative = projected_scores(projection, objective, theta)
        target = projection.project(gradient).numpy()[None]
        for name, matrix in (
            ("logra", LoGra().stored_curvature([positive + negative])),
            ("hessian", damped(projection.hessian(objective, theta).numpy())),
        ):
            scores = np.sum(CachedGradients(positive, negative, matrix, len(positive)).influence(target), axis=0)[0]
            yield {"what": f"projection_rank_{name}", "value": rank, "pearson": pearson(scores, base)}
