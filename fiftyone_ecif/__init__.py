"""Influence of image-caption pairs in contrastive models, for FiftyOne."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import EcifError

if TYPE_CHECKING:
    from .api import compute_influence
    from .curation import export_pairs, select_by_influence, tag_by_influence
    from .runs import InfluenceResults
    from .tuning import fit_model

__version__ = "0.1.0"
__all__ = [
    "EcifError",
    "InfluenceResults",
    "compute_influence",
    "export_pairs",
    "fit_model",
    "select_by_influence",
    "tag_by_influence",
]

_HOMES = {
    "InfluenceResults": ".runs",
    "edit_model": ".editing",
    "group_influence": ".editing",
    "trace": ".tracing",
    "compute_influence": ".api",
    "export_pairs": ".curation",
    "fit_model": ".tuning",
    "select_by_influence": ".curation",
    "tag_by_influence": ".curation",
}


def __getattr__(name: str) -> Any:
    """Imports torch and open_clip only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
