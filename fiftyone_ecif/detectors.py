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

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.special import ndtri
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import normalize

from .cached import CachedGradients, mended
from .choices import TRAINED_DETECTORS
from .duplicates import Duplicates
from .errors import EcifError
from .fitting import minimise
from .heads import FeatureBatches
from .neighbours import Neighbours, nearest
from .objective import ContrastiveLoss, random_partition
from .progress import Progress

#: What ``fused`` ranks by; where the model was not trained on the pairs, without the last.
FUSED = ("lemon_z", "neg_clip_loss", "trusted_fit", "neighbour_influence")

_NEIGHBOURS = 30
_FEW_NEIGHBOURS = 5  # of lemon_z
_PARTITIONS = 10
_FOLDS = 5
_TRUSTED = 0.6  # share of the pairs that trusted_fit fits
_TOLERANCE = 1e-3  # relative gradient norm at which the embeddings of a fit have long stopped changing
_STEPS = 200  # of a fit, at most
_COMPARED = 256  # random other pairs that a held-out pair is compared with
_DAMPING = 1.0  # of the curvature in neighbour_influence, relative to its mean eigenvalue
_ROWS = 4096


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


@dataclass(frozen=True)
class Audit:
    """Pairs and the model that is asked about them.

    Attributes:
        objective: over the pairs, in the heads scope.
        theta: the parameters, shape ``(p,)``.
        duplicates: among the pairs.
        gradients: of the pairs, if the model was trained on them.
        influence: of the pairs on a validation set, shape ``(N,)``, if there is one.
        seed: of partitions and folds.
        device: where neighbours are looked for.
    """

    objective: ContrastiveLoss
    theta: Tensor
    duplicates: Duplicates
    gradients: CachedGradients | None = None
    influence: np.ndarray | None = None
    seed: int = 0
    device: str = "cpu"

    @property
    def batches(self) -> FeatureBatches:
        assert isinstance(self.objective.batches, FeatureBatches)
        return self.objective.batches

    def embeddings(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and captions, float32, shape ``(N, d)`` each."""
        scope, batches = self.objective.scope, self.batches
        parts = [
            (
                scope.embed_images(theta, batches.images[start : start + _ROWS].double()),
                scope.embed_captions(theta, batches.texts[start : start + _ROWS].double()),
            )
            for start in range(0, len(batches.images), _ROWS)
        ]
        images, texts = (normalize(torch.cat(side), dim=1).float() for side in zip(*parts, strict=True))
        return images, texts

    @cached_property
    def model(self) -> Space:
        """The pairs as the audited model sees them."""
        return Space(*self.embeddings(self.theta), torch.from_numpy(self.duplicates.pair), self.device)


class Space:
    """Unit embeddings of pairs and who is near whom.

    Args:
        images: shape ``(N, d)``.
        captions: likewise.
        group: numbers of shape ``(N,)``; copies of a pair, which are not to vouch for it, share one.
        device ("cpu"): where neighbours are looked for.
    """

    def __init__(self, images: Tensor, captions: Tensor, group: Tensor, device: str = "cpu") -> None:
        self.images, self.captions, self.group, self.device = images, captions, group, device

    @cached_property
    def distance(self) -> Tensor:
        """``1 - s_ii``, shape ``(N,)``."""
        return 1 - (self.images * self.captions).sum(1)

    @cached_property
    def neighbours(self) -> tuple[Neighbours, Neighbours]:
        """The nearest images and the nearest captions."""
        images, captions = (
            nearest(side, _NEIGHBOURS, self.group, self.device) for side in (self.images, self.captions)
        )
        return images, captions

    def disagreement(self, count: int, near: float = 0.1, doubt: float = 5.0) -> tuple[Tensor, Tensor]:
        """LEMoN's terms ``a`` and ``b``, shape ``(N,)`` each: what nearest images and captions say.

        Args:
            count: neighbours.
            near (0.1): how much less a neighbour counts that is farther away.
            doubt (5.0): how much less one counts whose own image and caption are far apart.
        """
        terms = []
        for side, other in zip(self.neighbours, (self.captions, self.images), strict=True):
            rows, similarity = side.rows[:, :count], side.similarity[:, :count]
            trust = torch.exp(-doubt * self.distance[rows]) * torch.exp(-near * (1 - similarity))
            terms.append((self.other_distance(side, other, count) * trust).mean(1))
        return terms[0], terms[1]

    def other_distance(self, near: Neighbours, other: Tensor, count: int) -> Tensor:
        """Distance to each neighbour on the other side, shape ``(N, count)``."""
        parts = [
            1 - torch.einsum("nd,nkd->nk", own, other[rows[:, :count]])
            for own, rows in zip(torch.split(other, _ROWS), torch.split(near.rows, _ROWS), strict=True)
        ]
        return torch.cat(parts)

    def lemon_z(self) -> Tensor:
        a, b = self.disagreement(_FEW_NEIGHBOURS)
        return _standard(self.distance) + _standard(a) + _standard(b)


@dataclass(frozen=True)
class Findings:
    """What detectors say of each pair.

    Attributes:
        scores: by detector, shape ``(N,)`` each, higher = more suspicious.
        share_below: see :class:`HeldOut`.
    """

    scores: dict[str, np.ndarray]
    share_below: np.ndarray


def run_detectors(audit: Audit, names: Sequence[str]) -> Generator[Progress, None, Findings]:
    """Scores of some detectors, and what the noise rate is estimated from.

    Args:
        audit: the pairs and the model.
        names: of :data:`fiftyone_ecif.choices.DETECTORS`. ``fused`` brings those that it fuses; those
            that presume a trained model are left out where it is none.

    Raises:
        EcifError: if ``global_influence`` is wanted and there is no validation
            set, or a fit does not converge
    """
    wanted = dict.fromkeys([name for name in names if name != "fused"] + list(FUSED if "fused" in names else ()))
    trained = audit.gradients is not None
    simple = [name for name in wanted if name in _SIMPLE and (trained or name not in TRAINED_DETECTORS)]
    scores: dict[str, np.ndarray] = {}
    for done, name in enumerate(simple):
        yield Progress("Comparing pairs", done, len(simple))
        scores[name] = np.asarray(_SIMPLE[name](audit), dtype=np.float64)
    if trained or "cross_fit" in wanted:
        held_out = yield from refit_held_out(audit)
        scores["cross_fit"] = held_out.distance
        below: Any = held_out.share_below
    else:  # the model itself has never seen the pairs
        below = _share_below(
            audit.model, torch.arange(audit.objective.pairs), torch.Generator().manual_seed(audit.seed)
        )
    if "trusted_fit" in wanted:
        scores["trusted_fit"] = (yield from _trusted(audit, scores)).lemon_z
    if "fused" in names:
        scores["fused"] = fuse(scores)
    return Findings(scores, np.asarray(below, dtype=np.float64))


def fuse(found: dict[str, np.ndarray]) -> np.ndarray:
    """The mean rank over what :data:`FUSED` names of a set of scores, in (0, 1]."""
    ranks: np.ndarray = np.mean([ranked(found[name]) for name in FUSED if name in found], axis=0)
    return ranks


def ranked(scores: np.ndarray) -> np.ndarray:
    """Ranks in (0, 1], the highest score 1; equal scores share one."""
    ranks: np.ndarray = rankdata(scores) / len(scores)
    return ranks


def normal_scores(scores: np.ndarray) -> np.ndarray:
    """What the ranks would be drawn from a standard normal distribution (van der Waerden's scores)."""
    normal: np.ndarray = ndtri((ranked(scores) * len(scores) - 0.5) / len(scores))
    return normal


def refit_held_out(audit: Audit, usable: np.ndarray | None = None) -> Generator[Progress, None, HeldOut]:
    """Fits the heads without each fifth of the pairs and looks at that fifth.

    Args:
        audit: the pairs and the model; its parameters play no part.
        usable (None): which pairs may be fitted at all, bool, shape ``(N,)``.

    Raises:
        EcifError: if a fit does not converge
    """
    objective, batches = audit.objective, audit.batches
    pairs = objective.pairs
    generator = torch.Generator().manual_seed(audit.seed)
    copies = torch.from_numpy(audit.duplicates.pair)  # go to one fold, so that none is fitted when another is held out
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
            for theta, _ in minimise(part, _TOLERANCE, _STEPS):  # noqa: B007
                yield Progress("Refitting", number, _FOLDS)
        space = Space(*audit.embeddings(theta), copies)
        places = torch.nonzero(held).flatten()
        found.distance[places] = _standard(space.distance[held])
        found.lemon_z[places] = _standard(space.lemon_z()[held])
        found.share_below[places] = _share_below(space, places, generator)
    yield Progress("Refitting", _FOLDS, _FOLDS)
    return found


def _share_below(space: Space, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Of random other pairs, the share whose caption fits the image no better than its own, and the other way round."""
    others = rows[torch.randperm(len(rows), generator=generator)[:_COMPARED]]
    shares = []
    for part in torch.split(rows, _ROWS):
        own = 1 - space.distance[part][:, None]
        different = (space.group[part][:, None] != space.group[others]).float()
        both = [
            ((one[part] @ other[others].T <= own) * different).sum(1)
            for one, other in ((space.images, space.captions), (space.captions, space.images))
        ]
        compared = 2 * different.sum(1)
        shares.append(torch.where(compared > 0, (both[0] + both[1]) / compared, 1.0))
    return torch.cat(shares)


def _trusted(audit: Audit, found: dict[str, np.ndarray]) -> Generator[Progress, None, HeldOut]:
    """What heads say that were fitted to pairs that are likely aligned."""
    missing = [name for name in ("lemon_z", "neg_clip_loss") if name not in found]
    suspicion = fuse(found | {name: np.asarray(_SIMPLE[name](audit)) for name in missing})
    return (yield from refit_held_out(audit, suspicion <= np.quantile(suspicion, _TRUSTED)))


def _clip_score(audit: Audit) -> Tensor:
    return audit.model.distance


def _neg_clip_loss(audit: Audit) -> Tensor:
    """With false negatives left out: pairs that share the image or the caption."""
    scope, space = audit.objective.scope, audit.model
    size = max(len(rows) for rows in audit.batches.partition)
    total = torch.zeros(audit.objective.pairs, dtype=torch.float64)
    for number in range(_PARTITIONS):
        for rows in random_partition(audit.objective.pairs, size, audit.seed + number):
            similarity = scope.logits(audit.theta, (space.images[rows] @ space.captions[rows].T).double())
            own = similarity.diagonal()
            for group in (audit.duplicates.image, audit.duplicates.caption):
                of = torch.from_numpy(group)[rows]
                false = (of[:, None] == of) & ~torch.eye(len(rows), dtype=torch.bool)
                similarity = similarity.masked_fill(false, -torch.inf)
            total[rows] += (similarity.logsumexp(0) + similarity.logsumexp(1)) / 2 - own
    return total / _PARTITIONS


def _lemon(audit: Audit) -> Tensor:
    a, b = audit.model.disagreement(_NEIGHBOURS)
    return audit.model.distance + 5 * a + 5 * b


def _deep_knn(audit: Audit) -> Tensor:
    space = audit.model
    return space.other_distance(space.neighbours[0], space.captions, _NEIGHBOURS).mean(1)


def _loss(audit: Audit) -> Tensor:
    scope, space = audit.objective.scope, audit.model
    losses = torch.zeros(audit.objective.pairs, dtype=torch.float64)
    for rows in audit.batches.partition:
        cosine = (space.images[rows] @ space.captions[rows].T).double()
        losses[rows] = scope.loss.own_losses(scope.logits(audit.theta, cosine))
    return losses


def _self_influence(audit: Audit) -> np.ndarray:
    assert audit.gradients is not None
    return audit.gradients.self_influence()


def _loo_loss(audit: Audit) -> np.ndarray:
    loss: np.ndarray = _loss(audit).numpy() + _self_influence(audit)
    return loss


def _global_influence(audit: Audit) -> np.ndarray:
    if audit.influence is None:
        raise EcifError("detector='global_influence' needs a target: a view of validation pairs")
    return -audit.influence


def _neighbour_influence(audit: Audit) -> np.ndarray:
    assert audit.gradients is not None
    near = [side.rows for side in audit.model.neighbours]
    whole = audit.gradients.positive + audit.gradients.negative
    agreement = [
        neighbour_influence(part, audit.gradients.curvature, near) for part in (audit.gradients.positive, whole)
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
    factor = cho_factor(mended(curvature, damping))
    units = normalize(torch.from_numpy(gradients), dim=1)
    means = []
    for start in range(0, len(units), _ROWS):
        solved = cho_solve(factor, gradients[start : start + _ROWS].T.astype(np.float64)).T
        rows = torch.cat([side[start : start + _ROWS] for side in near], dim=1)
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


_SIMPLE = {
    "clip_score": _clip_score,
    "neg_clip_loss": _neg_clip_loss,
    "lemon": _lemon,
    "lemon_z": lambda audit: audit.model.lemon_z(),
    "deep_knn": _deep_knn,
    "loss": _loss,
    "self_influence": _self_influence,
    "loo_loss": _loo_loss,
    "global_influence": _global_influence,
    "neighbour_influence": _neighbour_influence,
}


def _standard(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0).clamp_min(torch.finfo(values.dtype).tiny)
