"""The parameters as if some pairs had never been in the objective, by one Newton step.

With ``L`` the objective of a run and ``L_`` the same without some pairs, whose
batches are left smaller, the step is ``theta + H_^-1 (grad L - grad L_)`` with
``H_`` the curvature of ``L_``. The gradient of the group is the true one, not a
sum over its pairs. At a stationary point of ``L`` this is the Newton step on
``L_``. Source: Section 5 of arXiv 2411.11667, which sums single pairs.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from fiftyone_ecif.influence.linear_solve import Solution, solve
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.solvers import SOLVERS


def removal_step(
    objective: ContrastiveLoss, theta: Tensor, rows: Tensor, solver: str, damping: float = 0.0, tolerance: float = 3e-2
) -> Generator[float, None, Solution]:
    """The change of the parameters when pairs are taken out of the objective.

    Args:
        objective: with the pairs.
        theta: its stationary point, shape ``(p,)``.
        rows: of the pairs to take out.
        solver: one of :data:`SOLVERS` with a curvature to solve with.
        damping (0.0): relative to the mean eigenvalue.
        tolerance (3e-2): relative residual of the solve; the step itself is seldom nearer to what retraining
            would do (docs/fidelity.md).

    Yields:
        the relative residual so far

    Raises:
        EcifError: if there is no such solver, it has no curvature, or the solve fails
    """
    left = objective.without(rows)
    gradient = group_gradient(objective, theta, rows)
    chosen = SOLVERS[solver]
    product, coarse = chosen.product(left, theta), chosen.coarse_product(left, theta)
    return (yield from solve(product, gradient, damping, tolerance, coarse))


def group_gradient(objective: ContrastiveLoss, theta: Tensor, rows: Tensor) -> Tensor:
    """The gradient of what some pairs add to the objective together, shape ``(p,)``."""
    touched = [batch for batch in objective.batches.partition if torch.isin(batch, rows).any()]
    part = ContrastiveLoss(objective.scope, objective.batches.regrouped(touched), objective.pairs)
    return part.gradient_and_value(theta)[0] - part.without(rows).gradient_and_value(theta)[0]
