"""Drawing decoys, and measuring them as the pairs are."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.distributed import ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.misalignment.canonical import Rows, canonical_heads
from fiftyone_ecif.misalignment.decoys import draw_decoys
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.evidence import (
    CANONICAL,
    FEATURE_SIGNALS,
    FEATURES,
    FITTED,
    KINDS,
    LOADED,
    MATCHING,
    SIGNALS,
    Evidence,
)
from fiftyone_ecif.misalignment.judgement import judge
from fiftyone_ecif.misalignment.neighbours import nearest
from fiftyone_ecif.misalignment.seen import agreement_of_steps, was_fitted
from fiftyone_ecif.misalignment.signals import NEAR, PairSpace, Surroundings, feature_agreement
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.store.disk_matrix import DiskMatrix

FOLDS = 5
_REFERENCES = 1024
_SHOWN = 10  # pairs that are like one, to be looked at beside it
_DECOYED = 10_000  # pairs that get decoys, at most
_FITTED = 20_000  # pairs that heads are made from, at most
_TOLERANCE, _PASSES = 1e-3, 500  # relative gradient norm of a fit, and its gradients and products at most
RIDGE = 8.0  # of canonical heads, where there are as many pairs as features
CANONICAL_SCALE = 10.0  # of their cosines in a softmax


def gather_evidence(inputs: DetectorInputs) -> Generator[Progress, None, Evidence]:
    """Draws decoys and measures them and all pairs.

    Two neighbour searches, five fits of the heads and ten decompositions, whatever the number of decoys. Heads in
    closed form are made twice, the second time with pairs counting the less the more suspicious they are by then.

    Args:
        inputs: the pairs and the model; its start is what the weights are as loaded.

    Raises:
        EcifError: if a pair has no possible neighbour, or there are not enough different captions to make decoys of
    """
    images, texts = (_OnCpu(side) for side in (inputs.batches.images, inputs.batches.texts))
    pairs, generator = len(images), torch.Generator().manual_seed(inputs.seed)
    copies = torch.from_numpy(inputs.duplicates.pair)
    groups = int(copies.max()) + 1
    folds = max(min(FOLDS, groups // 2), 1)  # of two pairs at least, so that decoys can be made of them
    fold = torch.randperm(groups, generator=generator)[copies] % folds
    sampled = torch.randperm(pairs, generator=generator)[:_DECOYED].sort().values
    same_image, same_caption = (torch.from_numpy(side) for side in (inputs.duplicates.image, inputs.duplicates.caption))
    decoys = draw_decoys(texts, fold, same_caption, sampled, inputs.seed)
    if len(np.unique(decoys.kind)) < len(KINDS):
        raise EcifError(f"All {pairs} captions are the same, or nearly all: none can be told to be wrong")
    yield Progress("Comparing pairs", 0, 3)
    features = [_directions(side[:]) for side in (images, texts)]
    processes = inputs.objective.processes
    near = [nearest(side, NEAR + 1, copies, inputs.device, processes) for side in features]
    references = torch.randperm(pairs, generator=generator)[:_REFERENCES]
    around = Surroundings(near[0].rows, near[1].rows, references, same_image, same_caption)
    everything = torch.arange(pairs)
    image, caption = torch.cat([everything, decoys.image]), torch.cat([everything, decoys.caption])

    yield Progress("Comparing pairs", 1, 3)
    agreement = partial(feature_agreement, features[0], features[1], around)
    columns = {FEATURES: _shared(processes, agreement, image, caption)}
    del features, agreement  # which are as large as all that was read
    yield Progress("Comparing pairs", 2, 3)
    scope = inputs.objective.scope
    loaded = PairSpace(*inputs.embeddings(scope.start), _scale(inputs, scope.start), around, inputs.device)
    columns[LOADED] = np.column_stack(
        [_shared(processes, measure, image, caption) for measure in (loaded.measure, loaded.matching)]
    )
    del loaded
    assert isinstance(scope, HeadScope)
    seen = inputs.trained or was_fitted(agreement_of_steps(scope, scope.start, images[references], texts[references]))
    yield Progress("Comparing pairs", 3, 3)
    of = fold[image]
    columns[FITTED] = np.empty((len(image), len(SIGNALS)), dtype=np.float32)
    for number in range(folds):
        held, others = torch.nonzero(of == number).flatten(), torch.nonzero(fold != number).flatten()
        others = others[torch.randperm(len(others), generator=generator)[:_FITTED]] if len(others) else everything
        theta = yield from _fit(inputs, others, number, folds)
        space = PairSpace(*inputs.embeddings(theta), _scale(inputs, theta), around, inputs.device)
        columns[FITTED][held] = _shared(processes, space.measure, image[held], caption[held])
        del space  # before there is another one
    yield Progress("Refitting", folds, folds)

    def finish(canonical: np.ndarray) -> Evidence:
        table = np.concatenate([*columns.values(), canonical], axis=1)
        beside = np.zeros(pairs, dtype=bool)
        beside[sampled] = True
        like = near[0].rows[:, :_SHOWN].numpy(), near[0].similarity[:, :_SHOWN].numpy()
        folds_of = fold.numpy(), of[pairs:].numpy()
        return Evidence(names, table[:pairs], table[pairs:], decoys.kind, *folds_of, beside, seen, *like)

    names = (
        *(f"{FEATURES}:{name}" for name in FEATURE_SIGNALS),
        *(f"{LOADED}:{name}" for name in (*SIGNALS, MATCHING)),
        *(f"{model}:{name}" for model in (FITTED, CANONICAL) for name in SIGNALS),
    )
    parts = (image, caption), fold, around, inputs.device, processes
    weights = torch.ones(pairs)
    first = finish((yield from _canonical((images, texts), weights, *parts)))
    weights[np.argsort(judge(first).score, kind="stable")] = torch.linspace(1, 0, pairs)
    return finish((yield from _canonical((images, texts), weights, *parts)))


class _OnCpu:
    """Features in float32 on the CPU, read when they are asked for.

    Args:
        side: shape ``(N, w)``, on the disk, in memory or on the device.
    """

    def __init__(self, side: Tensor | DiskMatrix) -> None:
        self._side = side

    def __len__(self) -> int:
        return len(self._side)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self._side[rows].float().cpu()


def _directions(features: Tensor) -> Tensor:
    """From the mean, as unit vectors."""
    away = features - features.mean(0)
    return normalize(away, dim=1, out=away)


def _canonical(
    features: tuple[Rows, Rows],
    weights: Tensor,
    measured: tuple[Tensor, Tensor],
    fold: Tensor,
    around: Surroundings,
    device: str,
    processes: ProcessGroup,
) -> Generator[Progress, None, np.ndarray]:
    """Signals of pairs and decoys by heads in closed form, each fold's by heads made of other folds.

    Args:
        features: of images and of captions, shape ``(N, w)`` each.
        weights: how much each row counts in the heads, shape ``(N,)``.
        measured: rows of images and of captions.
        fold: of each row.
        around: what pairs are compared with.
        device: where.
        processes: those that share the measuring.
    """
    of, folds = fold[measured[0]], int(fold.max()) + 1
    found = np.empty((len(of), len(SIGNALS)), dtype=np.float32)
    for number in range(folds):
        held = torch.nonzero(of == number).flatten()
        others = torch.nonzero((fold != number) | (folds == 1)).flatten()
        others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(number))[:_FITTED]]
        sides = [side[others] for side in features]
        ridge = RIDGE * sum(side.shape[1] for side in sides) / 2 / len(others)
        heads = canonical_heads(sides[0], sides[1], weights[others], ridge)
        space = PairSpace(*heads.embed(*features), CANONICAL_SCALE, around, device)
        found[held] = _shared(processes, space.measure, measured[0][held], measured[1][held])
        del space
        yield Progress("Refitting", folds, folds)
    return found


def _shared(
    processes: ProcessGroup, measure: Callable[[Tensor, Tensor], np.ndarray], image: Tensor, caption: Tensor
) -> np.ndarray:
    """What is measured of images with captions, each process measuring some of them."""
    own = torch.arange(processes.rank, len(image), processes.count)
    parts = processes.gather([(own.numpy(), measure(image[own], caption[own]))])
    found = np.empty((len(image), *parts[0][1].shape[1:]), dtype=np.float32)
    for rows, values in parts:
        found[rows] = values
    return found


def _scale(inputs: DetectorInputs, theta: Tensor) -> float:
    """What the model multiplies cosines with."""
    zero, one = inputs.objective.scope.logits(theta, torch.tensor([0.0, 1.0]).to(theta))
    return float(one - zero)


def _fit(inputs: DetectorInputs, rows: Tensor, number: int, folds: int) -> Generator[Progress, None, Tensor]:
    """Heads fitted to some pairs, from the weights as loaded; one that is not at a minimum yet will do."""
    objective, batches = inputs.objective, inputs.batches
    size = max(len(batch) for batch in batches.partition)
    parts = [rows[part] for part in random_partition(len(rows), size, inputs.seed)]
    part = ContrastiveLoss(
        objective.scope, batches.regrouped(parts), len(rows), objective.proximal, objective.processes
    )
    theta = objective.scope.start
    with suppress(EcifError):
        for theta, _ in minimise(part, _TOLERANCE, _PASSES):  # noqa: B007
            yield Progress("Refitting", number, folds)
    return theta
