"""Solvers: what stands for the curvature ``H`` in ``H^-1 grad f``. No heavy imports: forms read the names."""

from __future__ import annotations

from abc import ABC

from fiftyone_ecif.registry import Registry


class Solver(ABC):
    """What stands for the curvature.

    Attributes:
        name: what it is chosen by.
        says: what it is, in a few words.
        needs_gradients: whether it works on stored gradients, so that they must be kept.
    """

    name: str
    says: str
    needs_gradients = False


SOLVERS: Registry[Solver] = Registry("solver")


@SOLVERS.register
class Hessian(Solver):
    """The exact Hessian."""

    name = "hessian"
    says = "the exact Hessian; damped where it is not positive along the solve"


@SOLVERS.register
class GaussNewton(Solver):
    """The generalised Gauss-Newton matrix."""

    name = "ggn"
    says = "the generalised Gauss-Newton matrix, never negative"


@SOLVERS.register
class LoGra(Solver):
    """The covariance of the pairs' projected gradients."""

    name = "logra"
    says = "the covariance of the pairs' projected gradients (arXiv 2405.13954), dense in the projected space"
    needs_gradients = True


@SOLVERS.register
class Identity(Solver):
    """None."""

    name = "identity"
    says = "none: the dot product of gradients, as in TracIn (arXiv 2002.08484)"
