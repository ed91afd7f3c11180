"""A model as if some pairs had never been trained on, by one Newton step.

With ``L`` the objective of a run and ``L_`` the same without some pairs, whose
batches are left smaller, the step is ``theta + H_^-1 (grad L - grad L_)`` with
``H_`` the curvature of ``L_``. The gradient of the group is the true one, not a
sum over its pairs. At a stationary point of ``L`` this is the Newton step on
``L_``. Source: Section 5 of arXiv 2411.11667, which sums single pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fiftyone_ecif.api.preparation import PreparedRun, reopen
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.direct import direct_influence
from fiftyone_ecif.influence.linear_solve import solve, solving
from fiftyone_ecif.influence.newton_step import removal_step
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.influence.solvers import SOLVERS, default_solver
from fiftyone_ecif.models.checkpoint import new_checkpoint
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.runs.influence import InfluenceResults
from fiftyone_ecif.runs.reading import read_results


class GroupInfluence(NamedTuple):
    """What a group of pairs does to a target together.

    Attributes:
        influence: predicted change of the target's loss if none of the group had
            been trained on, by the Newton step of :func:`edit_model`;
            positive = valuable.
        sum_of_pairs: the sum of the pairs' own influences in the same partition,
            which overlooks that pairs in one batch compete with each other, and
            that the curvature changes with the group.
    """

    influence: float
    sum_of_pairs: float


class Edit(NamedTuple):
    """What an edit did.

    Attributes:
        checkpoint: where the edited model is.
        removed: how many pairs were taken out.
        target_loss_before: mean loss of the target under the run's model.
        target_loss_predicted: after the edit, to first order.
        target_loss_after: after the edit, measured.
        mistakes_before: share of target pairs that the run's model gets wrong.
        mistakes_after: share that the edited one gets wrong.
        relative_change: length of the parameter change over that of the parameters.
        solve_iterations: curvature products used.
        solve_residual: of the solve.
        seconds: from the group's gradient to the new parameters.
    """

    checkpoint: str
    removed: int
    target_loss_before: float
    target_loss_predicted: float
    target_loss_after: float
    mistakes_before: float
    mistakes_after: float
    relative_change: float
    solve_iterations: int
    solve_residual: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"Removed {self.removed:,} pairs in {self.seconds:.1f} s, which changed the parameters by "
            f"{self.relative_change:.1%}. Target loss {self.target_loss_before:.4f} before, "
            f"{self.target_loss_predicted:.4f} predicted, {self.target_loss_after:.4f} measured after. "
            f"Mistakes {self.mistakes_before:.1%} before, {self.mistakes_after:.1%} after. "
            f"Written to {self.checkpoint}"
        )


def group_influence(
    results: InfluenceResults,
    group: Any,
    *,
    device: str | None = None,
    progress: bool | Callable[..., None] | None = None,
) -> GroupInfluence:
    """Influence of a group of training pairs on the target of a run, together and summed up.

    Args:
        results: of :func:`fiftyone_ecif.compute_influence`.
        group: a view or sample ids of scored pairs.
        device (None): where the model runs.
        progress (None): whether to show progress bars, or a callback.

    Raises:
        EcifError: if a pair was not scored, or the run's pairs changed since
    """

    def work() -> Generator[Progress, None, GroupInfluence]:
        rows = _rows(results, group)
        prepared, objective, theta = yield from reopen(results, device)
        gradient, _ = _target_gradient(prepared, theta)
        solver = SOLVERS[_solver(results)]
        product, coarse = solver.product(objective, theta), solver.coarse_product(objective, theta)
        solution = yield from solving(solve(product, gradient, results.config.damping, coarse=coarse))
        steps = removal_step(objective, theta, rows, _step_solver(results), results.config.damping)
        step = yield from solving(steps)
        parts = yield from direct_influence(objective, theta, [solution.vector], results.config.role)
        summed = (parts.positive + parts.negative)[0, rows.numpy()].sum()
        return GroupInfluence(gradient.dot(step.vector).item(), float(summed))

    return follow(work(), progress)


def edit_model(
    results: InfluenceResults,
    removed: Any,
    path: str,
    *,
    overwrite: bool = False,
    device: str | None = None,
    progress: bool | Callable[..., None] | None = None,
) -> Edit:
    """Writes the model of a run as if some of its pairs had never been trained on.

    Only the parameters in the run's scope change. If the run was fitted, what is
    written is the fitted model, edited, by a step with the Hessian; that of
    another run is with the run's own curvature. What the edit did is kept in the run's
    ``diagnostics["edit"]``.

    Args:
        results: of :func:`fiftyone_ecif.compute_influence`, best with ``fit=True``.
        removed: a view or sample ids of scored pairs.
        path: of the checkpoint, for ``open_clip.create_model(pretrained=path)``.
        overwrite (False): whether to replace a file.
        device (None): where the model runs.
        progress (None): whether to show progress bars, or a callback.

    Returns:
        what the edit did, target losses before, predicted and after included

    Raises:
        EcifError: if a pair was not scored, all would be removed, the run's
            pairs changed since, or the file exists, is the checkpoint that the
            run was made from, or cannot be written
    """
    return follow(edit_steps(results, removed, path, overwrite=overwrite, device=device), progress)


def edit_steps(
    results: InfluenceResults, removed: Any, path: str, *, overwrite: bool = False, device: str | None = None
) -> Generator[Progress, None, Edit]:
    """:func:`edit_model` as a generator of its progress."""
    out = new_checkpoint(path, overwrite, results.config.pretrained)
    rows = _rows(results, removed)
    prepared, objective, theta = yield from reopen(results, device)
    prepared.encoder.check_saves(prepared.choice)
    gradient, before = _target_gradient(prepared, theta)

    start = time.perf_counter()
    steps = removal_step(objective, theta, rows, _step_solver(results), results.config.damping)
    solution = yield from solving(steps)
    edited = theta + solution.vector
    seconds = time.perf_counter() - start

    targets = prepared.targets.values()
    after = sum(target.loss(edited).item() for target in targets) / len(targets)
    wrong = [torch.cat([target.mistakes(at) for target in targets]).double().mean().item() for at in (theta, edited)]
    prepared.encoder.save(out, prepared.scope, edited)
    edit = Edit(
        str(out),
        len(rows),
        before,
        before + gradient.dot(solution.vector).item(),
        after,
        wrong[0],
        wrong[1],
        (solution.vector.norm() / theta.norm()).item(),
        solution.iterations,
        solution.residual,
        seconds,
    )
    run = read_results(results.samples._dataset, results.key)  # which may be newer than these results
    run.diagnostics["edit"] = edit._asdict()
    run.save()
    return edit


def _solver(results: InfluenceResults) -> str:
    """Of the run, or what a run of its scope would use if that has no curvature to solve with."""
    solver: str = results.config.solver
    return solver if SOLVERS[solver].solves else default_solver(parse_scope(results.config.scope))


def _step_solver(results: InfluenceResults) -> str:
    """The Hessian for a fitted run: at a minimum it is positive, and the step comes nearer to what retraining does."""
    return "hessian" if results.config.fit else _solver(results)


def _rows(results: InfluenceResults, group: Any) -> Tensor:
    """The rows of a group among the scored pairs."""
    ids = list(dict.fromkeys(group if isinstance(group, list | tuple) else group.values("id")))
    places = {sample: row for row, sample in enumerate(results.ids)}
    unknown = [sample for sample in ids if sample not in places]
    if unknown:
        raise EcifError(f"Sample {unknown[0]} was not scored by run {results.key!r}. Leave it out, or score it")
    if not ids:
        raise EcifError("No pairs were given to remove")
    if len(ids) > len(places) - 2:
        raise EcifError(f"Removing {len(ids)} of {len(places)} pairs leaves no pairs to learn from")
    return torch.tensor([places[sample] for sample in ids])


def _target_gradient(prepared: PreparedRun, theta: Tensor) -> tuple[Tensor, float]:
    """Of the mean over the target's slices."""
    found = [target.gradient_and_value(theta) for target in prepared.targets.values()]
    return torch.stack([gradient for gradient, _ in found]).mean(0), sum(loss.item() for _, loss in found) / len(found)
