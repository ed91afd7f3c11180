"""Bringing a scope to a stationary point of its objective.

Influence functions presume one: the first-order change of the minimiser is only
defined where the gradient is zero.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.linear_solve import percent_of_the_way
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.progress import Progress

# relative gradient norm, by whether it is in float64 and of the heads: looser ones would change the order of pairs
_TOLERANCES = {(True, True): 1e-5, (True, False): 1e-5, (False, True): 1e-4, (False, False): 1e-3}
_MAGNIFY = 1e8  # torch's L-BFGS forgets steps whose curvature product is below 1e-10


def minimise(
    objective: ContrastiveLoss, tolerance: float = 1e-5, max_iterations: int = 1000, start: Tensor | None = None
) -> Iterator[tuple[Tensor, float]]:
    """Minimises the objective by L-BFGS.

    Args:
        objective: what to minimise.
        tolerance (1e-5): the gradient norm to reach, relative to
            :meth:`ContrastiveLoss.gradient_scale` at the start.
        max_iterations (1000): L-BFGS steps to spend at most.
        start (None): where to begin; by default at the scope's starting weights.

    Yields:
        the parameters, shape ``(p,)``, and the relative gradient norm after
        each step; the last one meets the tolerance

    Raises:
        EcifError: if it is not reached
    """
    theta = (objective.scope.start if start is None else start).clone()
    scale = objective.gradient_scale(objective.scope.start)
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=1,  # a step at a time, so that the caller can show progress or stop
        max_eval=25,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    seen: list[Tensor] = []  # the last parameters evaluated, their gradient and value

    def evaluate() -> Tensor:
        if not seen or not torch.equal(seen[0], theta):
            seen[:] = theta.clone(), *objective.gradient_and_value(theta)
        theta.grad = _MAGNIFY * seen[1]
        return _MAGNIFY * seen[2]

    before = theta.clone()
    for _ in range(max_iterations):
        optimiser.step(evaluate)  # type: ignore[no-untyped-call]
        evaluate()
        relative = (seen[1].norm() / scale).item()
        yield theta.clone(), relative
        if relative <= tolerance:
            return
        if torch.equal(theta, before):  # the line search finds no better point
            break
        before = theta.clone()
    raise EcifError(
        f"fit did not reach a stationary point in {max_iterations} steps or can find no better one: the relative "
        f"gradient norm is {relative:.1e}, wanted {tolerance:.0e}. Raise proximal"
    )


def stationary_point(
    store: GradientStore, objective: ContrastiveLoss, fit: bool
) -> Generator[Progress, None, tuple[Tensor, float]]:
    """The parameters to score at and their relative gradient norm, from the store where they are."""
    start = objective.scope.start
    known = store.parameters()
    objective.processes.wait()  # before one writes what another looks for
    if known is not None:
        return torch.from_numpy(known[0]).to(start), known[1]
    theta = start
    if fit:
        tolerance = _TOLERANCES[start.dtype == torch.float64, isinstance(objective.scope, HeadScope)]
        for fitted, relative in minimise(objective, tolerance):
            theta = fitted
            yield Progress("Fitting", percent_of_the_way(relative, tolerance), 100)
    else:
        relative = (objective.gradient_and_value(theta)[0].norm() / objective.gradient_scale(theta)).item()
    if objective.processes.first:
        store.write_parameters(theta.cpu().numpy(), relative)
    return theta, relative
