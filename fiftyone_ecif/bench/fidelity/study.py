"""One scope at its minimum, to take pairs from and retrain for real."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.bench.fidelity.world import World
from fiftyone_ecif.influence.direct import direct_influence
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.linear_solve import Solution, solve
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.influence.targets import Target
from fiftyone_ecif.progress import result_of


@dataclass
class Study:
    """One scope at its minimum, with a target.

    Attributes:
        name: of the scope.
        scope: what varies.
        objective: over the training pairs.
        theta: its minimum, shape ``(p,)``.
        target: what influence is measured on.
        tolerance: relative gradient norm that retraining reaches.
    """

    name: str
    scope: Scope
    objective: ContrastiveLoss
    theta: Tensor
    target: Target
    tolerance: float

    def retrain(self, removed: Tensor) -> Tensor:
        """The minimum without some pairs, from this minimum."""
        return minimum(self.objective.without(removed), self.tolerance, self.theta)

    def solution(self, solver: str, gradient: Tensor, tolerance: float | None = None) -> Tensor:
        """``H^-1 gradient`` with the curvature of a solver, shape ``(p,)``."""
        if not SOLVERS[solver].solves:
            return gradient
        return drive(solve(SOLVERS[solver].product(self.objective, self.theta), gradient, tolerance=tolerance))

    def influence(self, solution: Tensor, role: str = "exact") -> tuple[np.ndarray, np.ndarray]:
        """The positive and the negative part for every pair, ``(N,)`` each."""
        positive, negative, _ = result_of(direct_influence(self.objective, self.theta, [solution], role))
        return positive[0], negative[0]

    def change(self, theta: Tensor) -> float:
        """Of the target's mean loss against this minimum."""
        return (self.target.loss(theta) - self.target.loss(self.theta)).item()

    def accuracy(self, theta: Tensor) -> float:
        """Share of target pairs that find their partner in their batch."""
        return 1 - self.target.mistakes(theta).double().mean().item()


def make_study(
    world: World,
    name: str,
    pairs: int,
    seed: int,
    *,
    proximal: float = 1.0,
    batch_size: int = 128,
    tolerance: float = 1e-7,
    scale: float | None = None,
) -> Study:
    """Fits a scope and sets up its target.

    Args:
        world: pairs and model.
        name: of the scope.
        pairs: training pairs to take, the first of them.
        seed: of the partition.
        proximal (1.0): pull to the loaded weights.
        batch_size (128): of the partition.
        tolerance (1e-7): of the fit and of retraining.
        scale (None): another inverse temperature than the model's, for heads.
    """
    scope = world.scope(name)
    if scale is not None:
        assert isinstance(scope, HeadScope)
        scope = HeadScope(*scope.split(scope.start), scale)
    objective = ContrastiveLoss(scope, world.batches(name, torch.arange(pairs), batch_size, seed), pairs, proximal)
    theta = minimum(objective, tolerance)
    count = world.validation if name == "heads" else min(world.validation, 256)
    return Study(name, scope, objective, theta, world.target(name, scope, 32, count), tolerance)


def leave_one_out(study: Study, count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Which pairs were left out, and the true change of the target's loss for each."""
    rows = torch.randperm(study.objective.pairs, generator=torch.Generator().manual_seed(seed))[:count]
    return rows, np.array([study.change(study.retrain(row[None])) for row in rows])


def study_for(world: World, name: str, pairs: int) -> Study:
    """A study with the settings that suit its scope: small batches and a looser minimum in the towers."""
    if name == "heads":
        return make_study(world, name, pairs, 0)
    return make_study(world, name, pairs, 0, batch_size=32, tolerance=1e-5)


def minimum(objective: ContrastiveLoss, tolerance: float, start: Tensor | None = None) -> Tensor:
    """The minimum of an objective to a relative gradient norm, from the loaded weights or another start, ``(p,)``."""
    theta = objective.scope.start if start is None else start
    for theta, _ in minimise(objective, tolerance, start=start):  # noqa: B007  # the last one
        pass
    return theta


def drive(steps: Generator[float, None, Solution]) -> Tensor:
    """The vector that a solver ends with, shape ``(p,)``."""
    vector: Tensor = result_of(steps).vector
    return vector


def projected_scores(
    projection: Any, objective: ContrastiveLoss, theta: Tensor, role: str = "exact"
) -> tuple[np.ndarray, np.ndarray]:
    """Projected removal gradients of all pairs, in the order of the rows: positive and negative, ``(N, r)`` each."""
    parts = [projection.removal_gradients(theta, batch, role) for batch in objective.batches]
    order = torch.cat(list(objective.batches.partition)).argsort()
    positive, negative = (torch.cat([part[side] for part in parts])[order].numpy() for side in (0, 1))
    return positive, negative
