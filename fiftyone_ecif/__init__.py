"""Influence of image-caption pairs in contrastive models, for FiftyOne."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import EcifError

if TYPE_CHECKING:
    from .api import compute_influence
    from .runs import InfluenceResults

__version__ = "0.1.0"
__all__ = ["EcifError", "InfluenceResults", "compute_influence"]

_HOMES = {"compute_influence": ".api", "InfluenceResults": ".runs"}


def __getattr__(name: str) -> Any:
    """Imports torch and open_clip only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
