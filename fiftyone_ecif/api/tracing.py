"""From mispredicted target pairs back to the training pairs behind them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.gradient_store import MissingRowsError, target_mistakes
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.runs.influence import TRACE, InfluenceConfig, InfluenceResults, TargetPairs
from fiftyone_ecif.runs.writing import write_scores
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.store.tables import Store

_AT_ONCE = 128  # queries: each takes a few numbers for every pair


class Culprit(NamedTuple):
    """A training pair behind a mistake, or one that helps against it.

    Attributes:
        id: its sample.
        influence: on the loss of the query: negative of a culprit, as removing it helps.
        relative_influence: what they are ranked by.
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


class Retrieved(NamedTuple):
    """What a query retrieved instead of what is right.

    Attributes:
        kind: ``"caption"`` for the query's image, ``"image"`` for its caption, or
            ``"class"`` of its image.
        found: the sample that has the caption or image, or the name of the class.
        similarity: cosine of the query and what it retrieved.
        right: likewise of what is right, the most similar where several are.
        right_similarity: its cosine, which is lower.
    """

    kind: str
    found: str
    similarity: float
    right: str
    right_similarity: float


class Trace(NamedTuple):
    """What is behind one query.

    Attributes:
        id: the query's sample.
        loss: its loss.
        mistake: whether the model gets it wrong.
        culprits: the training pairs that raise its loss, worst first.
        helpers: those that lower it, best first.
        neighbours: the training pairs most like it, for comparison: where one
            would look without influence.
        retrieved: what a mistake retrieved instead, in each direction that fails;
            nothing by a run of before that was kept.
    """

    id: str
    loss: float
    mistake: bool
    culprits: list[Culprit]
    helpers: list[Culprit]
    neighbours: list[Neighbour]
    retrieved: list[Retrieved]


