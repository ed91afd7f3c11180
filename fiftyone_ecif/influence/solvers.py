"""Solvers: what stands for the curvature ``H`` in ``H^-1 grad f``. No heavy imports: forms read the names."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.scope_choice import ScopeChoice
from fiftyone_ecif.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from fiftyone_ecif.influence.curvature import CoarseProduct, Product
    from fiftyone_ecif.influence.objective import ContrastiveLoss
    from fiftyone_ecif.influence.projections import Projection

_COVARIANCE_DAMPING = 0.1
_CHECKED = 4096  # pairs that tell how far coarse products are off


class Solver(ABC):
    """What stands for the curvature.

    A solver with a curvature of the objective gives products with it
    (:meth:`product`). One without sets ``solves = False``; the target's gradient
    is then taken as it is, or, if it ``needs_gradients``, influence is read from
    the stored ones, between which :meth:`stored_curvature` stands.

    Attributes:
        name: what it is chosen by.
        says: what it is, in a few words.
        solves: whether there is a curvature of the objective to solve with.
        needs_gradients: whether it works on stored gradients, so that they must be kept.
        keeps_unit: whether influence has the unit of the target's loss.
    """

    name: str
    says: str
    solves = True
    needs_gradients = False
    keeps_unit = True

    def product(self, objective: ContrastiveLoss, theta: Tensor) -> Product:
        """Products with the curvature of an objective at one point, for as many vectors as a solve needs.

        Args:
            objective: what the curvature is of.
            theta: where, shape ``(p,)``.

        Raises:
            EcifError: if there is no such curvature
        """
        raise EcifError(f"solver={self.name!r} has no curvature to solve with. Use {' or '.join(_solving())}")

    def coarse_product(self, objective: ContrastiveLoss, theta: Tensor) -> CoarseProduct | None:
        """The same in the precision of steps (:attr:`Placement.coarse`); None if there is none that is coarser.

        How far it is off is measured on the first pairs. Rounding errors of batches
        have nothing to do with one another, so those of all pairs are less off.

        Args:
            objective, theta: as for :meth:`product`.
        """
        from fiftyone_ecif.influence.curvature import CoarseProduct

        if objective.is_coarse:
            return None
        coarse, some = self.product(objective.coarse(), theta), objective.sample(_CHECKED)
        if 2 * len(some.batches) > len(objective.batches):
            return CoarseProduct(coarse)
        exact, rounded = self.product(some, theta), self.product(some.coarse(), theta)
        return CoarseProduct(coarse, lambda vector: (exact(vector) - rounded(vector)).norm())

    def projected_curvature(self, projection: Projection, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        """The curvature between the directions that gradients are stored in, shape ``(r, r)``.

        Args:
            projection: onto the directions.
            objective: what the curvature is of.
            theta: where, shape ``(p,)``.

        Raises:
            EcifError: as :meth:`product`
        """
        return projection.curvature(self.product(objective, theta), theta)

    def stored_curvature(self, gradients: Iterable[np.ndarray]) -> np.ndarray:
        """What stands between stored gradients without the objective, shape ``(r, r)``.

        Args:
            gradients: projected removal gradients, some rows at a time, shape ``(n, r)`` each.

        Raises:
            EcifError: if the objective is needed for it
        """
        raise EcifError(
            f"The curvature of solver={self.name!r} is not in the store. Run compute_influence again with "
            "overwrite=True"
        )


SOLVERS: Registry[Solver] = Registry("solver")


def default_solver(scope: ScopeChoice) -> str:
    """The solver of a scope: the Hessian for heads; deeper, where that is seldom positive, the Gauss-Newton matrix.

    >>> from fiftyone_ecif.influence.scope_choice import parse_scope
    >>> default_solver(parse_scope("heads")), default_solver(parse_scope("lora:4"))
    ('hessian', 'ggn')
    """
    return Hessian.name if scope.heads else GaussNewton.name


def _solving() -> list[str]:
    return [name for name, solver in SOLVERS.items() if solver.solves]


@SOLVERS.register
class Hessian(Solver):
    """The exact Hessian."""

    name = "hessian"
    says = "the exact Hessian; damped where it is not positive along the solve"

    @override
    def product(self, objective: ContrastiveLoss, theta: Tensor) -> Product:
        from fiftyone_ecif.influence.curvature import hessian_at

        return hessian_at(objective, theta)

    @override
    def projected_curvature(self, projection: Projection, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        return projection.hessian(objective, theta)


@SOLVERS.register
class GaussNewton(Solver):
    """The generalised Gauss-Newton matrix."""

    name = "ggn"
    says = "the generalised Gauss-Newton matrix, never negative"

    @override
    def product(self, objective: ContrastiveLoss, theta: Tensor) -> Product:
        from fiftyone_ecif.influence.curvature import gauss_newton_at

        return gauss_newton_at(objective, theta)

    @override
    def projected_curvature(self, projection: Projection, objective: ContrastiveLoss, theta: Tensor) -> Tensor:
        return projection.gauss_newton(objective, theta)


@SOLVERS.register
class LoGra(Solver):
    """The covariance of the pairs' projected gradients."""

    name = "logra"
    says = "the covariance of the pairs' projected gradients (arXiv 2405.13954), dense in the projected space"
    solves = False
    needs_gradients = True

    def stored_curvature(self, gradients: Iterable[np.ndarray]) -> np.ndarray:
        """The mean outer product of the removal gradients, damped by a tenth of its mean eigenvalue.

        >>> LoGra().stored_curvature([np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]).tolist()
        [[0.55, 0.0], [0.0, 0.55]]
        """
        total, pairs = np.zeros((1, 1)), 0
        for part in gradients:
            rows = part.astype(np.float64)
            total, pairs = total + rows.T @ rows, pairs + len(rows)
        covariance = total / pairs
        damping = _COVARIANCE_DAMPING * np.trace(covariance) / len(covariance)
        damped: np.ndarray = covariance + damping * np.eye(len(covariance))
        return damped


@SOLVERS.register
class Identity(Solver):
    """None."""

    name = "identity"
    says = "none: the dot product of gradients, as in TracIn (arXiv 2002.08484)"
    solves = False
    keeps_unit = False

    def stored_curvature(self, gradients: Iterable[np.ndarray]) -> np.ndarray:
        """The identity between as many directions as the gradients have."""
        return np.eye(next(iter(gradients)).shape[1])
