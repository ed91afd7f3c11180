"""What detectors found out about pairs so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Findings:
    """What detectors say of each pair.

    Attributes:
        scores: by detector, shape ``(N,)`` each, float64, higher = more suspicious.
        share_below: what the noise rate is estimated from: the share of random other captions and images that fit
            the pair's own no better, by a model that has not seen the pair; in [0, 1], 1 where nothing was
            compared. Shape ``(N,)``.
    """

    scores: dict[str, np.ndarray]
    share_below: np.ndarray
