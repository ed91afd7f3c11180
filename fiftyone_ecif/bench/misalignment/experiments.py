"""How well misaligned pairs are found, against other detectors on the same model and pairs.

Captions of clean pairs are permuted among some of them, a model is trained on
the result, and every detector looks for the victims. All of it anew for each
kind of noise, ratio and seed.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.bench.misalignment.frozen_towers import frozen_features
from fiftyone_ecif.bench.misalignment.pairs import CleanPairs, swap_captions
from fiftyone_ecif.bench.misalignment.pretrained import pretrained_heads
from fiftyone_ecif.demo.training import train
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.curvature import hessian_at
from fiftyone_ecif.influence.direct import direct_influence
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import solve, solving
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projected_gradients import keep_gradients
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.influence.target_losses import Contrastive
from fiftyone_ecif.misalignment.active_learning import propose
from fiftyone_ecif.misalignment.detection import run_detectors
from fiftyone_ecif.misalignment.detectors import DETECTORS, Calibrated
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.evidence import KINDS, Evidence
from fiftyone_ecif.misalignment.findings import Findings
from fiftyone_ecif.misalignment.judgement import Judgement, judge
from fiftyone_ecif.misalignment.noise_rate import Mixture, NoiseRate
from fiftyone_ecif.misalignment.ranks import ranked
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.store.tables import Store

Row = dict[str, Any]

MODEL = "ecif-tiny"
#: What is audited: a small model trained on the spoiled pairs, new heads on frozen towers trained on them, or a
#: pretrained model that has never seen them.
SCRATCH, FROZEN, PRETRAINED = "ecif-tiny from scratch", "frozen towers", "pretrained"
#: Detectors of others, or as others would make them: what ours are held against.
BASELINES = (
    *("clip_score", "neg_clip_loss", "lemon", "lemon_z", "deep_knn", "cross_fit"),
    *("loss", "self_influence", "loo_loss", "global_influence"),
    *("loaded_clip_score", "loaded_neg_clip_loss"),
)
BUDGETS = (0.05, 0.1, 0.2, 0.4)
_WIDTH, _EMBEDDING, _SCALE, _PROXIMAL = 64, 32, 10.0, 0.1  # of the heads on frozen towers
_BATCH_SIZE = 256
_TOLERANCE, _PASSES = 1e-3, 1000  # of fits: relative gradient norm where detection has stopped changing, length
_HELD_OUT = 0.15  # share of the groups that is kept clean, half to validate on, half to test


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        pairs: of a set, at most.
        ratios: shares of the captions that are permuted.
        seeds: each with new noise and new training.
        steps: batches that a model is trained on, if it is trained from scratch.
        labels: numbers of reviewed pairs.
        drops: shares of the pairs that are dropped before retraining, at the highest ratio.
        retrained: seeds in which they are.
        ablations: seeds in which parts of the default are left out.
        draws: of the bootstrap.
    """

    pairs: int = 4000
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    seeds: int = 5
    steps: int = 400
    labels: tuple[int, ...] = (25, 50, 100, 200)
    drops: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    retrained: int = 1
    ablations: int = 1
    draws: int = 1000


QUICK = Sizes(
    pairs=600,
    ratios=(0.2,),
    seeds=1,
    steps=150,
    labels=(25, 50, 100),
    drops=(0.0, 0.2),
    retrained=1,
    ablations=0,
    draws=200,
)


