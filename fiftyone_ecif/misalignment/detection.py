"""Running detectors, and those that they need, in an order that suits them."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.detectors import DETECTORS, Detector
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.findings import Findings
from fiftyone_ecif.progress import Progress, piece


def run_detectors(inputs: DetectorInputs, names: Sequence[str]) -> Generator[Progress, None, Findings]:
    """Scores of some detectors and of those that they need.

    Args:
        inputs: the pairs and the model.
        names: of :data:`fiftyone_ecif.misalignment.detectors.DETECTORS`. Those that presume a trained model are
            left out where it is none.

    Raises:
        EcifError: if there is no such detector, one needs a validation set and there is none, or one cannot be
            computed for these pairs
    """
    detectors = _with_needs(names, inputs.gradients is not None)
    for detector in detectors:
        if detector.needs_target and inputs.influence is None:
            raise EcifError(f"detector={detector.name!r} needs a target: a view of validation pairs")
    found = Findings()
    compared = sum(_depth(detector) == 0 for detector in detectors)
    refitting = [detector for detector in detectors if detector.refits]
    for done, detector in enumerate(sorted(detectors, key=_depth)):
        if done < compared:
            yield Progress("Comparing pairs", done, compared)
        scores = detector.score(inputs, found)
        if isinstance(scores, Generator):
            scores = yield from piece(scores, refitting.index(detector), len(refitting))
        found.scores[detector.name] = np.asarray(scores, dtype=np.float64)
    return found


def _with_needs(names: Sequence[str], trained: bool) -> list[Detector]:
    """Detectors and those that they need, each once, without those that presume training where there was none."""
    wanted = list(dict.fromkeys(names))
    for name in wanted:  # which grows meanwhile
        wanted += [need for need in DETECTORS[name].needs if need not in wanted]
    return [DETECTORS[name] for name in wanted if trained or not DETECTORS[name].needs_training]


def _depth(detector: Detector) -> int:
    """How far down the line a detector comes: 0 if it compares pairs with the model as it is, and needs no other."""
    if not (detector.needs or detector.refits):
        return 0
    return 1 + max((_depth(DETECTORS[name]) for name in detector.needs), default=0)
