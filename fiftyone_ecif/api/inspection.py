"""One pair in depth: what resembles it, whom it harms and whom it helps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.runs.influence import InfluenceResults
from fiftyone_ecif.store.tables import Store


class Link(NamedTuple):
    """Another pair, and how it relates to the one that is looked at.

    Attributes:
        id: its sample.
        value: cosine similarity in [-1, 1], or influence on its loss in nats
            (positive = helps it, negative = harms it).
    """

    id: str
    value: float


class Inspection(NamedTuple):
    """What is known of one pair.

    Attributes:
        harms: target pairs whose loss it raises, the most first; empty where the run has no target.
        helps: target pairs whose loss it lowers, likewise.
        neighbours: scored pairs with the most similar image.
    """

    harms: list[Link]
    helps: list[Link]
    neighbours: list[Link]


def inspect_pair(results: Any, sample: str, count: int = 5) -> Inspection:
    """Looks at one pair of a run, from the store and without the model.

    Args:
        results: of :func:`fiftyone_ecif.compute_influence` or
            :func:`fiftyone_ecif.compute_misalignment`.
        sample: id of a sample.
        count (5): how many others to name, of each sort.

    Returns:
        what there is: all lists are empty if the store of the run is gone or the sample is not among its pairs
    """
    if sample not in results.ids:
        return Inspection([], [], [])
    row = results.ids.index(sample)
    influence_run = isinstance(results, InfluenceResults)
    store = results.gradient_store if influence_run else GradientStore(Store(*results.config.store), len(results.ids))
    pair = store.pair(row, "image", "positive", "negative")
    if pair is None:
        near = [] if influence_run else [Link(results.ids[other], value) for other, value in results.alike(row)[:count]]
        return Inspection([], [], near)
    image, positive, negative = pair
    similarity = store.similarity(image[None])[0]
    similarity[row] = -np.inf
    neighbours = _links(results.ids, similarity, count)
    if not influence_run:
        return Inspection([], [], neighbours)
    target_pairs = [results.target_pairs(name) for name in results.slices]
    gradients = np.concatenate([slice_.gradients for slice_ in target_pairs])
    influence = store.influence_of(positive + negative, gradients)
    names = [name for slice_ in target_pairs for name in slice_.ids]
    helps = [link for link in _links(names, influence, count) if link.value > 0]
    harms = [Link(link.id, -link.value) for link in _links(names, -influence, count) if link.value > 0]
    return Inspection(harms, helps, neighbours)


def _links(ids: list[str], values: np.ndarray, count: int) -> list[Link]:
    order = np.argsort(-values, kind="stable")[:count]
    return [Link(ids[place], float(values[place])) for place in order if np.isfinite(values[place])]
