"""Solving with the Hessian of the objective.

The influence of a pair on a target ``f`` is ``grad f . H^-1 g / N``. One solve
``s = H^-1 grad f`` a target serves every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from .errors import EcifError


class NegativeCurvatureError(EcifError):
    """The Hessian is not positive along the solve, which conjugate gradients need."""


@dataclass(frozen=True)
class Solution:
    """The solution of ``H x = b`` with what tells whether to trust it.

    Attributes:
        vector: ``x``, shape ``(p,)``.
        iterations: Hessian products used.
        residual: ``|b - H x| / |b|``, as the iteration keeps it.
        condition_number: the ratio of the largest to the smallest eigenvalue
            that the right-hand side meets (Ritz values of the solve).
    """

    vector: Tensor
    iterations: int
    residual: float
    condition_number: float


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float = 1e-6, max_iterations: int = 1000
) -> Iterator[Solution]:
    """Solves ``H x = b`` for a positive-definite ``H`` by conjugate gradients.

    Yields the state after each iteration, so that a caller can show progress or
    stop; the last one meets the tolerance.

    Args:
        product: maps ``v`` to ``H v``.
        right: ``b``, shape ``(p,)``.
        tolerance (1e-6): the relative residual to reach.
        max_iterations (1000): products to spend at most.

    Raises:
        NegativeCurvatureError: if ``H`` has negative curvature along the solve
        EcifError: if the tolerance is not reached
    """
    x, residual = torch.zeros_like(right), right.clone()
    direction, squared = residual.clone(), residual.dot(residual)
    norm = squared.sqrt()
    if norm == 0:
        yield Solution(x, 0, 0.0, 1.0)
        return
    steps: list[float] = []
    ratios: list[float] = []
    for iteration in range(1, max_iterations + 1):
        curved = product(direction)
        curvature = direction.dot(curved)
        if not torch.isfinite(curvature):
            raise EcifError("A Hessian product is not finite: the model's weights or features hold NaN or infinity")
        if curvature <= 0:
            raise NegativeCurvatureError(
                f"The Hessian has negative curvature ({(curvature / direction.dot(direction)).item():.2g}) along the "
                "solve: the model is too far from a minimum for influence functions. Set fit=True, or raise proximal"
            )
        step = squared / curvature
        x = x + step * direction
        residual = residual - step * curved
        ratio = residual.dot(residual) / squared
        squared = residual.dot(residual)
        steps.append(step.item())
        ratios.append(ratio.item())
        relative = (squared.sqrt() / norm).item()
        yield Solution(x, iteration, relative, _condition_number(steps, ratios))
        if relative <= tolerance:
            return
        direction = residual + ratio * direction
    raise EcifError(
        f"The solve did not converge in {max_iterations} Hessian products: the residual is {relative:.1e}, "
        f"the condition number about {_condition_number(steps, ratios):.1e}. Raise proximal"
    )


def _condition_number(steps: list[float], ratios: list[float]) -> float:
    """From the eigenvalues of the Lanczos matrix that conjugate gradients build on the way."""
    diagonal = np.array([1 / steps[0]] + [1 / a + b / c for a, b, c in zip(steps[1:], ratios, steps, strict=False)])
    off = np.sqrt(ratios[: len(steps) - 1]) / np.array(steps[:-1])
    ritz = eigvalsh_tridiagonal(diagonal, off)
    return float(ritz[-1] / max(ritz[0], np.finfo(float).tiny))
