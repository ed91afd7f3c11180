"""Predicted effects of removing pairs against real retraining.

Everything is retrained for real: L-BFGS on the objective without the removed
pairs, to a relative gradient norm that leaves many digits of the smallest
effect. A goal of these measurements is to say where predictions stop matching.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cached import CachedGradients, gradient_covariance, mended
from ..choices import ROLES
from ..curvature import curvature_at, solve
from ..editing import group_gradient, removal_step
from ..gradients import BasisProjection, HeadProjection, KroneckerProjection, gradient_basis, principal_projection
from ..heads import FeatureBatches, HeadScope
from ..objective import ContrastiveLoss
from ..truncation import truncated_gradients
from .agreement import agreement, bootstrap, cosine, mean_pearson, mean_spearman, pearson, spearman
from .peers import PEERS, Problem
from .sketch import sketched_gradients
from .study import Study, drive, leave_one_out, make_study, minimum, study_for
from .world import World, make_world

Row = dict[str, Any]
_ROUGH = 1e-2  # relative residual at which scores have long stopped changing


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        pairs: training pairs of the heads scope.
        lora: the LoRA scope.
        lora_pairs: its training pairs, the first of those.
        sensitivity_pairs: training pairs where settings are varied.
        validation: validation pairs.
        steps: batches that the model is trained on.
        removals: pairs that are left out one by one, a seed.
        subsets: half-subsets that are retrained on.
        lora_subsets: likewise for LoRA.
        seeds: of the partition and of what is removed.
        fractions: shares of the pairs to remove in the curves.
        edits: shares of the LoRA scope's pairs to remove in edits.
        directions: that gradients of the LoRA scope are kept in.
        epochs: that AdamW may take to come as near to the minimum as an edit.
    """

    pairs: int = 1024
    lora: str = "lora:2"
    lora_pairs: int = 192
    sensitivity_pairs: int = 1024
    validation: int = 1024
    steps: int = 400
    removals: int = 40
    subsets: int = 60
    lora_subsets: int = 50
    seeds: int = 3
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    edits: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    directions: int = 128
    epochs: int = 200


QUICK = Sizes(
    lora="lora:2:1",
    lora_pairs=96,
    sensitivity_pairs=256,
    steps=250,
    removals=20,
    subsets=50,
    lora_subsets=12,
    seeds=1,
    fractions=(0.1, 0.3),
    edits=(0.1,),
    directions=32,
    epochs=40,
)


def loo(world: World, sizes: Sizes) -> list[Row]:
    """Leave-one-out: every role with every solver against retraining."""
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for seed in range(sizes.seeds):
        study = make_study(world, "heads", sizes.pairs, seed)
        rows, true = leave_one_out(study, sizes.removals, seed)
        gradient, _ = study.target.gradient_and_value(study.theta)
        for solver in ("hessian", "ggn", "identity", "logra"):
            for role in ROLES:
                if solver == "logra":
                    scores = _full_logra(study, gradient, role)
                else:
                    scores = np.sum(study.influence(study.solution(solver, gradient), role), axis=0)
                found.setdefault((role, solver), []).append((scores[rows.numpy()], true))
    return [
        {"role": role, "solver": solver, "scope": "heads", "n": sizes.pairs, "removals": sizes.removals * sizes.seeds}
        | agreement(parts)
        for (role, solver), parts in found.items()
    ]


