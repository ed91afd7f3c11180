"""Runs as FiftyOne records them: what they are, what they wrote, what they take.

FiftyOne keeps the names of these classes in its database and imports them from
here to list, load and delete runs, so they keep their names and this place.
"""

from fiftyone_ecif.runs.influence import Influence, InfluenceConfig, InfluenceResults
from fiftyone_ecif.runs.misalignment import Misalignment, MisalignmentConfig, MisalignmentResults

__all__ = [
    "Influence",
    "InfluenceConfig",
    "InfluenceResults",
    "Misalignment",
    "MisalignmentConfig",
    "MisalignmentResults",
]
