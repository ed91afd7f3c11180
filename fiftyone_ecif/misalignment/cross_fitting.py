"""What heads say of pairs that they were fitted without, fold by fold."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.misalignment.embeddings import ROWS_AT_ONCE, DetectorInputs, EmbeddingSpace, standardised
from fiftyone_ecif.progress import Progress

_FOLDS = 5
_TOLERANCE = 1e-3  # relative gradient norm at which the embeddings of a fit have long stopped changing
_PASSES = 1000  # of a fit, at most
_COMPARED = 256  # random other pairs that a held-out pair is compared with


class HeldOut:
    """What heads that were fitted without a pair say of it, row by row.

    Attributes:
        distance: ``1 - s_ii``, standardised within each fold.
        share_below: share of random other captions and images that fit the pair's own no better, in [0, 1];
            1 where there is no other.
        lemon_z: standardised likewise.
    """

    def __init__(self, pairs: int) -> None:
        self.distance, self.share_below, self.lemon_z = np.zeros(pairs), np.ones(pairs), np.zeros(pairs)


def refit_held_out(inputs: DetectorInputs, usable: np.ndarray | None = None) -> Generator[Progress, None, HeldOut]:
    """Fits the heads without each fifth of the pairs and looks at that fifth.

    Args:
        inputs: the pairs and the model; its parameters play no part.
        usable (None): which pairs may be fitted at all, bool, shape ``(N,)``.

    Raises:
        EcifError: if a fit does not converge
    """
    objective, batches = inputs.objective, inputs.batches
    pairs = objective.pairs
    generator = torch.Generator().manual_seed(inputs.seed)
    copies = torch.from_numpy(inputs.duplicates.pair)  # go to one fold, so that none is fitted when another is held out
    fold = torch.randint(_FOLDS, (int(copies.max()) + 1,), generator=generator)[copies]
    found = HeldOut(pairs)
    for number in range(_FOLDS):
        held = fold == number
        keep = ~held if usable is None else ~held & torch.from_numpy(usable)
        rows = [batch[keep[batch]] for batch in batches.partition]
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
        places = torch.nonzero(held).flatten()
        found.distance[places] = standardised(space.distance[held])
        found.lemon_z[places] = standardised(space.lemon_z()[held])
        found.share_below[places] = share_that_fits_no_better(space, places, generator)
    yield Progress("Refitting", _FOLDS, _FOLDS)
    return found


def share_that_fits_no_better(space: EmbeddingSpace, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Of random other pairs, the share whose caption fits the image no better than its own, and the other way round."""
    others = rows[torch.randperm(len(rows), generator=generator)[:_COMPARED]]
    shares = []
    for part in torch.split(rows, ROWS_AT_ONCE):
        own = 1 - space.distance[part][:, None]
        different = (space.group[part][:, None] != space.group[others]).float()
        both = [
            ((one[part] @ other[others].T <= own) * different).sum(1)
            for one, other in ((space.images, space.captions), (space.captions, space.images))
        ]
        compared = 2 * different.sum(1)
        shares.append(torch.where(compared > 0, (both[0] + both[1]) / compared, 1.0))
    return torch.cat(shares)
