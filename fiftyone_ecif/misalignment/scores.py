"""Detectors of misaligned pairs: a caption that does not belong to its image.

Arrays in, scores out: every detector gives each pair a number, **higher = more
suspicious**. With ``u``, ``v`` the unit embeddings of images and captions,
``s_ij = u_i . v_j``, ``t`` the temperature of the model and ``g_n`` the removal
gradient of a pair (see ``gradients``):

================== ==========================================================
clip_score         ``1 - s_ii``. CLIPScore, arXiv 2104.08718.
neg_clip_loss      ``-s_ii + t/2 (logsumexp_j s_ij/t + logsumexp_j s_ji/t)``,
                   the mean over 10 random partitions into batches.
                   negCLIPLoss, arXiv 2405.19547.
lemon              ``d_i + 5 a_i + 5 b_i`` with 30 neighbours, where
                   ``d_i = 1 - s_ii``, ``a_i`` is the mean over the nearest
                   images ``j`` of ``(1 - v_i.v_j) e^(-0.1 (1 - u_i.u_j)) e^(-5 d_j)``
                   and ``b_i`` likewise over the nearest captions.
                   LEMoN with fixed weights, arXiv 2407.18941.
lemon_z            the three terms standardised and added, 5 neighbours.
deep_knn           mean of ``1 - v_i.v_j`` over the 30 nearest images: deep
                   k-NN, arXiv 2004.12289, with the caption for the label.
cross_fit          ``1 - s_ii`` where both heads were fitted without the pair
                   (five folds), as in confident learning, arXiv 1911.00068.
trusted_fit        ``lemon_z`` where both heads were fitted without the pair and
                   without the 40 % most suspicious pairs. Ours.
loss               the pair's own loss in its batch.
self_influence     change of the pair's own loss if it had not been trained on,
                   arXiv 2002.08484 with the curvature of arXiv 1703.04730.
loo_loss           that loss: ``loss + self_influence``.
global_influence   minus the influence on a validation set: how the ECIF paper,
                   arXiv 2411.11667, looks for misaligned pairs.
neighbour_influence minus the mean over its nearest 30 images and 30 captions
                   ``m`` of ``cos(H^-1 g_n, g_m)``, taken with the positive part
                   of ``g`` and with the whole, and added: what the pair does to
                   the loss of its neighbours. Ours.
fused              the mean of the ranks of lemon_z, neg_clip_loss, trusted_fit
                   and neighbour_influence. Ours.
================== ==========================================================

Influence tells about the pairs that a model was trained on, and misleads about
others: see :data:`fiftyone_ecif.choices.TRAINED_DETECTORS`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.damping import damped
from fiftyone_ecif.influence.objective import random_partition
from fiftyone_ecif.misalignment.cross_fitting import HeldOut, refit_held_out, share_that_fits_no_better
from fiftyone_ecif.misalignment.embeddings import NEIGHBOURS, ROWS_AT_ONCE, DetectorInputs
from fiftyone_ecif.misalignment.fusion import FUSED, fuse, ranked
from fiftyone_ecif.options import TRAINED_DETECTORS
from fiftyone_ecif.progress import Progress

_PARTITIONS = 10
_TRUSTED = 0.6  # share of the pairs that trusted_fit fits
_DAMPING = 1.0  # of the curvature in neighbour_influence, relative to its mean eigenvalue


@dataclass(frozen=True)
class Findings:
    """What detectors say of each pair.

    Attributes:
        scores: by detector, shape ``(N,)`` each, higher = more suspicious.
        share_below: see :class:`HeldOut`.
    """

    scores: dict[str, np.ndarray]
    share_below: np.ndarray


def run_detectors(inputs: DetectorInputs, names: Sequence[str]) -> Generator[Progress, None, Findings]:
    """Scores of some detectors, and what the noise rate is estimated from.

    Args:
        inputs: the pairs and the model.
        names: of :data:`fiftyone_ecif.choices.DETECTORS`. ``fused`` brings those that it fuses; those
            that presume a trained model are left out where it is none.

    Raises:
        EcifError: if ``global_influence`` is wanted and there is no validation
            set, or a fit does not converge
    """
    wanted = dict.fromkeys([name for name in names if name != "fused"] + list(FUSED if "fused" in names else ()))
    trained = inputs.gradients is not None
    simple = [name for name in wanted if name in DETECTORS and (trained or name not in TRAINED_DETECTORS)]
    scores: dict[str, np.ndarray] = {}
    for done, name in enumerate(simple):
        yield Progress("Comparing pairs", done, len(simple))
        scores[name] = np.asarray(DETECTORS[name](inputs), dtype=np.float64)
    if trained or "cross_fit" in wanted:
        held_out = yield from refit_held_out(inputs)
        scores["cross_fit"] = held_out.distance
        below: Any = held_out.share_below
    else:  # the model itself has never seen the pairs
        below = share_that_fits_no_better(
            inputs.model, torch.arange(inputs.objective.pairs), torch.Generator().manual_seed(inputs.seed)
        )
    if "trusted_fit" in wanted:
        scores["trusted_fit"] = (yield from _trusted(inputs, scores)).lemon_z
    if "fused" in names:
        scores["fused"] = fuse(scores)
    return Findings(scores, np.asarray(below, dtype=np.float64))


def _trusted(inputs: DetectorInputs, found: dict[str, np.ndarray]) -> Generator[Progress, None, HeldOut]:
    """What heads say that were fitted to pairs that are likely aligned."""
    missing = [name for name in ("lemon_z", "neg_clip_loss") if name not in found]
    suspicion = fuse(found | {name: np.asarray(DETECTORS[name](inputs)) for name in missing})
    return (yield from refit_held_out(inputs, suspicion <= np.quantile(suspicion, _TRUSTED)))


def _clip_score(inputs: DetectorInputs) -> Tensor:
    return inputs.model.distance


def _neg_clip_loss(inputs: DetectorInputs) -> Tensor:
    """With false negatives left out: pairs that share the image or the caption."""
    scope, space = inputs.objective.scope, inputs.model
    size = max(len(rows) for rows in inputs.batches.partition)
    total = torch.zeros(inputs.objective.pairs, dtype=torch.float64)
    for number in range(_PARTITIONS):
        for rows in random_partition(inputs.objective.pairs, size, inputs.seed + number):
            similarity = scope.logits(inputs.theta, (space.images[rows] @ space.captions[rows].T).double())
            own = similarity.diagonal()
            for group in (inputs.duplicates.image, inputs.duplicates.caption):
                of = torch.from_numpy(group)[rows]
                false = (of[:, None] == of) & ~torch.eye(len(rows), dtype=torch.bool)
                similarity = similarity.masked_fill(false, -torch.inf)
            total[rows] += (similarity.logsumexp(0) + similarity.logsumexp(1)) / 2 - own
    return total / _PARTITIONS


def _lemon(inputs: DetectorInputs) -> Tensor:
    a, b = inputs.model.disagreement(NEIGHBOURS)
    return inputs.model.distance + 5 * a + 5 * b


def _deep_knn(inputs: DetectorInputs) -> Tensor:
    space = inputs.model
    return space.other_distance(space.neighbours[0], space.captions, NEIGHBOURS).mean(1)


def _loss(inputs: DetectorInputs) -> Tensor:
    scope, space = inputs.objective.scope, inputs.model
    losses = torch.zeros(inputs.objective.pairs, dtype=torch.float64)
    for rows in inputs.batches.partition:
        cosine = (space.images[rows] @ space.captions[rows].T).double()
        losses[rows] = scope.loss.own_losses(scope.logits(inputs.theta, cosine))
    return losses


def _self_influence(inputs: DetectorInputs) -> np.ndarray:
    assert inputs.gradients is not None
    return inputs.gradients.self_influence()


def _loo_loss(inputs: DetectorInputs) -> np.ndarray:
    loss: np.ndarray = _loss(inputs).numpy() + _self_influence(inputs)
    return loss


def _global_influence(inputs: DetectorInputs) -> np.ndarray:
    if inputs.influence is None:
        raise EcifError("detector='global_influence' needs a target: a view of validation pairs")
    return -inputs.influence


def _neighbour_influence(inputs: DetectorInputs) -> np.ndarray:
    assert inputs.gradients is not None
    near = [side.rows for side in inputs.model.neighbours]
    whole = inputs.gradients.positive + inputs.gradients.negative
    agreement = [
        neighbour_influence(part, inputs.gradients.curvature, near) for part in (inputs.gradients.positive, whole)
    ]
    total: np.ndarray = -np.sum(agreement, axis=0)
    return total


def neighbour_influence(
    gradients: np.ndarray, curvature: np.ndarray, near: Sequence[Tensor], damping: float = _DAMPING
) -> np.ndarray:
    """The mean over neighbours ``m`` of ``cos(H^-1 g_n, g_m)``: positive where the pair helps them, shape ``(N,)``.

    Args:
        gradients: ``g``, projected, shape ``(N, r)``.
        curvature: ``H`` between the directions, shape ``(r, r)``.
        near: neighbours by rows, shape ``(N, k)`` each.
        damping (1.0): added to the curvature, relative to its mean eigenvalue.
    """
    factor = cho_factor(damped(curvature, damping))
    units = normalize(torch.from_numpy(gradients), dim=1)
    means = []
    for start in range(0, len(units), ROWS_AT_ONCE):
        solved = cho_solve(factor, gradients[start : start + ROWS_AT_ONCE].T.astype(np.float64)).T
        rows = torch.cat([side[start : start + ROWS_AT_ONCE] for side in near], dim=1)
        steps = normalize(torch.from_numpy(solved), dim=1).to(units)
        means.append(
            torch.cat(
                [
                    torch.einsum("nr,nkr->nk", step, units[own]).mean(1)
                    for step, own in zip(torch.split(steps, 256), torch.split(rows, 256), strict=True)
                ]
            )
        )
    agreement: np.ndarray = torch.cat(means).numpy()
    return agreement


DETECTORS = {
    "clip_score": _clip_score,
    "neg_clip_loss": _neg_clip_loss,
    "lemon": _lemon,
    "lemon_z": lambda inputs: inputs.model.lemon_z(),
    "deep_knn": _deep_knn,
    "loss": _loss,
    "self_influence": _self_influence,
    "loo_loss": _loo_loss,
    "global_influence": _global_influence,
    "neighbour_influence": _neighbour_influence,
}

#: What speaks against a pair, by the detector that says so.
EVIDENCE = {
    "clip_score": "low similarity",
    "deep_knn": "neighbours disagree",
    "neighbour_influence": "harms its neighbours",
}
_CLEAR = 0.8  # rank from which a detector's evidence is worth a word


def reasons(scores: Mapping[str, np.ndarray]) -> list[str | None]:
    """What speaks against each pair, the strongest evidence first; None where nothing does."""
    names = [name for name in EVIDENCE if name in scores]
    ranks = np.stack([ranked(scores[name]) for name in names], axis=1)
    found = []
    for row in ranks:
        clear = [EVIDENCE[names[place]] for place in np.argsort(-row, kind="stable") if row[place] >= _CLEAR]
        found.append(", ".join(clear) or None)
    return found
