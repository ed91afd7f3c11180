"""FiftyOne's entry to the plugin. FiftyOne runs this file often, so it stays small and imports nothing heavy."""

import sys
from pathlib import Path

try:
    import fiftyone_ecif  # noqa: F401
except ImportError:  # the plugin was linked or downloaded, not installed: use the library beside it
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def register(plugin):  # type: ignore[no-untyped-def]
    """Registers the operators with FiftyOne."""
    from .compute_influence import ComputeInfluence
    from .detect_misalignment import DetectMisalignment
    from .edit_model import EditModel
    from .export_pairs import ExportPairs
    from .manage_influence_runs import ManageInfluenceRuns
    from .panel.influence_panel import InfluencePanel
    from .review_misalignment import ReviewMisalignment
    from .tag_by_influence import TagByInfluence
    from .trace_predictions import TracePredictions

    for operator in (
        *(ComputeInfluence, DetectMisalignment, ReviewMisalignment, TagByInfluence, ExportPairs),
        *(TracePredictions, EditModel, ManageInfluenceRuns),
    ):
        plugin.register(operator)
    plugin.register(InfluencePanel)
