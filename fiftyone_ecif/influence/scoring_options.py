"""How influence is computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoringOptions:
    """How influence is computed.

    Attributes:
        fit: whether to bring the scope to a stationary point first.
        proximal: strength of the pull to the parameters as loaded.
        role: one of ``roles.ROLES``.
        solver: one of :data:`fiftyone_ecif.influence.solvers.SOLVERS`.
        damping: relative to the mean eigenvalue of the curvature.
        keep_gradients: whether projected gradients are computed and stored.
        gradient_tolerance: of those of deep scopes, see ``tower_gradients``.
        must_converge: whether a fit that reaches no minimum is an error.
    """

    fit: bool = False
    proximal: float = 1.0
    role: str = "exact"
    solver: str = "hessian"
    damping: float = 0.0
    keep_gradients: bool = True
    gradient_tolerance: float = 1e-2
    must_converge: bool = True
