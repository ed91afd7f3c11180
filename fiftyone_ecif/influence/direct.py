"""Influence of every pair on a target, by one forward-mode pass a batch.

    influence_n = f(theta without n) - f(theta) ~ (1/N) grad f . H^-1 grad (positive_n + negative_n)

With ``s = H^-1 grad f`` solved once, the right-hand side is the derivative of
the removal roles along ``s``: one ``torch.func.jvp`` of the similarity matrix
gives it for a whole batch, for any scope, without a gradient per pair.

Sign: positive means that removing the pair raises the target's loss, so the
pair is valuable; negative means harmful. Unit: nats of the target's mean pair
loss. Source: Section 4 of arXiv 2411.11667, with exact removal roles.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.progress import Progress


class DirectInfluence(NamedTuple):
    """What every pair does to some targets.

    Attributes:
        positive: the part of influence from the pair's own loss, shape ``(T, N)``; positive = valuable.
        negative: the part from serving as a negative of others, likewise.
        loss: the mean loss of the pairs, in nats.
    """

    positive: np.ndarray
    negative: np.ndarray
    loss: float


def batch_influence(
    scope: Scope, theta: Tensor, batch: Any, solution: Tensor, pairs: int, role: str = "exact"
) -> tuple[Tensor, Tensor]:
    """The positive and the negative part of the influence of each pair of a batch.

    Args:
        scope: what varies.
        theta: its parameters, shape ``(p,)``.
        batch: what :meth:`Scope.similarity` takes.
        solution: ``H^-1 grad f``, shape ``(p,)``.
        pairs: ``N``, the number of pairs in the whole objective.
        role ("exact"): see ``roles.ROLES``.

    Returns:
        ``(positive, negative)``, each of shape ``(n,)``; the influence is their sum
    """
    _, positive, negative = _moved_roles(scope, theta, batch, solution, role)
    return positive / pairs, negative / pairs


def _moved_roles(scope: Scope, theta: Tensor, batch: Any, solution: Tensor, role: str) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity matrix of a batch, ``(n, n)``, and how both roles of each pair move, ``(n,)`` each."""
    similarity, direction = scope.similarity_and_tangent(theta, batch, solution)
    return similarity, *scope.loss_of(batch).removal_tangents(similarity, direction, role)


def direct_influence(
    objective: ContrastiveLoss, theta: Tensor, vectors: list[Tensor], role: str
) -> Generator[Progress, None, DirectInfluence]:
    """Influence of every pair along some solutions, by one forward-mode pass a batch and solution.

    Args:
        objective: over the pairs, ``N`` of them.
        theta: the parameters, shape ``(p,)``.
        vectors: ``H^-1 grad f`` of each target, shape ``(p,)``.
        role: one of ``roles.ROLES``.
    """
    scores = torch.zeros(2, len(vectors), objective.pairs, dtype=torch.float64)
    loss = theta.new_zeros(())
    batches, stacks = objective.batches, objective.stacks()
    done, own = 0, sum(map(len, stacks))
    for stack, batch in zip(stacks, batches.each(stacks), strict=True):
        rows = batches.rows(stack)
        for number, vector in enumerate(vectors):
            similarity, *parts = _moved_roles(objective.scope, theta, batch, vector, role)
            scores[:, number, rows] = (torch.stack(parts) / objective.pairs).detach().cpu().double()
        loss = loss + objective.batch_loss(similarity.detach(), batch)
        done += len(stack)
        yield Progress("Scoring", done, own)
    positive, negative = objective.processes.total(scores).numpy()
    return DirectInfluence(positive, negative, objective.processes.total(loss).item())
