"""What is made of evidence: how suspicious each pair is, how probably it is wrong, and how far to trust that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fiftyone_ecif.misalignment.calibration import NormalScores, fit_weights
from fiftyone_ecif.misalignment.evidence import CANONICAL, FEATURES, KINDS, MODELS, WORDS, Evidence
from fiftyone_ecif.misalignment.mistakes import KindsOfMistakes
from fiftyone_ecif.misalignment.noise_rate import Mixture, NoiseRate

#: AUROC on decoys from which on a run can be trusted.
TRUSTED = 0.7
PRIOR = np.array([0.8, 0.15, 0.05])  # of each kind of mistakes
SAID = 0.5  # how far it is changed by what the suspicious pairs look like: their shares to this power
_ROUNDS = 3  # of both the regression and that, as they change what is suspicious
_LABEL = 1 / 200  # how much a pair counts that a person judged, all decoys together being one
_CLEAR = 0.3  # log odds from which evidence is worth a word


@dataclass(frozen=True)
class Judgement:
    """What is made of evidence.

    Attributes:
        score: log odds that a pair looks like a decoy, higher = more suspicious, shape ``(N,)``.
        probability: that it is misaligned, rising with the score, shape ``(N,)``.
        rate: how many are.
        power: AUROC at which decoys of each kind are told from right pairs; see
            :data:`fiftyone_ecif.misalignment.evidence.KINDS`.
        weights: by signal, means over folds.
        reasons: what speaks against each pair, the strongest first; None where nothing does.
    """

    score: np.ndarray
    probability: np.ndarray
    rate: NoiseRate
    power: dict[str, float]
    weights: dict[str, float]
    reasons: list[str | None]


def judge(evidence: Evidence, labels: np.ndarray | None = None) -> Judgement:
    """Learns from decoys, and from what a person said, how to weigh signals, and applies it.

    Each pair is judged by weights that were learned without its fold; it plays a part only in how much others count.

    Args:
        evidence: of pairs and decoys.
        labels (None): 0 = aligned, 1 = misaligned, -1 = not known, shape ``(N,)``.
    """
    labels = np.full(len(evidence.pairs), -1) if labels is None else labels
    trusted = (CANONICAL, FEATURES) if evidence.seen else MODELS
    used = [column for column, name in enumerate(evidence.names) if name.split(":")[0] in trusted]
    known, probability, kinds = labels >= 0, np.zeros(len(labels)), np.full(len(KINDS), 1 / len(KINDS))
    for _ in range(_ROUNDS):
        # what probably is wrong speaks less for what right pairs look like, decoys that mistakes are like speak more
        weighed = _weigh(evidence, used, labels, probability, kinds)
        scores, signals = weighed.pairs[evidence.sampled], weighed.inputs[evidence.sampled]
        mixture = Mixture(scores, _by_kind(weighed.decoys, evidence.kind), PRIOR)
        mixture.learn(weighed.pairs[known], labels[known] == 1)
        mistakes = KindsOfMistakes(weighed.decoy_inputs, evidence.kind)
        for _ in range(_ROUNDS):
            kinds = mistakes.shares(signals, mixture.probability(scores))
            mixture.expect(PRIOR * kinds**SAID)
        probability = mixture.probability(weighed.pairs)
        probability[known] = labels[known]
    right = 1 - probability[evidence.sampled]
    power = {
        name: _weighted_auroc(scores, right, decoys)
        for name, decoys in zip(KINDS, _by_kind(weighed.decoys, evidence.kind), strict=True)
    }
    names = [evidence.names[column] for column in used]
    return Judgement(
        weighed.pairs,
        probability,
        # features of towers that were fitted to the pairs hide wrong ones, and decoys are found too easily by them
        mixture.rate.unbounded() if evidence.seen and not known.any() else mixture.rate,
        power,
        dict(zip(names, weighed.weights.tolist(), strict=True)),
        _reasons(weighed, names),
    )


@dataclass(frozen=True)
class _Weighed:
    pairs: np.ndarray  # scores
    decoys: np.ndarray
    inputs: np.ndarray  # normal scores of the pairs
    decoy_inputs: np.ndarray
    weights: np.ndarray


def _weigh(
    evidence: Evidence, used: Sequence[int], labels: np.ndarray, probability: np.ndarray, kinds: np.ndarray
) -> _Weighed:
    """Scores of pairs and decoys, each fold by weights from the others.

    Args:
        evidence: of them.
        used: its columns.
        labels: see :func:`judge`.
        probability: that a pair is wrong, as far as that is known: it counts as much less among the right ones.
        kinds: how much decoys of each kind count.
    """
    pairs, decoys = evidence.pairs[:, used], evidence.decoys[:, used]
    normal = NormalScores(np.concatenate([pairs[evidence.sampled], decoys]))
    pairs, decoys = normal(pairs), normal(decoys)
    taken = evidence.sampled | (labels >= 0)
    right = 1 - probability
    share = np.where(labels >= 0, _LABEL, right / max(right[evidence.sampled].sum(), np.finfo(float).tiny))[taken]
    decoy_share = (kinds / np.bincount(evidence.kind))[evidence.kind]
    inputs, wrong = np.concatenate([pairs[taken], decoys]), np.concatenate([labels[taken] == 1, np.ones(len(decoys))])
    share, fold = np.concatenate([share, decoy_share]), np.concatenate([evidence.fold[taken], evidence.decoy_fold])
    scores, decoy_scores, found = np.zeros(len(pairs)), np.zeros(len(decoys)), []
    for number in np.unique(evidence.fold):
        others = fold != number if (fold != number).any() else np.full(len(fold), True)
        weights = fit_weights(inputs[others], wrong[others], share[others])
        for rows, side, into in (
            (evidence.fold == number, pairs, scores),
            (evidence.decoy_fold == number, decoys, decoy_scores),
        ):
            into[rows] = side[rows] @ weights[:-1] + weights[-1]
        found.append(weights[:-1])
    return _Weighed(scores, decoy_scores, pairs, decoys, np.mean(found, axis=0))


def _by_kind(values: np.ndarray, kind: np.ndarray) -> list[np.ndarray]:
    return [values[kind == number] for number in range(len(KINDS))]


def _weighted_auroc(scores: np.ndarray, weights: np.ndarray, above: np.ndarray) -> float:
    """How often one of ``above`` has a higher score than a weighted one, ties counting half; 0.5 if none has weight."""
    if not weights.any():
        return 0.5
    order = np.argsort(scores, kind="stable")
    below = np.append(0.0, np.cumsum(weights[order]))
    places = [np.searchsorted(scores[order], above, side) for side in ("left", "right")]
    return float((below[places[0]] + below[places[1]]).mean() / 2 / below[-1])


def _reasons(weighed: _Weighed, names: Sequence[str]) -> list[str | None]:
    """The words for the weighted signals, those with the same words added up."""
    words = [WORDS[name.split(":")[1]] for name in names]
    said = list(dict.fromkeys(words))
    groups = np.array([[word == each for each in said] for word in words], dtype=np.float32)
    found = []
    for row in (weighed.inputs * weighed.weights) @ groups:
        order = [place for place in np.argsort(-row, kind="stable") if row[place] >= _CLEAR]
        found.append(", ".join(said[place] for place in order) or None)
    return found
