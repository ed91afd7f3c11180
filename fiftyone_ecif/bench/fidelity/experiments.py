"""Predicted effects of removing pairs against real retraining.

Everything is retrained for real: L-BFGS on the objective without the removed
pairs, to a relative gradient norm that leaves many digits of the smallest
effect. A goal of these measurements is to say where predictions stop matching.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.bench.fidelity.agreement import agreement, bootstrap, cosine, mean_spearman
from fiftyone_ecif.bench.fidelity.peers import PEERS, Problem
from fiftyone_ecif.bench.fidelity.sensitivity import sensitivity
from fiftyone_ecif.bench.fidelity.sizes import ROUGH, Row, Sizes
from fiftyone_ecif.bench.fidelity.stored import cached
from fiftyone_ecif.bench.fidelity.study import (
    Study,
    drive,
    leave_one_out,
    make_study,
    minimum,
    projected_scores,
    study_for,
)
from fiftyone_ecif.bench.fidelity.world import World, make_world
from fiftyone_ecif.influence.cached_gradients import CachedGradients
from fiftyone_ecif.influence.head_gradients import HeadProjection
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.newton_step import group_gradient, removal_step
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.projections import KroneckerProjection
from fiftyone_ecif.influence.roles import ROLES
from fiftyone_ecif.influence.solvers import SOLVERS, Solver


def loo(world: World, sizes: Sizes) -> list[Row]:
    """Leave-one-out: every role with every solver against retraining."""
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for seed in range(sizes.seeds):
        study = make_study(world, "heads", sizes.pairs, seed)
        rows, true = leave_one_out(study, sizes.removals, seed)
        gradient, _ = study.target.gradient_and_value(study.theta)
        for solver in SOLVERS:
            for role in ROLES:
                if SOLVERS[solver].needs_gradients:
                    scores = _from_gradients(study, SOLVERS[solver], gradient, role)
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
                    np.sum(study.influence(study.solution(solver, gradient, ROUGH)), axis=0)
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


def _from_gradients(study: Study, solver: Solver, gradient: Tensor, role: str) -> np.ndarray:
    """What a solver makes of stored gradients, such as LoGra, without the loss of a projection."""
    scope = study.scope
    assert isinstance(scope, HeadScope)
    heads = [HeadProjection(*(torch.eye(size, dtype=torch.float64) for size in shape)) for shape in scope.shapes]
    projection = KroneckerProjection(scope, *heads)
    positive, negative = projected_scores(projection, study.objective, study.theta, role)
    cached = CachedGradients(positive, negative, solver.stored_curvature([positive + negative]), len(positive))
    scores: np.ndarray = np.sum(cached.influence(gradient.numpy()[None]), axis=0)[0]
    return scores


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
