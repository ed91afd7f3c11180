"""From mispredicted target pairs back to the training pairs behind them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.func import grad

from .curvature import solve
from .errors import EcifError
from .problem import reopen
from .progress import Progress, follow
from .runs import InfluenceResults
from .scoring import direct_influence, solving

logger = logging.getLogger(__name__)


class Culprit(NamedTuple):
    """A training pair behind a mistake.

    Attributes:
        id: its sample.
        influence: on the loss of the query; negative, as removing it helps.
        relative_influence: what culprits are ranked by.
    """

    id: str
    influence: float
    relative_influence: float


class Neighbour(NamedTuple):
    """A training pair whose image resembles the query's.

    Attributes:
        id: its sample.
        similarity: cosine of both image embeddings.
    """

    id: str
    similarity: float


class Trace(NamedTuple):
    """What is behind one query.

    Attributes:
        id: the query's sample.
        loss: its loss.
        culprits: the training pairs that raise its loss, worst first.
        neighbours: the training pairs most like it, for comparison: where one
            would look without influence.
    """

    id: str
    loss: float
    culprits: list[Culprit]
    neighbours: list[Neighbour]


def trace(
    results: InfluenceResults,
    queries: Any = None,
    count: int = 10,
    *,
    exact: bool = False,
    device: str | None = None,
    progress: bool | Callable[..., None] | None = None,
) -> list[Trace]:
    """Finds the training pairs responsible for mispredicted pairs of a run's target.

    A mistake is a wrong zero-shot class where the run's target loss is
    ``"zero_shot"``, otherwise a failed retrieval among the pairs of its batch.
    Training pairs are ranked by relative influence on the loss of the query, so
    that pairs which move everything do not win every query.

    Args:
        results: of :func:`fiftyone_ecif.compute_influence`, with stored gradients.
        queries (None): a view or sample ids of target pairs; by default all
            mistakes.
        count (10): training pairs to return for each.
        exact (False): whether to solve for each query with the run's own
            curvature, which loads the model and takes seconds a query, instead
            of reading the stored, projected gradients.
        device (None): of the model, if ``exact``.
        progress (None): whether to show progress bars, or a callback.

    Returns:
        one :class:`Trace` a query, the worst loss first

    Raises:
        EcifError: if the run kept no gradients, or a query is not in its target
    """
    return follow(trace_steps(results, queries, count, exact=exact, device=device), progress)


def trace_steps(
    results: InfluenceResults, queries: Any = None, count: int = 10, *, exact: bool = False, device: str | None = None
) -> Generator[Progress, None, list[Trace]]:
    """:func:`trace` as a generator of its progress."""
    if count < 1:
        raise EcifError(f"count={count} must be at least 1")
    yield Progress("Reading pairs", 0, 1)
    if exact and results.config.solver == "logra":
        raise EcifError("solver='logra' has no curvature but that of the stored gradients. Leave exact out")
    cached, images = results.cached(), results.image_embeddings()
    wanted = None if queries is None else set(queries if isinstance(queries, list | tuple) else queries.values("id"))
    yield Progress("Reading pairs", 1, 1)

    traces, known = [], set[str]()
    for name in results.slices:
        aims = results.target_pairs(name)
        known |= set(aims.ids)
        chosen = [
            row for row, sample in enumerate(aims.ids) if (aims.mistakes[row] if wanted is None else sample in wanted)
        ]
        if not chosen:
            continue
        if exact:
            influence = yield from _exact_influence(results, name, chosen, device)
        else:
            influence = np.sum(cached.influence(aims.gradients[chosen]), axis=0)
        relative = influence / cached.lengths
        similarity = aims.images[chosen] @ images.T
        for place, row in enumerate(chosen):
            traces.append(
                Trace(
                    aims.ids[row],
                    float(aims.losses[row]),
                    [
                        Culprit(results.ids[n], float(influence[place, n]), float(relative[place, n]))
                        for n in _lowest(relative[place], count)
                        if relative[place, n] < 0
                    ],
                    [
                        Neighbour(results.ids[n], float(similarity[place, n]))
                        for n in _lowest(-similarity[place], count)
                    ],
                )
            )
    unknown = (wanted or set()) - known
    if unknown:
        raise EcifError(
            f"Sample {min(unknown)} is not in the target of run {results.key!r}. Trace pairs of its target, "
            "or run compute_influence with a target that holds it"
        )
    return sorted(traces, key=lambda found: -found.loss)


def _lowest(values: np.ndarray, count: int) -> Sequence[int]:
    count = min(count, len(values))
    lowest = np.argpartition(values, count - 1)[:count]
    return [int(n) for n in lowest[np.argsort(values[lowest])]]


def _exact_influence(
    results: InfluenceResults, name: str, rows: list[int], device: str | None
) -> Generator[Progress, None, np.ndarray]:
    """Influence of every pair on the loss of single target pairs, shape ``(len(rows), N)``."""
    config = results.config
    problem, objective, theta = yield from reopen(results, device)
    target = dict(zip(problem.aims, problem.targets.values(), strict=True))[name]
    product = {"ggn": objective.gauss_newton_product}.get(config.solver, objective.hessian_product)

    place = {
        row: (number, position)
        for number, batch_rows in enumerate(target.batches.partition)
        for position, row in enumerate(batch_rows.tolist())
    }

    def loss(at: Tensor, row: int) -> Tensor:
        number, position = place[row]
        return target.batch_losses(at, target.batches.partition[number], target.batches[number])[position]

    vectors = []
    for row in rows:
        vector = grad(loss)(theta, row)
        if config.solver != "identity":
            steps = solve(lambda v: product(theta, v), vector, config.damping, tolerance=1e-2)
            vector = (yield from solving(steps)).vector
        vectors.append(vector)
    positive, negative = yield from direct_influence(objective, theta, vectors, config.role)
    total: np.ndarray = positive + negative
    return total
