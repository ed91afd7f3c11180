"""Bringing a scope to a stationary point of its objective.

Influence functions presume one: the first-order change of the minimiser is only
defined where the gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.collapse import COLLAPSED, smallest_norm
from fiftyone_ecif.influence.curvature import Product, hessian_at
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.linear_solve import percent_of_the_way
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.progress import Progress

# relative gradient norm, by whether it is in float64 and of the heads: looser ones would change the order of pairs
_TOLERANCES = {(True, True): 1e-5, (True, False): 1e-5, (False, True): 1e-4, (False, False): 1e-3}
_Way = tuple[Tensor, Tensor, bool]  # a step, the Hessian times it, and whether it ends at the region's bound
_FORCING = 0.5  # how exact a step is: the residual over the gradient, at most
_ENOUGH = 0.3  # of the gradient norm that is wanted: no step needs to be more exact
_MAGNIFIED = 1e8  # torch's L-BFGS forgets steps whose curvature product is below 1e-10
_FIRST = 0.3  # the region at first, of the length of the weights
_POOR, _GOOD = 0.25, 0.75  # of what a step promised: the region shrinks below, grows above
_ACCEPTED = 1e-4  # of what a step promised
_PATIENCE = 25  # steps in which the value must fall, or the gradient
_LEAST_FALL = 1e-5  # of the value
_USABLE = 10 * COLLAPSED


def minimise(
    objective: ContrastiveLoss, tolerance: float = 1e-5, max_passes: int = 3000, start: Tensor | None = None
) -> Iterator[tuple[Tensor, float]]:
    """Minimises the objective by Newton steps within a trust region, inside the towers by L-BFGS first.

    There a product with the Hessian takes several gradients, so that L-BFGS is
    quicker wherever it gets on at all. Newton steps go on from where it does not.

    A step goes along conjugate gradients of the exact Hessian until it is exact
    enough, meets negative curvature, which it follows, or leaves the region in
    which the quadratic model has held so far (Steihaug, SIAM J. Numer. Anal. 20,
    1983). One that turns out too long is shortened (Nocedal and Yuan, 1998). So
    it also gets through regions where the Hessian is not positive, and where
    embeddings are short, which makes it ill-conditioned.

    Args:
        objective: what to minimise.
        tolerance (1e-5): the gradient norm to reach, relative to
            :meth:`ContrastiveLoss.gradient_scale` at the start.
        max_passes (3000): gradients and curvature products to spend at most.
        start (None): where to begin; by default at the scope's starting weights.

    Yields:
        the parameters, shape ``(p,)``, and the relative gradient norm, after
        each pass; the last one meets the tolerance

    Raises:
        EcifError: if it is not reached
    """
    theta = (objective.scope.start if start is None else start).clone()
    scale = objective.coarse().gradient_scale(objective.scope.start).item()
    passes = 0
    if not isinstance(objective.scope, HeadScope):
        for there, relative in _lbfgs(objective, theta, scale, max_passes):
            theta, passes = there, passes + 1
            yield theta, relative
            if relative <= tolerance:
                return
    yield from _newton(objective, theta, scale, tolerance, max_passes - passes)


def _lbfgs(objective: ContrastiveLoss, start: Tensor, scale: float, max_steps: int) -> Iterator[tuple[Tensor, float]]:
    """Steps of L-BFGS as long as they get on: the parameters and the relative gradient norm after each."""
    theta = start.clone()
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=1,  # a step at a time
        max_eval=25,
        history_size=20,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    last: list[Tensor] = []  # the last parameters evaluated, their gradient and value
    seen: list[tuple[float, float]] = []

    def evaluate() -> Tensor:
        if not last or not torch.equal(last[0], theta):
            last[:] = theta.clone(), *objective.gradient_and_value(theta)
        theta.grad = _MAGNIFIED * last[1]
        return _MAGNIFIED * last[2]

    while len(seen) < max_steps and not _stagnates(seen):
        before = theta.clone()
        optimiser.step(evaluate)  # type: ignore[no-untyped-call]
        evaluate()
        if torch.equal(theta, before) or not last[2].isfinite():  # the line search finds no better point
            return
        seen.append((last[2].item(), last[1].norm().item()))
        yield theta.clone(), seen[-1][1] / scale


def _newton(
    objective: ContrastiveLoss, theta: Tensor, scale: float, tolerance: float, max_passes: int
) -> Iterator[tuple[Tensor, float]]:
    """As :func:`minimise`, by Newton steps only."""
    coarse = objective.coarse()
    gradient, value = objective.gradient_and_value(theta)
    noise = 100 * torch.finfo(theta.dtype).eps
    radius, passes, seen = _FIRST * theta.norm().item(), 1, list[tuple[float, float]]()
    way: _Way | None = None  # the next step, if it follows from one that was too long
    while True:
        norm = gradient.norm().item()
        relative = norm / scale
        yield theta, relative
        if relative <= tolerance:
            return
        seen.append((value.item(), norm))
        if passes >= max_passes or _stagnates(seen):
            break
        if way is None:
            exactness = max(norm * min(_FORCING, math.sqrt(relative)), _ENOUGH * tolerance * scale)
            for way in _steihaug(hessian_at(coarse, theta), gradient, radius, exactness):  # noqa: B007  # the last one
                passes += 1
                yield theta, relative
                if passes >= max_passes:
                    break
        assert way is not None
        step, curved, bounded = way
        promised = -(gradient.dot(step) + step.dot(curved) / 2).item()
        new_gradient, new_value = objective.gradient_and_value(theta + step)
        passes += 1
        fallen = (value - new_value).item()
        if promised > noise * abs(value.item()):
            ratio = fallen / promised if math.isfinite(fallen) else -1.0
        else:  # the values cannot tell any more; the gradients can
            ratio = 1.0 if new_gradient.norm() < norm else 0.0
        if ratio < _POOR:
            radius = step.norm().item() / 4
        elif ratio > _GOOD and bounded:
            radius = 2 * step.norm().item()
        if ratio > _ACCEPTED:
            theta, gradient, value, way = theta + step, new_gradient, new_value, None
        else:  # less of the same way: that takes one more gradient, not another solve
            way = step / 4, curved / 4, True
    raise _no_minimum(relative)


def _no_minimum(relative: float) -> EcifError:
    return EcifError(
        "fit did not reach a stationary point of the pairs' loss, or can find no better one: the relative gradient "
        f"norm is {relative:.1e}, and some embedding may shrink to nothing. Raise proximal"
    )


def _stagnates(seen: Sequence[tuple[float, float]]) -> bool:
    """Whether neither the value nor the gradient norm, which are given after each step, fell noticeably of late."""
    if len(seen) <= _PATIENCE:
        return False
    (value, norm), (now, _) = seen[-1 - _PATIENCE], seen[-1]
    return value - now < _LEAST_FALL * abs(value) and min(each for _, each in seen[-_PATIENCE:]) > norm / 2


def _steihaug(product: Product, gradient: Tensor, radius: float, exactness: float) -> Iterator[_Way]:
    """A minimiser of the quadratic model within a region, better from one product to the next.

    Yields:
        the step so far, the Hessian times it, both of shape ``(p,)``, and whether it ends at the region's bound
    """
    step, curved = torch.zeros_like(gradient), torch.zeros_like(gradient)
    residual, direction = gradient, -gradient
    squared = residual.dot(residual).item()
    while True:
        moved = product(direction)
        curvature = direction.dot(moved).item()
        size = math.inf if curvature <= 0 else squared / curvature
        reach = _to_bound(step, direction, radius)
        if size >= reach or curvature <= 0:
            if not math.isfinite(reach):  # no region yet: as far as a curvature of the same size would go
                reach = squared / max(abs(curvature), torch.finfo(gradient.dtype).tiny)
            yield step + reach * direction, curved + reach * moved, True
            return
        step, curved = step + size * direction, curved + size * moved
        yield step, curved, False
        residual = residual + size * moved
        before, squared = squared, residual.dot(residual).item()
        if math.sqrt(squared) <= exactness:
            return
        direction = -residual + squared / before * direction


def _to_bound(step: Tensor, direction: Tensor, radius: float) -> float:
    """How many times a direction fits between a step and the bound of the region."""
    if math.isinf(radius):
        return math.inf
    a, b, c = direction.dot(direction).item(), step.dot(direction).item(), step.dot(step).item() - radius**2
    return (-b + math.sqrt(max(b * b - a * c, 0.0))) / a


def stationary_point(
    store: GradientStore, objective: ContrastiveLoss, fit: bool, must_converge: bool = True
) -> Generator[Progress, None, tuple[Tensor, float]]:
    """The parameters to score at and their relative gradient norm, from the store where they are.

    Args:
        store: of this partition of the pairs.
        objective: over them.
        fit: whether to minimise it.
        must_converge (True): whether a fit that reaches no minimum is an error;
            otherwise the best parameters are taken at which no embedding has
            come near to nothing.

    Raises:
        EcifError: if a fit does not converge that must
    """
    start = objective.scope.start
    tolerance = _TOLERANCES[start.dtype == torch.float64, isinstance(objective.scope, HeadScope)]
    known = store.parameters()
    objective.processes.wait()  # before one writes what another looks for
    if known is not None:
        if fit and must_converge and known[1] > tolerance:
            raise _no_minimum(known[1])
        return torch.from_numpy(known[0]).to(start), known[1]
    theta = start
    if fit:
        best = theta, math.inf
        try:
            for there, relative in minimise(objective, tolerance):
                if not must_converge and there is not theta and smallest_norm(objective, there) >= _USABLE:
                    best = there, relative
                theta = there
                yield Progress("Fitting", percent_of_the_way(relative, tolerance), 100)
        except EcifError:
            if must_converge:
                raise
            theta, relative = best
    else:
        coarse = objective.coarse()
        relative = (coarse.gradient_and_value(theta)[0].norm() / coarse.gradient_scale(theta)).item()
    if objective.processes.first:
        store.write_parameters(theta.cpu().numpy(), relative)
    return theta, relative
