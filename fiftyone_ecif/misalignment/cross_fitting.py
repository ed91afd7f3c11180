"""What heads say of pairs that they were fitted without, fold by fold."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress

import numpy as np
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.misalignment.embeddings import DetectorInputs, EmbeddingSpace, standardised
from fiftyone_ecif.progress import Progress

_FOLDS = 5
_TOLERANCE = 1e-3  # relative gradient norm at which the embeddings of a fit have long stopped changing
_PASSES = 1000  # of a fit, at most


def refit_held_out(inputs: DetectorInputs) -> Generator[Progress, None, np.ndarray]:
    """Fits the heads without each fifth of the pairs; ``1 - s_ii`` of that fifth, standardised, shape ``(N,)``.

    Args:
        inputs: the pairs and the model; its parameters play no part.
    """
    objective, batches = inputs.objective, inputs.batches
    generator = torch.Generator().manual_seed(inputs.seed)
    copies = torch.from_numpy(inputs.duplicates.pair)  # go to one fold, so that none is fitted when another is held out
    fold = torch.randint(_FOLDS, (int(copies.max()) + 1,), generator=generator)[copies]
    distance = np.zeros(objective.pairs)
    for number in range(_FOLDS):
        held = fold == number
        rows = [batch[~held[batch]] for batch in batches.partition]
        rows = [batch for batch in rows if len(batch) > 1]
        if not held.any() or not rows:
            continue
        part = ContrastiveLoss(
            objective.scope, batches.regrouped(rows), sum(len(batch) for batch in rows), objective.proximal
        )
        theta = part.scope.start
        with suppress(EcifError):  # one that is not there yet: its embeddings are all that is wanted
            for theta, _ in minimise(part, _TOLERANCE, _PASSES):  # noqa: B007
                yield Progress("Refitting", number, _FOLDS)
        space = EmbeddingSpace(*inputs.embeddings(theta), copies)
        distance[torch.nonzero(held).flatten()] = standardised(space.distance[held])
    yield Progress("Refitting", _FOLDS, _FOLDS)
    return distance