def lds(world: World, sizes: Sizes) -> list[Row]:
    """Linear datamodelling score on random half-subsets, ours beside the peers."""
    rows = []
    for name, pairs, subsets in (
        ("heads", sizes.pairs, sizes.subsets),
        (sizes.lora, sizes.lora_pairs, sizes.lora_subsets),
    ):
        study = study_for(world, name, pairs)
        generator = torch.Generator().manual_seed(0)
        left_out = [torch.randperm(pairs, generator=generator)[: pairs // 2] for _ in range(subsets)]
        groups = _target_groups(study)
        losses = [_losses(study, study.retrain(rows_out)) for rows_out in left_out]
        true = np.array([[each[group].mean() for group in groups] for each in losses])
        gradients = [_group_target_gradient(study, group) for group in groups]
        scores: dict[str, list[np.ndarray]] = {}
        for gradient in gradients:
            for solver in ("hessian", "ggn"):
                scores.setdefault(f"ecif_{solver}", []).append(
                    np.sum(study.influence(study.solution(solver, gradient, _ROUGH)), axis=0)
                )
        problem = Problem(study.scope, study.theta, study.objective.batches, pairs, gradients[0])  # type: ignore[arg-type]
        for gradient in gradients:
            problem = problem.towards(gradient)
            for method, function in PEERS.items():
                scores.setdefault(method, []).append(function(problem))
        for method, each in scores.items():
            predicted = np.array([[score[rows_out.numpy()].sum() for score in each] for rows_out in left_out])
            mean, low, high = bootstrap(predicted, true, mean_spearman)
            rows.append(
                {
                    "method": method,
                    "scope": name,
                    "n": pairs,
                    "subsets": subsets,
                    "mean": mean,
                    "ci_low": low,
                    "ci_high": high,
                }
            )
    return sorted(rows, key=lambda row: (row["scope"], -row["mean"]))


def edit(world: World, sizes: Sizes) -> list[Row]:
    """One Newton step against retraining, for groups of pairs; times side by side."""
    rows = []
    for name, pairs in (("heads", sizes.pairs), (sizes.lora, sizes.lora_pairs)):
        study = study_for(world, name, pairs)
        gradient, _ = study.target.gradient_and_value(study.theta)
        solver = "hessian"
        influence = np.sum(study.influence(study.solution(solver, gradient)), axis=0)
        for kind, order in _orders(influence, seed=0).items():
            for fraction in (0.01, 0.05, 0.1, 0.2) if name == "heads" else sizes.edits:
                removed = torch.from_numpy(order[: max(round(fraction * pairs), 1)])
                start = time.perf_counter()
                cold = minimum(study.objective.without(removed), 1e-5)
                retraining = time.perf_counter() - start
                start = time.perf_counter()
                step = drive(removal_step(study.objective, study.theta, removed, solver))
                editing = time.perf_counter() - start
                truth = study.retrain(removed)
                change = truth - study.theta
                off = (step - change).norm().item()
                adamw: Row = {}
                if (kind, fraction) == ("random", 0.1):
                    seconds, epochs, distance = _adamw(study, removed, truth, off, sizes.epochs)
                    towers = epochs * _pass_through_towers(world, pairs, removed) if name == "heads" else 0.0
                    adamw = {
                        "time_ratio_adamw": seconds / editing,
                        "time_ratio_training": (seconds + towers) / editing,
                        "adamw_epochs": epochs,
                        "adamw_distance": distance / change.norm().item(),
                    }
                rows.append(
                    {
                        "scope": name,
                        "kind": kind,
                        "fraction": fraction,
                        "cosine": cosine(step, change),
                        "norm_ratio": (step.norm() / change.norm()).item(),
                        "gap_points": 100 * (study.accuracy(study.theta + step) - study.accuracy(truth)),
                        "loss_change_predicted": study.change(study.theta + step),
                        "loss_change_true": study.change(truth),
                        "distance": off / change.norm().item(),
                        "retraining_distance": (cold - truth).norm().item() / change.norm().item(),
                        "seconds": editing,
                        "time_ratio": retraining / editing,
                    }
                    | adamw
                )
    return rows


def _adamw(study: Study, removed: Tensor, truth: Tensor, distance: float, epochs: int) -> tuple[float, int, float]:
    """How long AdamW trains, from the loaded weights, to come as near to the true minimum as an edit does.

    One step a batch, the learning rate falling along a cosine.

    Returns:
        seconds, how many epochs they were, at most those that are allowed, and
        how near it came
    """
    objective = study.objective.without(removed)
    partition = objective.batches.partition
    start = time.perf_counter()
    theta = study.scope.start.clone()
    optimiser = torch.optim.AdamW([theta], lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(partition))
    for epoch in range(1, epochs + 1):  # noqa: B007  # how many there were
        for rows in partition:
            part = ContrastiveLoss(study.scope, objective.batches.regrouped([rows]), len(rows), objective.proximal)
            theta.grad = part.gradient_and_value(theta)[0]
            optimiser.step()
            schedule.step()
        near = (theta - truth).norm().item()
        if near <= distance:
            break
    return time.perf_counter() - start, epoch, near


def _pass_through_towers(world: World, pairs: int, removed: Tensor) -> float:
    """Seconds that the towers take for the images and captions that are left: what an epoch costs without a cache."""
    left = sorted(set(range(pairs)) - set(removed.tolist()))
    start = time.perf_counter()
    for _ in world.encoder.image_features([world.paths[row] for row in left], 128, 0):
        pass
    for _ in world.encoder.text_features([world.pairs[row].caption for row in left], 128):
        pass
    return time.perf_counter() - start


def curves(world: World, sizes: Sizes) -> list[Row]:
    """Target accuracy and loss after retraining without the most harmful, most valuable or random pairs."""
    rows = []
    for seed in range(sizes.seeds):
        study = make_study(world, "heads", sizes.pairs, seed)
        batches = study.target.batches.partition
        study.target, test = (study.target.part(part) for part in (batches[::2], batches[1::2]))
        gradient, _ = study.target.gradient_and_value(study.theta)
        influence = np.sum(study.influence(study.solution("hessian", gradient)), axis=0)
        for kind, order in _orders(influence, seed).items():
            for fraction in (0.0, *sizes.fractions):
                theta = study.retrain(torch.from_numpy(order[: round(fraction * sizes.pairs)]))
                rows.append(
                    {
                        "seed": seed,
                        "kind": kind,
                        "fraction": fraction,
                        "target_loss": study.target.loss(theta).item(),
                        "target_accuracy": study.accuracy(theta),
                        "test_loss": test.loss(theta).item(),
                        "test_accuracy": 1 - test.mistakes(theta).double().mean().item(),
                    }
                )
    return rows


def superposition(world: World, sizes: Sizes) -> list[Row]:
    """Whether effects add up: pairs that share a batch and a near-duplicate scene, or do not.

    For couples of training pairs with nearly the same caption, in one batch or in
    two, and for groups: the true joint effect, the sum of the true single
    effects, and what is predicted with the group's true gradient and by summing.
    """
    study = make_study(world, "heads", sizes.lora_pairs, 0, batch_size=32)
    gradient, _ = study.target.gradient_and_value(study.theta)
    solution = study.solution("hessian", gradient)
    single = np.sum(study.influence(solution), axis=0)
    rows = []
    for kind, couples in _couples(world, study, sizes.removals // 2).items():
        joint, apart, predicted, summed = [], [], [], []
        for couple in couples:
            joint.append(study.change(study.retrain(couple)))
            apart.append(sum(study.change(study.retrain(row[None])) for row in couple))
            predicted.append(solution.dot(group_gradient(study.objective, study.theta, couple)).item())
            summed.append(single[couple.numpy()].sum())
        size = np.abs(joint).mean()
        rows.append(
            {
                "kind": kind,
                "groups": len(couples),
                "non_additivity": float(np.abs(np.subtract(joint, apart)).mean() / size),
                "error_true_gradient": float(np.abs(np.subtract(predicted, joint)).mean() / size),
                "error_sum_of_pairs": float(np.abs(np.subtract(summed, joint)).mean() / size),
            }
        )
    return rows


def sensitivity(world: World, sizes: Sizes) -> list[Row]:
    """What scores depend on; each row a setting and what it does to the agreement with retraining."""
    rows: list[Row] = []
    count, pairs = max(sizes.removals // 2, 8), min(sizes.pairs, sizes.sensitivity_pairs)

    def measured(study: Study, what: str, value: Any) -> Row:
        left_out, true = leave_one_out(study, count, 0)
        gradient, _ = study.target.gradient_and_value(study.theta)
        scores = np.sum(study.influence(study.solution("hessian", gradient)), axis=0)
        return {"what": what, "value": value} | agreement([(scores[left_out.numpy()], true)])

    for proximal in (0.3, 1.0, 3.0):
        rows.append(measured(make_study(world, "heads", pairs, 0, proximal=proximal), "proximal", proximal))
    for batch_size in (32, 128, 512):
        rows.append(measured(make_study(world, "heads", pairs, 0, batch_size=batch_size), "batch_size", batch_size))
    for scale in (5.0, 20.0):
        rows.append(measured(make_study(world, "heads", pairs, 0, scale=scale), "inverse_temperature", scale))

    study = make_study(world, "heads", pairs, 0)
    left_out, true = leave_one_out(study, count, 0)
    gradient, _ = study.target.gradient_and_value(study.theta)
    base = np.sum(study.influence(study.solution("hessian", gradient)), axis=0)
    for damping in (0.0, 0.1, 1.0):
        solution = drive(solve(curvature_at(study.objective, study.theta, "hessian"), gradient, damping))
        scores = np.sum(study.influence(solution), axis=0)
        rows.append({"what": "damping", "value": damping} | agreement([(scores[left_out.numpy()], true)]))
    for tolerance in (1e-1, 1e-2, 1e-3):
        away = replace(study, theta=minimum(study.objective, tolerance))
        direction, _ = away.target.gradient_and_value(away.theta)
        scores = np.sum(away.influence(away.solution("hessian", direction)), axis=0)
        rows.append(
            {"what": "relative_gradient_norm", "value": tolerance} | agreement([(scores[left_out.numpy()], true)])
        )
    rows += _projection_sensitivity(study, gradient, base)
    for validation in (32, 128):
        target = world.target("heads", study.scope, 32, validation)
        part, _ = target.gradient_and_value(study.theta)
        scores = np.sum(study.influence(study.solution("hessian", part)), axis=0)
        rows.append({"what": "validation_pairs", "value": validation, "spearman": spearman(scores, base)})
    each = []
    for seed in range(1, 5):
        other = make_study(world, "heads", pairs, seed)
        part, _ = other.target.gradient_and_value(other.theta)
        each.append(np.sum(other.influence(other.solution("hessian", part)), axis=0))
    rows.append({"what": "n_partitions", "value": 1, "spearman": spearman(each[0], each[1])})
    rows.append({"what": "n_partitions", "value": 2, "spearman": spearman(each[0] + each[1], each[2] + each[3])})
    return rows


def _projection_sensitivity(study: Study, gradient: Tensor, base: np.ndarray) -> Iterator[Row]:
    """How well influence from stored gradients agrees with the direct one, by rank and curvature."""
    objective, theta, scope = study.objective, study.theta, study.scope
    assert isinstance(scope, HeadScope)
    assert isinstance(objective.batches, FeatureBatches)
    for rank in (8, 16, 32):
        projection = principal_projection(scope, theta, objective.batches, rank)
        positive, negative = _stored(projection, objective, theta)
        target = projection.project(gradient).numpy()[None]
        for name, matrix in (
            ("logra", gradient_covariance([positive + negative])),
            ("hessian", mended(projection.objective_curvature(objective, theta, "hessian").numpy())),
        ):
            scores = np.sum(CachedGradients(positive, negative, matrix, len(positive)).influence(target), axis=0)[0]
            yield {"what": f"projection_rank_{name}", "value": rank, "pearson": pearson(scores, base)}


def cached(world: World, sizes: Sizes) -> list[Row]:
    """Deep cached mode: gradients by truncated reverse mode, or by a forward-mode sketch.

    Both are kept in the same kind of directions and held against the direct
    influence on single target pairs, with the Gauss-Newton matrix as curvature.
    """
    study = study_for(world, sizes.lora, sizes.lora_pairs)
    objective, theta, target = study.objective, study.theta, study.target
    rows_of, inputs = target.batches.partition[0], target.batches[0]
    gradients = torch.func.jacrev(lambda at: target.batch_losses(at, rows_of, inputs), chunk_size=8)(theta)[:4]
    direct = np.array([np.sum(study.influence(study.solution("ggn", row, _ROUGH)), axis=0) for row in gradients])
    order = torch.cat(list(objective.batches.partition)).argsort()
    sources = (objective, ContrastiveLoss(study.scope, target.batches, 1))
    half = sizes.directions // 2
    drawn = gradient_basis(theta, [(source, half) for source in sources])
    curvature = BasisProjection(study.scope, drawn).objective_curvature(objective, theta, "ggn")

    def row(
        way: str, size: float, columns: Tensor, gradients_of: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    ) -> Row:
        basis = drawn[:, columns]
        start = time.perf_counter()
        parts = [gradients_of(batch, basis) for batch in objective.batches]
        seconds = time.perf_counter() - start
        positive, negative = (torch.cat([part[side] for part in parts])[order].numpy() for side in (0, 1))
        store = CachedGradients(positive, negative, mended(curvature[columns][:, columns].numpy()), len(positive))
        scores = np.sum(store.influence((gradients @ basis).numpy()), axis=0)
        return {"way": way, "size": size, "seconds": seconds, "pearson": mean_pearson(scores, direct)}

    found = []
    for rank in (16, half, 2 * half):
        columns = torch.cat([torch.arange(rank // 2), half + torch.arange(rank // 2)])
        sketch = partial(sketched_gradients, study.scope, theta)
        found.append(row("forward sketch, directions", rank, columns, sketch))
    whole, first = torch.arange(2 * half), objective.batches[0]
    exact, _ = truncated_gradients(study.scope, theta, first, kept=1.0)
    for kept in (1.0, 0.999, 0.99, 0.9, 0.5):
        reverse = partial(truncated_gradients, study.scope, theta, kept=kept)

        def only_gradients(batch: Any, basis: Tensor, of: Any = reverse) -> tuple[Tensor, Tensor]:
            return of(batch, basis=basis)[0]  # type: ignore[no-any-return]

        found.append(row("truncated reverse, share kept", kept, whole, only_gradients))
        short, spent = reverse(first)
        error = short[0] + short[1] - exact[0] - exact[1]
        found[-1] |= {
            "gradient_error": (error.norm() / (exact[0] + exact[1]).norm()).item(),
            "back_propagations": spent,
        }
    return found


def run(
    sizes: Sizes,
    report: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All measurements, on one thread: the matrices are small, and a second thread makes it slower.

    Args:
        sizes: how much to measure.
        report: told what is being measured.
        keep: given what is measured so far after each section, so that a run that is stopped leaves it.

    Returns:
        a table for each section, rows as dicts, and ``seconds`` of each
    """
    torch.set_num_threads(1)
    result: dict[str, Any] = {"seconds": {}}
    start = time.perf_counter()
    report("training the model")
    world = make_world(sizes.pairs, sizes.validation, sizes.steps)
    result["seconds"]["world"] = round(time.perf_counter() - start, 1)
    for name, section in SECTIONS.items():
        report(name)
        start = time.perf_counter()
        result[name] = section(world, sizes)
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        keep(result)
    return result


SECTIONS: dict[str, Callable[[World, Sizes], list[Row]]] = {
    "loo": loo,
    "lds": lds,
    "edit": edit,
    "curves": curves,
    "superposition": superposition,
    "sensitivity": sensitivity,
    "cached": cached,
}


def _full_logra(study: Study, gradient: Tensor, role: str) -> np.ndarray:
    """LoGra without the loss of a projection: the damped covariance of whole gradients."""
    scope = study.scope
    assert isinstance(scope, HeadScope)
    heads = [HeadProjection(*(torch.eye(size, dtype=torch.float64) for size in shape)) for shape in scope.shapes]
    projection = KroneckerProjection(scope, *heads)
    positive, negative = _stored(projection, study.objective, study.theta, role)
    cached = CachedGradients(positive, negative, gradient_covariance([positive + negative]), len(positive))
    scores: np.ndarray = np.sum(cached.influence(gradient.numpy()[None]), axis=0)[0]
    return scores


def _stored(
    projection: Any, objective: ContrastiveLoss, theta: Tensor, role: str = "exact"
) -> tuple[np.ndarray, np.ndarray]:
    parts = [projection.removal_gradients(theta, batch, role) for batch in objective.batches]
    order = torch.cat(list(objective.batches.partition)).argsort()
    positive, negative = (torch.cat([part[side] for part in parts])[order].numpy() for side in (0, 1))
    return positive, negative


def _target_groups(study: Study) -> list[np.ndarray]:
    """The target's pairs in parts, whole batches together: eight for heads, four where a solve takes long."""
    groups = 8 if study.name == "heads" else 4
    parts = np.array_split(np.arange(len(study.target.batches.partition)), groups)
    return [np.concatenate([study.target.batches.partition[batch].numpy() for batch in part]) for part in parts]


def _group_target_gradient(study: Study, group: np.ndarray) -> Tensor:
    wanted = set(group.tolist())
    batches = [rows for rows in study.target.batches.partition if set(rows.tolist()) <= wanted]
    return study.target.part(batches).gradient_and_value(study.theta)[0]


def _losses(study: Study, theta: Tensor) -> np.ndarray:
    losses: np.ndarray = study.target.losses(theta).numpy()
    return losses


def _orders(influence: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    order = np.argsort(influence)
    return {
        "random": np.random.default_rng(seed).permutation(len(influence)),
        "harmful": order,
        "valuable": order[::-1].copy(),
    }


def _couples(world: World, study: Study, count: int) -> dict[str, list[Tensor]]:
    """Couples of training pairs whose captions share most words, in one batch and in two; and random tenths."""
    batch_of = {row: number for number, rows in enumerate(study.objective.batches.partition) for row in rows.tolist()}
    words = [set(world.pairs[row].true_caption.split()) for row in range(study.objective.pairs)]
    ranked = sorted(
        ((len(words[a] & words[b]), a, b) for a in batch_of for b in batch_of if a < b), key=lambda found: -found[0]
    )
    together = [torch.tensor([a, b]) for _, a, b in ranked if batch_of[a] == batch_of[b]][:count]
    apart = [torch.tensor([a, b]) for _, a, b in ranked if batch_of[a] != batch_of[b]][:count]
    generator = torch.Generator().manual_seed(0)
    tenth = study.objective.pairs // 10
    groups = [torch.randperm(study.objective.pairs, generator=generator)[:tenth] for _ in range(3)]
    return {"near-duplicates in one batch": together, "near-duplicates in two batches": apart, "random tenths": groups}
