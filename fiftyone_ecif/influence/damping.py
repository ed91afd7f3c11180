"""How much damping makes a matrix positive."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fiftyone_ecif.errors import EcifError

_LEAST, _MOST = 2.0**-10, 2.0**20


def enough_damping(damping: float, lacking: Callable[[float], bool]) -> float:
    """The damping, or where it is lacking the least of its doubles (of ``2^-10, 2^-9 ...``, if it is 0) that is not.

    >>> enough_damping(0.0, lambda damping: -0.3 + damping <= 0)
    0.5

    Args:
        damping: at least, relative to the mean eigenvalue.
        lacking: whether the matrix is not positive with so much.

    Raises:
        EcifError: if none is enough
    """
    while lacking(damping):
        if damping >= _MOST:
            raise EcifError("The curvature is negative whatever the damping. Load other weights, or fit first")
        damping = 2 * damping or _LEAST
    return damping


def damped(curvature: np.ndarray, damping: float = 0.0) -> np.ndarray:
    """A symmetric matrix, damped; more so, by the least of ``2^-10, 2^-9 ...``, where that does not make it positive.

    Args:
        curvature: shape ``(r, r)``.
        damping (0.0): at least; relative to the mean eigenvalue.

    Raises:
        EcifError: if it is zero or not finite, or no damping is enough
    """
    mean = abs(np.trace(curvature)) / len(curvature)
    if not (np.isfinite(curvature).all() and mean > 0):
        raise EcifError("The projected curvature is not usable: it is zero or not finite. Load other weights")
    least = np.linalg.eigvalsh(curvature)[0]
    damping = enough_damping(damping, lambda more: bool(least + more * mean <= 1e-6 * mean))
    shifted: np.ndarray = curvature + damping * mean * np.eye(len(curvature))
    return shifted
