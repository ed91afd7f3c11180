"""Nearest neighbours by cosine similarity: exact, in blocks, in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.errors import EcifError

_ROWS, _COLUMNS = 1024, 16384  # of the similarity matrix that is in memory at a time


class Neighbours(NamedTuple):
    """The nearest rows of each row, the nearest first.

    Attributes:
        rows: their indices, shape ``(N, k)``.
        similarity: cosine, float32, shape ``(N, k)``.
    """

    rows: Tensor
    similarity: Tensor


def nearest(embeddings: Tensor, count: int, group: Tensor | None = None, device: str = "cpu") -> Neighbours:
    """The rows most alike to each row.

    The cost is ``N^2 d`` multiplications, the memory a block of the similarity
    matrix beside the rows and the result.

    Args:
        embeddings: shape ``(N, d)``; need not be normalised.
        count: neighbours to find; fewer if there are not as many.
        group (None): rows of one number are never neighbours of one another;
            by default each row is its own group. Shape ``(N,)``.
        device ("cpu"): where they are compared.

    Raises:
        EcifError: if a row has no possible neighbour
    """
    units = normalize(embeddings.to(device).float(), dim=1)
    group = torch.arange(len(units)) if group is None else group
    count = min(count, len(units) - int(torch.bincount(group).max()))
    if count < 1:
        raise EcifError(f"All {len(units)} pairs are copies of one another, so none has a neighbour to compare with")
    group = group.to(device)
    found = []
    for rows, own in zip(torch.split(units, _ROWS), torch.split(group, _ROWS), strict=True):
        best = rows.new_full((len(rows), count), -torch.inf)
        places = torch.zeros(len(rows), count, dtype=torch.long, device=device)
        for start in range(0, len(units), _COLUMNS):
            similarity = rows @ units[start : start + _COLUMNS].T
            similarity[own[:, None] == group[None, start : start + _COLUMNS]] = -torch.inf
            top = similarity.topk(min(count, similarity.shape[1]), dim=1)
            merged = torch.cat([best, top.values], dim=1).topk(count, dim=1)
            places = torch.cat([places, start + top.indices], dim=1).gather(1, merged.indices)
            best = merged.values
        found.append((places.cpu(), best.cpu()))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))