@dataclass(frozen=True)
class Trained:
    """A model that was trained on spoiled pairs.

    Attributes:
        inputs: the spoiled pairs and the model, its heads brought to a minimum of their loss.
        loaded: the same with the weights that are loaded.
        wrong: which are spoiled, bool, shape ``(N,)``.
        features: of the spoiled pairs, shape ``(N, w)`` each.
        test: features of clean pairs that nothing was trained on.
    """

    inputs: DetectorInputs
    loaded: DetectorInputs
    wrong: np.ndarray
    features: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def run(
    data: CleanPairs,
    sizes: Sizes,
    regime: str = SCRATCH,
    noises: Sequence[str] = (),
    report: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All measurements on one set, on one thread.

    Args:
        data: clean pairs.
        sizes: how much to measure.
        regime (SCRATCH): what is audited, or :data:`FROZEN` or :data:`PRETRAINED`.
        noises (()): kinds of noise; by default all that the pairs allow.
        report: told what is being measured.
        keep: given what is measured so far after each model, so that a run that is stopped leaves it; the
            summary is over the seeds that are whole.

    Returns:
        ``rows``, one a detector, noise, ratio and seed: ``auroc``, ``auprc``,
        ``f1`` (as many flagged as are wrong), ``p_at_10``, ``p_at_100`` and
        ``recall_at_budget`` (share flagged -> share of the wrong ones found), all
        in [0, 1]; ``summary`` over seeds, with the paired bootstrap of the
        difference of each of our detectors to the best baseline; ``noise_rates``,
        with clean sets too (ratio 0), ``reliability``, ``review``, ``downstream``
        and ``ablation``; ``seconds``

    Raises:
        EcifError: if the pairs do not allow a kind of noise
    """
    possible = ("random", *data.kinds)
    for noise in noises:
        if noise not in possible:
            raise EcifError(f"noise={noise!r} cannot be made of {data.name}, which allows {', '.join(possible)}")
    torch.set_num_threads(1)
    start = time.perf_counter()
    if len(data.captions) > sizes.pairs:
        data = data.select(np.sort(np.random.default_rng(0).permutation(len(data.captions))[: sizes.pairs]))
    result: dict[str, Any] = {
        name: [] for name in ("rows", "summary", "noise_rates", "reliability", "review", "downstream", "ablation")
    }
    result |= {"data": data.name, "pairs": len(data.captions), "model": regime}
    seen: dict[tuple[str, float], list[tuple[np.ndarray, dict[str, np.ndarray]]]] = {
        cell: [] for cell in itertools.product(noises or possible, sizes.ratios)
    }
    for seed in range(sizes.seeds):
        for (noise, ratio), found in seen.items():
            report(f"{data.name}: {noise} noise, {ratio:.0%}, seed {seed}")
            where = {"data": data.name, "noise": noise, "ratio": ratio, "seed": seed}
            trained = spoil_and_train(data, noise, ratio, seed, sizes, regime)
            scores, evidence, judgement = _all_scores(trained)
            wrong = trained.wrong
            found.append((wrong, scores))
            result["rows"] += [where | {"detector": name} | measure(wrong, score) for name, score in scores.items()]
            result["noise_rates"].append(where | _rates(evidence, judgement, trained))
            result["reliability"] += [where | row for row in reliability(judgement.probability, wrong)]
            result["review"] += [where | row for row in _review(wrong, evidence, judgement, sizes.labels)]
            if seed < sizes.ablations:
                result["ablation"] += [where | row for row in _ablation(wrong, evidence)]
            if ratio == max(sizes.ratios) and seed < sizes.retrained:
                result["downstream"] += [where | row for row in _downstream(trained, scores, sizes.drops, seed)]
            result["seconds"] = round(time.perf_counter() - start, 1)
            keep(result)
        report(f"{data.name}: clean, seed {seed}")
        where = {"data": data.name, "noise": "none", "ratio": 0.0, "seed": seed}
        trained = spoil_and_train(data, "random", 0.0, seed, sizes, regime)
        clean = follow(run_detectors(trained.loaded, [Calibrated.name]), progress=False)
        result["noise_rates"].append(where | _rates(*_judged(clean), trained))
        result["summary"] = [
            row
            for (noise, ratio), found in seen.items()
            for row in summarise({"data": data.name, "noise": noise, "ratio": ratio}, found, sizes.draws)
        ]
        keep(result)
    return result


def measure(wrong: np.ndarray, scores: np.ndarray) -> Row:
    """What a detector found, all in [0, 1].

    Args:
        wrong: which pairs are misaligned, bool, shape ``(N,)``.
        scores: higher = more suspicious, shape ``(N,)``.
    """
    order = np.argsort(-scores, kind="stable")
    hits = wrong[order]
    flagged = int(wrong.sum())
    return {
        "auroc": float(roc_auc_score(wrong, scores)),
        "auprc": float(average_precision_score(wrong, scores)),
        "f1": float(hits[:flagged].mean()),  # precision and recall are one number there
        "p_at_10": float(hits[:10].mean()),
        "p_at_100": float(hits[:100].mean()),
        "recall_at_budget": {
            str(budget): float(hits[: round(budget * len(hits))].sum() / flagged) for budget in BUDGETS
        },
    }


def reliability(probability: np.ndarray, wrong: np.ndarray) -> list[Row]:
    """How many pairs are wrong where that is said to be so probable, in tenths that are not empty."""
    tenth = np.minimum((10 * probability).astype(int), 9)
    return [
        {
            "from": number / 10,
            "pairs": int((tenth == number).sum()),
            "said": float(probability[tenth == number].mean()),
            "wrong": float(wrong[tenth == number].mean()),
        }
        for number in np.unique(tenth)
    ]


def expected_calibration_error(probability: np.ndarray, wrong: np.ndarray) -> float:
    """The mean distance of what is said from what is, over the tenths of :func:`reliability`."""
    rows = reliability(probability, wrong)
    return float(sum(row["pairs"] * abs(row["said"] - row["wrong"]) for row in rows) / len(wrong))


def summarise(
    where: Mapping[str, Any], seen: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]], draws: int
) -> list[Row]:
    """Means and spreads over seeds, and how far each detector is from the best baseline.

    Args:
        where: what all rows share.
        seen: for each seed which pairs are wrong and the scores of each detector.
        draws: of the bootstrap over pairs, the same pairs for both detectors.
    """
    names = list(seen[0][1])
    aurocs = {name: [roc_auc_score(wrong, scores[name]) for wrong, scores in seen] for name in names}
    best = max(BASELINES, key=lambda name: np.mean(aurocs[name]) if name in aurocs else -1)
    rows = []
    for name in names:
        each = [measure(wrong, scores[name]) for wrong, scores in seen]
        row = {**where, "detector": name, "seeds": len(seen)}
        for column in ("auroc", "auprc", "f1", "p_at_10", "p_at_100"):
            values = [found[column] for found in each]
            row |= {column: float(np.mean(values)), f"{column}_sd": float(np.std(values, ddof=len(values) > 1))}
        if name not in (*BASELINES, "lemon_tuned"):
            low, high = _bootstrap(seen, name, best, draws)
            row |= {
                "best_baseline": best,
                "difference": float(np.mean(aurocs[name]) - np.mean(aurocs[best])),
                "difference_low": low,
                "difference_high": high,
            }
        rows.append(row)
    return sorted(rows, key=lambda row: -row["auroc"])


def _bootstrap(
    seen: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray]]], ours: str, other: str, draws: int
) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        differences = []
        for wrong, scores in seen:
            rows = generator.integers(len(wrong), size=len(wrong))
            differences.append(_auroc(wrong[rows], scores[ours][rows]) - _auroc(wrong[rows], scores[other][rows]))
        found.append(np.mean(differences))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _auroc(wrong: np.ndarray, scores: np.ndarray) -> float:
    """By ranks: ten times faster than a curve, which matters in a bootstrap."""
    count = int(wrong.sum())
    ranks = ranked(scores) * len(scores)
    return float((ranks[wrong].sum() - count * (count + 1) / 2) / (count * (len(wrong) - count)))


def spoil_and_train(data: CleanPairs, noise: str, ratio: float, seed: int, sizes: Sizes, regime: str) -> Trained:
    """Spoils the pairs that are not held out, trains on them and brings the heads to a minimum."""
    generator = np.random.default_rng([seed, 1])
    groups = generator.permutation(sorted(set(data.groups)))
    away = set(groups[: max(round(_HELD_OUT * len(groups)), 2)])
    inside = [row for row, group in enumerate(data.groups) if group not in away]
    outside = generator.permutation([row for row, group in enumerate(data.groups) if group in away])
    pairs = data.select(inside)
    captions, wrong = swap_captions(pairs, noise, ratio, seed)
    if ratio and not 0 < wrong.sum() < len(wrong):
        raise ValueError(f"{noise} noise at {ratio:.0%} spoils {wrong.sum()} of {len(wrong)} pairs")
    clean = data.select(outside)
    if regime != SCRATCH:
        images, texts = frozen_features(data.paths, data.captions)
        places = {caption: row for row, caption in enumerate(data.captions)}  # equal captions, equal features
        given = torch.tensor([places[caption] for caption in captions])
        rows, others = torch.tensor(inside), torch.from_numpy(outside)
        if regime == FROZEN:
            sides = [_principal(images, images[rows]), _principal(texts, texts[given])]
            scope, proximal = _new_heads(seed), _PROXIMAL
        else:
            scope, of = pretrained_heads(images, texts, rows, data.paths[0], seed)
            sides, proximal = list(of), 1.0
        features = sides[0][rows], sides[1][given]
        held_out = sides[0][others], sides[1][others]
    else:
        with tempfile.TemporaryDirectory() as place:
            checkpoint = Path(place) / "model.pt"
            paths = [Path(path) for path in pairs.paths]
            follow(train(paths, captions, checkpoint, sizes.steps, seed, model=MODEL), progress=False)
            encoder = OpenClipEncoder(MODEL, str(checkpoint), "cpu")
        features, held_out = _encode(encoder, pairs.paths, captions), _encode(encoder, clean.paths, clean.captions)
        scope, proximal = _scope(encoder), 1.0
    half = len(outside) // 2
    validation = held_out[0][:half], held_out[1][:half]
    inputs = _fit(scope, features, captions, validation, proximal, seed)
    loaded = replace(inputs, theta=scope.start, gradients=None, influence=None)
    return Trained(inputs, loaded, wrong, features, (held_out[0][half:], held_out[1][half:]))


def _scope(encoder: OpenClipEncoder) -> HeadScope:
    scope = encoder.scope(parse_scope("heads"))
    assert isinstance(scope, HeadScope)
    return scope


def _encode(encoder: OpenClipEncoder, paths: Sequence[str], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    images = [rows for _, rows, _ in encoder.image_features(paths, _BATCH_SIZE, 0)]
    return torch.cat(images), torch.cat(list(encoder.text_features(captions, _BATCH_SIZE)))


def _principal(features: Tensor, seen: Tensor) -> Tensor:
    """The leading principal components of what is trained on, for all rows, in units of their spread."""
    mean = seen.mean(0)
    directions = torch.linalg.svd((seen - mean).double(), full_matrices=False).Vh[:_WIDTH]
    components = (features - mean).double() @ directions.T
    units: Tensor = components / ((seen - mean).double() @ directions.T).std()
    return units.float()


def _new_heads(seed: int) -> HeadScope:
    generator = torch.Generator().manual_seed(seed)
    heads = [
        torch.linalg.qr(torch.randn(_WIDTH, _EMBEDDING, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    ]
    return HeadScope(heads[0], heads[1], _SCALE)


def _fit(
    scope: HeadScope,
    features: tuple[Tensor, Tensor],
    captions: Sequence[str],
    validation: tuple[Tensor, Tensor],
    proximal: float,
    seed: int,
) -> DetectorInputs:
    """The pairs at the minimum of their heads, with stored gradients and influence on the validation pairs."""
    pairs = len(captions)
    size = min(_BATCH_SIZE, pairs)
    batches = FeatureBatches(*features, random_partition(pairs, size, seed))
    objective = ContrastiveLoss(scope, batches, pairs, proximal)
    theta = _minimum(objective)
    store = Store("bench", f"detectors-{time.time_ns()}")
    try:
        kept = GradientStore(store, pairs)
        follow(keep_gradients(kept, objective, theta, {}), progress=False)
        gradients = kept.load()
    finally:
        store.delete()
    count = len(validation[0])
    aims = FeatureBatches(*validation, random_partition(count, min(size, count), 0))
    gradient, _ = Contrastive().make(scope, aims).gradient_and_value(theta)
    steps = solve(hessian_at(objective, theta), gradient, tolerance=1e-2)
    solution = follow(solving(steps), progress=False).vector
    positive, negative, _ = follow(direct_influence(objective, theta, [solution], "exact"), progress=False)
    duplicates = find_duplicates(features[0], captions)
    return DetectorInputs(objective, theta, duplicates, gradients, (positive + negative)[0], seed)


def _minimum(objective: ContrastiveLoss) -> Tensor:
    theta = objective.scope.start
    with suppress(EcifError):  # one that is not there yet
        for theta, _ in minimise(objective, _TOLERANCE, _PASSES):  # noqa: B007
            pass
    return theta


def _tuned_lemon(trained: Trained) -> np.ndarray:
    """LEMoN with the weights that suit the evaluation labels best: a ceiling, no method."""
    space = trained.inputs.model
    distance = space.distance
    best, found = -1.0, np.zeros(len(distance))
    for count, near, far in itertools.product((5, 15, 30), (0.1, 1.0, 5.0), (0.0, 2.0, 5.0, 10.0)):
        terms = space.disagreement(count, near, far)
        for beta, gamma in itertools.product((0.0, 1.0, 2.0, 5.0, 10.0, 20.0), repeat=2):
            scores = (distance + beta * terms[0] + gamma * terms[1]).numpy()
            auroc = _auroc(trained.wrong, scores)
            if auroc > best:
                best, found = auroc, scores
    return found


def _all_scores(trained: Trained) -> tuple[dict[str, np.ndarray], Evidence, Judgement]:
    """Of every detector on the fitted heads, of two on the loaded weights, and of the default."""
    others = [name for name in DETECTORS if name != Calibrated.name]
    fitted = follow(run_detectors(trained.inputs, others), progress=False)
    names = ("clip_score", "neg_clip_loss")
    loaded = follow(run_detectors(trained.loaded, [*names, Calibrated.name]), progress=False)
    scores = fitted.scores | {Calibrated.name: loaded.scores[Calibrated.name], "lemon_tuned": _tuned_lemon(trained)}
    return scores | {f"loaded_{name}": loaded.scores[name] for name in names}, *_judged(loaded)


def _judged(found: Findings) -> tuple[Evidence, Judgement]:
    assert found.evidence is not None
    assert found.judgement is not None
    return found.evidence, found.judgement


def _rates(evidence: Evidence, judgement: Judgement, trained: Trained) -> Row:
    """What a run says of itself, and what is.

    ``known`` is the share that it would say if it knew the scores of the wrong pairs in place of decoys'.
    """
    wrong, rate = trained.wrong, judgement.rate
    known = Mixture(judgement.score, [judgement.score[wrong]], [1.0]).rate if wrong.any() else NoiseRate(0.0, 0.0, 0.0)
    counts = np.unique(trained.inputs.duplicates.caption, return_inverse=True, return_counts=True)
    counted = roc_auc_score(wrong, counts[2][counts[1]]) if wrong.any() else 0.5
    return {
        "wrong": float(wrong.mean()),
        **rate._asdict(),
        "told": float(rate.told),
        "covered": float(rate.low <= wrong.mean() <= rate.high),
        "calibration_error": expected_calibration_error(judgement.probability, wrong),
        **{f"known_{name}": value for name, value in known._asdict().items()},
        "seen": float(evidence.seen),
        **{f"power_{kind}": judgement.power[kind] for kind in KINDS},
        "duplicate_count_auroc": float(counted),
    }


def _review(wrong: np.ndarray, evidence: Evidence, judgement: Judgement, steps: Sequence[int]) -> list[Row]:
    """AUROC as more and more pairs are reviewed, chosen as the tool proposes: on the others, and on all.

    In the list of all pairs, as a person sees it after a review, the reviewed ones are where they belong.
    """
    labels, now, rows = np.full(len(wrong), -1), judgement, []
    for number in [step for step in steps if step < len(wrong) / 2]:
        chosen = propose(now.probability, labels >= 0, number - int((labels >= 0).sum()), seed=number)
        labels[chosen] = wrong[chosen]
        if len(set(labels[labels >= 0])) < 2:
            continue  # nothing to learn from yet
        now = judge(evidence, labels)
        left = labels < 0
        listed = np.where(left, now.score, np.where(labels == 1, np.inf, -np.inf))
        rows.append(
            {
                "labels": number,
                "auroc_all": _auroc(wrong, listed),
                "auroc_all_without": _auroc(wrong, judgement.score),
                "auroc": _auroc(wrong[left], now.score[left]),
                "auroc_without": _auroc(wrong[left], judgement.score[left]),
                "rate_error": abs(now.rate.rate - float(wrong.mean())),
                "rate_error_without": abs(judgement.rate.rate - float(wrong.mean())),
            }
        )
    return rows


def _downstream(trained: Trained, scores: Mapping[str, np.ndarray], drops: Sequence[float], seed: int) -> list[Row]:
    """Retrieval on clean held-out pairs after dropping the most suspicious pairs and training the heads again."""
    generator = np.random.default_rng([seed, 2])
    orders = {
        Calibrated.name: scores[Calibrated.name],
        "clip_score": scores["clip_score"],
        "lemon_z": scores["lemon_z"],
        "random": generator.random(len(trained.wrong)),
        "oracle": trained.wrong + 0.5 * generator.random(len(trained.wrong)),
    }
    objective = trained.inputs.objective
    rows = []
    for (by, suspicion), share in itertools.product(orders.items(), drops):
        dropped = torch.from_numpy(np.argsort(-suspicion)[: round(share * len(suspicion))].copy())
        theta = _minimum(objective.without(dropped))
        rows.append({"by": by, "dropped": share, "recall_at_5": _recall(trained, theta)})
    return rows


def _recall(trained: Trained, theta: Tensor) -> float:
    """The share of held-out images and captions whose partner is among the five most similar."""
    scope = trained.inputs.objective.scope
    images = normalize(scope.embed_images(theta, trained.test[0].double()), dim=1)
    captions = normalize(scope.embed_captions(theta, trained.test[1].double()), dim=1)
    similarity = images @ captions.T
    better = [(side > side.diagonal()[:, None]).sum(1) for side in (similarity, similarity.T)]
    return float((torch.cat(better) < 5).double().mean())


def _ablation(wrong: np.ndarray, evidence: Evidence) -> list[Row]:
    """AUROC of the default without a model and without a signal."""
    found = []

    def add(what: str, value: str, part: Evidence) -> None:
        auroc = _auroc(wrong, judge(part).score)
        found.append({"what": what, "value": value, "auroc": auroc})

    add("all", "", evidence)
    for what, place in (("without model", 0), ("without signal", 1)):
        parts = [name.split(":")[place] for name in evidence.names]
        for value in dict.fromkeys(parts):
            kept = [column for column, part in enumerate(parts) if part != value]
            names = tuple(evidence.names[column] for column in kept)
            part = replace(evidence, names=names, pairs=evidence.pairs[:, kept], decoys=evidence.decoys[:, kept])
            add(what, value, part)
    return found