def trace(
    results: InfluenceResults,
    queries: Any = None,
    count: int = 10,
    *,
    limit: int | None = None,
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
        count (10): training pairs of each kind to return for each.
        limit (None): queries at most, those with the worst loss.
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
    return follow(trace_steps(results, queries, count, limit=limit, exact=exact, device=device), progress)


def trace_steps(
    results: InfluenceResults,
    queries: Any = None,
    count: int = 10,
    *,
    limit: int | None = None,
    exact: bool = False,
    device: str | None = None,
) -> Generator[Progress, None, list[Trace]]:
    """:func:`trace` as a generator of its progress."""
    for name, value in (("count", count), ("limit", limit)):
        if value is not None and value < 1:
            raise EcifError(f"{name}={value} must be at least 1")
    if exact and SOLVERS[results.config.solver].needs_gradients:
        raise EcifError(
            f"solver={results.config.solver!r} has no curvature but that of the stored gradients. Leave exact out"
        )
    yield Progress("Reading pairs", 0, 1)
    wanted = None if queries is None else set(queries if isinstance(queries, list | tuple) else queries.values("id"))
    targets = {name: results.target_pairs(name) for name in results.slices}
    unknown = (wanted or set()).difference(*(target_pairs.ids for target_pairs in targets.values()))
    if unknown:
        raise EcifError(
            f"Sample {min(unknown)} is not in the target of run {results.key!r}. Trace pairs of its target, "
            "or run compute_influence with a target that holds it"
        )
    chosen = [
        (name, row)
        for name, target_pairs in targets.items()
        for row, sample in enumerate(target_pairs.ids)
        if (target_pairs.mistakes[row] if wanted is None else sample in wanted)
    ]
    chosen = sorted(chosen, key=lambda place: -targets[place[0]].losses[place[1]])[:limit]
    store = results.gradient_store
    lengths = store.effects().length
    yield Progress("Reading pairs", 1, 1)

    traces = []
    for name, target_pairs in targets.items():
        rows = [row for slice_name, row in chosen if slice_name == name]
        for start in range(0, len(rows), _AT_ONCE):
            block = rows[start : start + _AT_ONCE]
            if exact:
                influence = yield from _exact_influence(results, name, block, device)
            else:
                influence = store.influence(target_pairs.gradients[block])
            similarity = store.similarity(target_pairs.images[block])
            for place, row in enumerate(block):
                relative = influence[place] / lengths
                harms, helps = (
                    [
                        Culprit(results.ids[n], float(influence[place, n]), float(relative[n]))
                        for n in _lowest(sign * relative, count)
                        if sign * relative[n] < 0
                    ]
                    for sign in (1, -1)
                )
                like = [
                    Neighbour(results.ids[n], float(similarity[place, n])) for n in _lowest(-similarity[place], count)
                ]
                traces.append(
                    Trace(
                        target_pairs.ids[row],
                        float(target_pairs.losses[row]),
                        bool(target_pairs.mistakes[row]),
                        harms,
                        helps,
                        like,
                        _retrieved(target_pairs, row, results.target_classes),
                    )
                )
    return sorted(traces, key=lambda found: -found.loss)


def count_mistakes(key: str, config: InfluenceConfig) -> int:
    """How many pairs of a run's target the model gets wrong.

    Raises:
        EcifError: if the run's store was deleted
    """
    tables = (config.target or {})["tables"].values()
    try:
        return int(target_mistakes(Store(*(config.store or ())), list(tables)).sum())
    except MissingRowsError as error:
        raise EcifError(f"The store of run {key!r} is gone. Run compute_influence again with overwrite=True") from error


def mark_traces(results: InfluenceResults, traces: Sequence[Trace]) -> Any:
    """Writes to ``{brain_key}_trace`` what each traced sample is.

    The queries are numbered: "mistake 1, loss 2.31", "harms mistake 1, 2",
    "helps mistake 1". What was written there before is cleared.

    Args:
        results: of the run, as it is in the database now.
        traces: of that run.

    Returns:
        a view of the queries, each followed by its culprits, worst first, and
        its helpers, best first; a pair behind several stands below the first

    Raises:
        EcifError: if there is such a field that the run did not write
    """
    queries: dict[str, list[Trace]] = {}
    for one in traces:
        queries.setdefault(one.id, []).append(one)  # a sample can be in several slices of a target
    order: list[str] = []
    says: dict[str, list[str]] = {}
    roles: dict[str, dict[tuple[str, str], list[str]]] = {}
    for number, (sample, found) in enumerate(queries.items(), start=1):
        noun = "mistake" if any(one.mistake for one in found) else "query"
        says[sample] = [f"{noun} {number}, loss {found[0].loss:.2f}" + ", no mistake" * (noun == "query")]
        harms = [pair.id for one in found for pair in one.culprits]
        helps = [pair.id for one in found for pair in one.helpers]
        order += [sample, *(pair for pair in harms + helps if pair not in queries)]
        for verb, pairs in (("harms", harms), ("helps", helps)):
            for pair in dict.fromkeys(pairs):
                roles.setdefault(pair, {}).setdefault((verb, noun), []).append(str(number))
    for pair, role in roles.items():
        said = [f"{verb} {noun} {', '.join(numbers)}" for (verb, noun), numbers in role.items()]
        says.setdefault(pair, []).extend(said)

    dataset, field = results.samples._dataset, f"{results.key}_trace"
    if dataset.has_sample_field(field) and dataset.get_field(field).description != TRACE.description:
        raise EcifError(f"There is a field {field!r} already, which no run wrote. Rename it, or the run")
    results.record(traced=True)
    write_scores(results, {field: {pair: "; ".join(said) for pair, said in says.items()}})
    return every_sample(dataset).select(list(dict.fromkeys(order)), ordered=True)


def _retrieved(target_pairs: TargetPairs, row: int, classes: Sequence[str]) -> list[Retrieved]:
    """What a pair of a target retrieved instead, in each direction that fails."""
    matches = target_pairs.matches
    if matches is None:
        return []
    names, kinds = (classes, ("class",)) if classes else (target_pairs.ids, ("caption", "image"))
    return [
        Retrieved(
            kind,
            names[matches.wrong[row, side]],
            float(matches.wrong_similarity[row, side]),
            names[matches.right[row, side]],
            float(matches.right_similarity[row, side]),
        )
        for side, kind in enumerate(kinds)
        if matches.wrong_similarity[row, side] > matches.right_similarity[row, side]
    ]


def _lowest(values: np.ndarray, count: int) -> Sequence[int]:
    count = min(count, len(values))
    lowest = np.argpartition(values, count - 1)[:count]
    return [int(n) for n in lowest[np.argsort(values[lowest])]]


def _exact_influence(
    results: InfluenceResults, name: str, rows: list[int], device: str | None
) -> Generator[Progress, None, np.ndarray]:
    """Influence of every pair on the loss of single target pairs, shape ``(len(rows), N)``."""
    from torch import Tensor  # the rest answers without torch, which takes seconds to import
    from torch.func import grad

    from fiftyone_ecif.api.preparation import reopen
    from fiftyone_ecif.influence.direct import direct_influence
    from fiftyone_ecif.influence.linear_solve import solve, solving

    config = results.config
    prepared, objective, theta = yield from reopen(results, device, whole_target=True)
    target = dict(zip(prepared.target_pairs, prepared.targets.values(), strict=True))[name]
    solver = SOLVERS[config.solver]
    product = solver.product(objective, theta) if solver.solves else None
    coarse = solver.coarse_product(objective, theta) if solver.solves else None

    place = {
        row: (number, position)
        for number, batch_rows in enumerate(target.batches.partition)
        for position, row in enumerate(batch_rows.tolist())
    }

    def loss(at: Tensor, partners: Tensor, batch: Any, position: int) -> Tensor:
        return target.batch_losses(at, partners, batch)[position]

    vectors = []
    for row in rows:
        number, position = place[row]
        vector = grad(loss)(theta, target.batches.partition[number], target.batches[number], position)
        if product is not None:
            vector = (yield from solving(solve(product, vector, config.damping, 1e-2, coarse))).vector
        vectors.append(vector)
    positive, negative, _ = yield from direct_influence(objective, theta, vectors, config.role)
    total: np.ndarray = positive + negative
    return total
