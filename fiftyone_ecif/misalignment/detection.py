"""What detectors find in pairs, and what is said of it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import numpy as np
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.cross_fitting import share_that_fits_no_better
from fiftyone_ecif.misalignment.detectors import DETECTORS, CrossFit, Detector
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.findings import Findings
from fiftyone_ecif.misalignment.fusion import ranked
from fiftyone_ecif.progress import Progress, piece

_CLEAR = 0.8  # rank from which a detector's evidence is worth a word


def run_detectors(inputs: DetectorInputs, names: Sequence[str]) -> Generator[Progress, None, Findings]:
    """Scores of some detectors and of those that they need, and what the noise rate is estimated from.

    Args:
        inputs: the pairs and the model. Where it was trained on the pairs, ``cross_fit`` is run too, for the noise
            rate.
        names: of :data:`fiftyone_ecif.misalignment.detectors.DETECTORS`. Those that presume a trained model are
            left out where it is none.

    Raises:
        EcifError: if there is no such detector, one needs a validation set and there is none, or one cannot be
            computed for these pairs
    """
    trained = inputs.gradients is not None
    detectors = _with_needs([CrossFit.name, *names] if trained else names, trained)
    for detector in detectors:
        if detector.needs_target and inputs.influence is None:
            raise EcifError(f"detector={detector.name!r} needs a target: a view of validation pairs")
    found = Findings({}, np.ones(inputs.objective.pairs))
    compared = sum(_depth(detector) == 0 for detector in detectors)
    refitting = [detector for detector in detectors if detector.refits]
    for done, detector in enumerate(sorted(detectors, key=_depth)):
        if done < compared:
            yield Progress("Comparing pairs", done, compared)
        scores = detector.score(inputs, found)
        if isinstance(scores, Generator):
            scores = yield from piece(scores, refitting.index(detector), len(refitting))
        found.scores[detector.name] = np.asarray(scores, dtype=np.float64)
    if CrossFit.name not in found.scores:  # the model itself has never seen the pairs
        below = share_that_fits_no_better(
            inputs.model, torch.arange(inputs.objective.pairs), torch.Generator().manual_seed(inputs.seed)
        )
        found.share_below = np.asarray(below, dtype=np.float64)
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


def reasons(scores: Mapping[str, np.ndarray]) -> list[str | None]:
    """What speaks against each pair, the strongest evidence first; None where nothing does.

    Args:
        scores: by detector, of one with evidence at least, shape ``(N,)`` each.
    """
    telling = {name: one.evidence for name, one in DETECTORS.items() if one.evidence and name in scores}
    evidence = list(telling.values())
    found = []
    for row in np.stack([ranked(scores[name]) for name in telling], axis=1):
        clear = [evidence[place] for place in np.argsort(-row, kind="stable") if row[place] >= _CLEAR]
        found.append(", ".join(clear) or None)
    return found
