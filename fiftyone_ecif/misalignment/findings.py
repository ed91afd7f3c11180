"""What detectors found out about pairs so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fiftyone_ecif.misalignment.evidence import Evidence
    from fiftyone_ecif.misalignment.judgement import Judgement


@dataclass
class Findings:
    """What detectors say of each pair.

    Attributes:
        scores: by detector, shape ``(N,)`` each, float64, higher = more suspicious.
        evidence: what ``calibrated`` learned from, if it ran.
        judgement: what it made of that.
    """

    scores: dict[str, np.ndarray] = field(default_factory=dict)
    evidence: Evidence | None = None
    judgement: Judgement | None = None
