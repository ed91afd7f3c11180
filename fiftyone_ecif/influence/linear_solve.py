"""Solving with the curvature of the objective.

The influence of a pair on a target ``f`` is ``grad f . H^-1 g / N``. One solve
``s = H^-1 grad f`` a target serves every pair.

Damping is relative to the mean eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.curvature import CoarseProduct, Product
from fiftyone_ecif.influence.damping import enough_damping
from fiftyone_ecif.progress import Progress

_DENSE = 512  # parameters up to which the matrix is factorised
_PROBES = 4


class NegativeCurvatureError(EcifError):
    """The matrix is not positive along the solve, which conjugate gradients need.

    Attributes:
        curvature: what was met, at most zero: an upper bound of the smallest eigenvalue.
    """

    def __init__(self, message: str, curvature: float) -> None:
        super().__init__(message)
        self.curvature = curvature


@dataclass(frozen=True)
class Solution:
    """The solution of ``H x = b`` with what tells whether to trust it.

    Attributes:
        vector: ``x``, shape ``(p,)``.
        iterations: products used.
        residual: ``|b - H x| / |b|``, as the iteration keeps it; at last, if steps were coarse, what that and their
            error add up to, or as an exact product has it.
        condition_number: the ratio of the largest to the smallest eigenvalue;
            with conjugate gradients, of those that the right-hand side meets
            (Ritz values of the solve).
        damping: what was added to the diagonal, relative to the mean eigenvalue.
    """

    vector: Tensor
    iterations: int
    residual: float
    condition_number: float
    damping: float = 0.0


def solve(
    product: Product,
    right: Tensor,
    damping: float = 0.0,
    tolerance: float | None = None,
    coarse: CoarseProduct | None = None,
) -> Generator[float, None, Solution]:
    """Solves ``(H + damping * mean eigenvalue) x = b``, damping more where that is not positive.

    A small problem is factorised, a larger one is solved by conjugate gradients.
    If the matrix turns out to have negative curvature, which happens away from a
    minimum, the least of ``2^-10, 2^-9 ...`` that mends it is taken as damping.

    Args:
        product: maps ``v`` to ``H v``.
        right: ``b``, shape ``(p,)``.
        damping (0.0): at least; relative to the mean eigenvalue.
        tolerance (None): the relative residual to reach; by default 1e-6 in
            float64 and 1e-3 in float32.
        coarse (None): a cheaper product, nearly the same, for the steps of conjugate gradients.

    Yields:
        the relative residual so far

    Raises:
        EcifError: if the tolerance is not reached or no damping helps
    """
    if tolerance is None:
        tolerance = 1e-6 if right.dtype == torch.float64 else 1e-3
    if len(right) <= _DENSE:
        return _solve_dense(product, right, damping)
    mean = mean_eigenvalue(product, right) if damping else 0.0
    while True:
        shift = damping * mean
        try:
            solution = None
            cheap = coarse and coarse._replace(product=partial(_shifted, coarse.product, shift))
            for solution in conjugate_gradient(partial(_shifted, product, shift), right, tolerance, coarse=cheap):
                yield solution.residual
            assert solution is not None
            return Solution(solution.vector, solution.iterations, solution.residual, solution.condition_number, damping)
        except NegativeCurvatureError as error:
            mean = mean or mean_eigenvalue(product, right)
            least = shift - error.curvature  # what is less cannot be enough
            damping = enough_damping(damping, partial(_lacking, damping, mean, least))


def _lacking(tried: float, mean: float, least: float, damping: float) -> bool:
    return damping <= tried or damping * mean < least


def _shifted(product: Product, shift: float, vector: Tensor) -> Tensor:
    return product(vector) + shift * vector


def _solve_dense(product: Product, right: Tensor, damping: float) -> Solution:
    matrix = dense_matrix(product, right)
    values, vectors = torch.linalg.eigh(matrix)
    mean = values.mean().abs().item()
    least = 10 * torch.finfo(right.dtype).eps * values[-1].abs()
    damping = enough_damping(damping, lambda more: bool(values[0] + more * mean <= least))
    shifted = values + damping * mean
    solution = vectors @ (vectors.T @ right / shifted)
    residual = (right - matrix @ solution - damping * mean * solution).norm() / right.norm().clamp_min(
        torch.finfo(right.dtype).tiny
    )
    return Solution(solution, len(right), residual.item(), (shifted[-1] / shifted[0]).item(), damping)


def dense_matrix(product: Product, like: Tensor) -> Tensor:
    """The matrix of a product, made symmetric, shape ``(p, p)``."""
    matrix = torch.stack([product(row) for row in torch.eye(len(like), dtype=like.dtype, device=like.device)])
    return (matrix + matrix.T) / 2


def mean_eigenvalue(product: Product, like: Tensor) -> float:
    """Trace over size, from random signs (Hutchinson's estimator); its size, should it be negative."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(_PROBES):
        signs = (2.0 * torch.randint(2, (len(like),), generator=generator) - 1).to(like)
        total += signs.dot(product(signs)).item()
    return abs(total) / (_PROBES * len(like))


def conjugate_gradient(
    product: Product,
    right: Tensor,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    coarse: CoarseProduct | None = None,
) -> Iterator[Solution]:
    """Solves ``H x = b`` for a positive-definite ``H`` by conjugate gradients.

    Yields the state again and again, so that a caller can show progress or
    stop; the last one meets the tolerance. Where steps are taken with coarse
    products, the residual is as much larger as these are off at the steps: ``k``
    of them, at acute angles, are together at most ``sqrt(k)`` times as long as
    what they add up to. If that is too much or not known, the residual is
    computed with an exact product, and solved for likewise if it is too large
    (iterative refinement).

    Args:
        product: maps ``v`` to ``H v``.
        right: ``b``, shape ``(p,)``.
        tolerance (1e-6): the relative residual to reach.
        max_iterations (1000): products to spend at most.
        coarse (None): a cheaper ``H v`` to take steps with, nearly the same.

    Raises:
        NegativeCurvatureError: if ``H`` has negative curvature along the solve
        EcifError: if the tolerance is not reached
    """
    x, residual, norm = torch.zeros_like(right), right, right.norm()
    done, relative, condition = 0, 1.0, 1.0
    while relative > tolerance and done < max_iterations:
        before, cheap = relative, product if coarse is None else coarse.product
        steps = _steps(cheap, residual, norm, tolerance, max_iterations - done)
        try:
            for state in steps:
                relative, condition = state.residual, max(condition, state.condition_number)
                yield Solution(x + state.vector, done + state.iterations, relative, condition)
        except NegativeCurvatureError:
            if coarse is None:
                raise
            coarse = None  # it may be rounding
            continue
        done += state.iterations
        if coarse is None:
            x = x + state.vector
            continue
        there = x + state.vector
        if coarse.error is not None:
            off = math.sqrt(state.iterations) * (coarse.error(state.vector) / norm).item()
            if relative + off <= tolerance:
                yield Solution(there, done, relative + off, condition)
                return
        done, left = done + 1, right - product(there)
        relative = (left.norm() / norm.clamp_min(torch.finfo(norm.dtype).tiny)).item()
        if relative < before:
            x, residual = there, left
        if relative > before / 2:
            relative, coarse = min(relative, before), None  # they lead no further
        yield Solution(x, done, relative, condition)
    if relative > tolerance:
        raise EcifError(
            f"The solve did not converge in {max_iterations} products: the residual is {relative:.1e}, "
            f"the condition number about {condition:.1e}. Raise proximal or damping"
        )


def _steps(product: Product, right: Tensor, norm: Tensor, tolerance: float, most: int) -> Iterator[Solution]:
    """Conjugate gradients until the residual is small beside a norm, or the products are spent.

    All numbers stay on the device: Python looks at them after some steps only (:attr:`Placement.unwatched`).
    """
    often = Placement(str(right.device)).unwatched
    x, residual, direction, squared = torch.zeros_like(right), right, right, right.dot(right)
    unseen, steps, ratios = list[Tensor](), list[float](), list[float]()
    for iteration in range(1, most + 1):
        curved = product(direction)
        before, curvature, length = squared, direction.dot(curved), direction.dot(direction)
        step = torch.where(before > 0, before / curvature, 0.0)  # none where nothing is left to solve for
        x, residual = x + step * direction, residual - step * curved
        squared = residual.dot(residual)
        ratio = torch.where(before > 0, squared / before, 0.0)
        direction = residual + ratio * direction
        unseen.append(torch.stack([before, curvature, length, step, ratio, squared.sqrt(), norm]))
        if iteration % often and iteration < most:
            continue
        seen = torch.stack(unseen).tolist()
        for left, met, size, step_size, ratio_size, *_ in seen:
            if not math.isfinite(met):
                raise EcifError(
                    "A curvature product is not finite: the model's weights or features hold NaN or infinity"
                )
            if left > 0 >= met:
                raise NegativeCurvatureError(
                    f"The curvature is negative ({met / size:.2g}) along the solve: the model is too far from a "
                    "minimum for influence functions. Set fit=True, or raise damping",
                    met / size,
                )
            if left > 0:
                steps.append(step_size)
                ratios.append(ratio_size)
        unseen.clear()
        *_, reached, whole = seen[-1]
        relative = reached / whole if whole else 0.0
        yield Solution(x, iteration, relative, _condition_number(steps, ratios))
        if relative <= tolerance:
            return


def _condition_number(steps: list[float], ratios: list[float]) -> float:
    """From the eigenvalues of the Lanczos matrix that conjugate gradients build on the way."""
    if not steps:
        return 1.0
    diagonal = np.array([1 / steps[0]] + [1 / a + b / c for a, b, c in zip(steps[1:], ratios, steps, strict=False)])
    off = np.sqrt(ratios[: len(steps) - 1]) / np.array(steps[:-1])
    ritz = eigvalsh_tridiagonal(diagonal, off)
    return float(ritz[-1] / max(ritz[0], np.finfo(float).tiny))


def solving(steps: Generator[float, None, Solution]) -> Generator[Progress, None, Solution]:
    """A solve that shows its progress."""
    try:
        while True:
            yield Progress("Solving", percent_of_the_way(next(steps), 1e-6), 100)
    except StopIteration as end:
        solution: Solution = end.value
        return solution


def percent_of_the_way(value: float, goal: float) -> int:
    """How far a value that falls geometrically from 1 is on its way to the goal."""
    return int(100 * min(max(math.log(max(value, goal)) / math.log(goal), 0.0), 1.0))
