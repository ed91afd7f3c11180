"""Influence of image-caption pairs in contrastive models, for FiftyOne."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import EcifError

if TYPE_CHECKING:
    from .api import compute_influence
    from .audits import MisalignmentResults
    from .catalogue import cache_size, delete_run, free_disk, list_runs, rename_run, staleness
    from .curation import export_pairs, select_by_influence, tag_by_influence
    from .editing import edit_model, group_influence
    from .misalignment import compute_misalignment, tag_misaligned
    from .review import propose_pairs, review_misalignment
    from .runs import InfluenceResults
    from .tracing import trace
    from .tuning import fit_model

__version__ = "0.1.0"
__all__ = [
    "EcifError",
    "InfluenceResults",
    "MisalignmentResults",
    "cache_size",
    "compute_influence",
    "compute_misalignment",
    "delete_run",
    "edit_model",
    "export_pairs",
    "fit_model",
    "free_disk",
    "group_influence",
    "list_runs",
    "propose_pairs",
    "rename_run",
    "review_misalignment",
    "select_by_influence",
    "staleness",
    "tag_by_influence",
    "tag_misaligned",
    "trace",
]

_HOMES = {
    "InfluenceResults": ".runs",
    "MisalignmentResults": ".audits",
    "cache_size": ".catalogue",
    "compute_influence": ".api",
    "compute_misalignment": ".misalignment",
    "delete_run": ".catalogue",
    "edit_model": ".editing",
    "export_pairs": ".curation",
    "fit_model": ".tuning",
    "free_disk": ".catalogue",
    "group_influence": ".editing",
    "list_runs": ".catalogue",
    "propose_pairs": ".review",
    "rename_run": ".catalogue",
    "review_misalignment": ".review",
    "select_by_influence": ".curation",
    "staleness": ".catalogue",
    "tag_by_influence": ".curation",
    "tag_misaligned": ".misalignment",
    "trace": ".tracing",
}


def __getattr__(name: str) -> Any:
    """Imports torch and open_clip only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
