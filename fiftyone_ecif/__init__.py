"""Influence of image-caption pairs in contrastive models, for FiftyOne."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fiftyone_ecif.errors import EcifError

if TYPE_CHECKING:
    from fiftyone_ecif.api.editing import edit_model, group_influence
    from fiftyone_ecif.api.fine_tuning import fit_model
    from fiftyone_ecif.api.influence import compute_influence
    from fiftyone_ecif.api.misalignment import compute_misalignment, tag_misaligned
    from fiftyone_ecif.api.review import propose_pairs, review_misalignment
    from fiftyone_ecif.api.tracing import trace
    from fiftyone_ecif.runs import InfluenceResults, MisalignmentResults
    from fiftyone_ecif.runs.cache import cache_size, free_disk
    from fiftyone_ecif.runs.manage import delete_run, list_runs, rename_run, staleness
    from fiftyone_ecif.samples.export import export_pairs
    from fiftyone_ecif.samples.selection import select_by_influence, tag_by_influence

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
    "MisalignmentResults": ".runs",
    "cache_size": ".runs.cache",
    "compute_influence": ".api.influence",
    "compute_misalignment": ".api.misalignment",
    "delete_run": ".runs.manage",
    "edit_model": ".api.editing",
    "export_pairs": ".samples.export",
    "fit_model": ".api.fine_tuning",
    "free_disk": ".runs.cache",
    "group_influence": ".api.editing",
    "list_runs": ".runs.manage",
    "propose_pairs": ".api.review",
    "rename_run": ".runs.manage",
    "review_misalignment": ".api.review",
    "select_by_influence": ".samples.selection",
    "staleness": ".runs.manage",
    "tag_by_influence": ".samples.selection",
    "tag_misaligned": ".api.misalignment",
    "trace": ".api.tracing",
}


def __getattr__(name: str) -> Any:
    """Imports torch and open_clip only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
