"""Nearest neighbours by cosine similarity: exact in blocks, or by an index where that would take hours."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError

#: Rows beyond which a CPU looks neighbours up in an index, see :func:`nearest`.
EXACT_ON_CPU = 100_000
_RECALL = (
    0.994  # share of true neighbours that an index finds of the rows it is tried on, to find 99 % of those of others
)
_BLOCK = {"cpu": (1024, 16384), "gpu": (4096, 65536)}  # of the similarity matrix that is in memory at a time
_CHUNK = 64  # columns of which only the best is looked at first
_TRIED = 256  # rows on which an index is held against the truth
_NARROW = 128  # numbers of a row up to which each has a code of its own
_MOST_COMPARED = 1024  # rows whose codes are alike that are compared with a row exactly, at most
_SPARE = 16  # of them beyond what it takes, as some may be copies
_LOOKED_UP, _RANKED = 4096, 16  # rows at a time, in codes and exactly


class Neighbours(NamedTuple):
    """The nearest rows of each row, the nearest first.

    Attributes:
        rows: their indices, shape ``(N, k)``.
        similarity: cosine, float32, shape ``(N, k)``.
    """

    rows: Tensor
    similarity: Tensor


def nearest(
    embeddings: Tensor,
    count: int,
    group: Tensor | None = None,
    device: str = "cpu",
    processes: ProcessGroup = ALONE,
    alike: float | None = None,
) -> Neighbours:
    """The rows most alike to each row.

    Exact up to 100,000 rows and on a GPU: ``N^2 d`` multiplications, a block
    of the similarity matrix in memory. Beyond that, a CPU looks in an index
    (faiss), as far as it takes to find 99 % of the neighbours, as tried on 256
    rows, with exact similarities; where an index does not find them, as in noise without
    any neighbours to speak of, it is exact again.

    Args:
        embeddings: shape ``(N, d)``; need not be normalised.
        count: neighbours to find; fewer if there are not as many.
        group (None): rows of one number are never neighbours of one another;
            by default each row is its own group. Shape ``(N,)``.
        device ("cpu"): where they are compared.
        processes (ALONE): the processes that share the rows; all must call this.
        alike (None): a cosine: what is less alike need not be found, and an index may give any row for it, at a
            similarity of ``-inf``. By default all neighbours are to be found.

    Returns:
        on the CPU

    Raises:
        EcifError: if a row has no possible neighbour
    """
    group = torch.arange(len(embeddings)) if group is None else group.cpu()
    count = min(count, len(group) - int(torch.bincount(group).max()))
    if count < 1:
        raise EcifError(f"All {len(group)} pairs are copies of one another, so none has a neighbour to compare with")
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and len(group) > EXACT_ON_CPU:
        found = _by_index(normalize(embeddings.cpu().float(), dim=1), count, group, alike, processes)
        if found is not None:
            return found
    block = _BLOCK["cpu" if on_cpu else "gpu"]
    # copies next to one another: then they are in the way in a few blocks only
    order = group.argsort(stable=True)
    units = normalize(embeddings.to(device)[order.to(device)].float(), dim=1)
    found = _nearest(units, count, group[order].to(device), block, processes)
    places = order.argsort()
    return Neighbours(order[found.rows[places]], found.similarity[places])


def _nearest(units: Tensor, count: int, group: Tensor, block: tuple[int, int], processes: ProcessGroup) -> Neighbours:
    """The nearest of all rows to each of them, whose groups are sorted; on the CPU."""
    on_gpu = units.device.type == "cuda"
    kept = min(2 * count, len(units)) if on_gpu else count
    found = []
    for number in processes.share(range(0, len(units), block[0])):
        rows, own = units[number : number + block[0]], group[number : number + block[0]]
        first, last = int(torch.searchsorted(group, own[0])), int(torch.searchsorted(group, own[-1], right=True))
        best = units.new_full((len(rows), kept), -torch.inf)
        places = torch.zeros(len(rows), kept, dtype=torch.long, device=units.device)
        for start in range(0, len(units), block[1]):
            with _tensor_cores(on_gpu):
                similarity = rows @ units[start : start + block[1]].T
            low, high = max(first - start, 0), min(last - start, similarity.shape[1])
            if low < high:
                copies = own[:, None] == group[None, start + low : start + high]
                similarity[:, low:high].masked_fill_(copies, -torch.inf)
            top = _top(similarity, min(kept, similarity.shape[1]))
            merged = torch.cat([best, top.values], dim=1).topk(kept, dim=1)
            places = torch.cat([places, start + top.indices], dim=1).gather(1, merged.indices)
            best = merged.values
        if on_gpu:  # twice as many as are wanted, once more in full precision
            exact = torch.einsum("nd,nkd->nk", rows, units[places]).masked_fill(best == -torch.inf, -torch.inf)
            best, chosen = exact.topk(count, dim=1)
            places = places.gather(1, chosen)
        found.append((number, Neighbours(places.cpu(), best.cpu())))
    return _joined(processes.gather(found))


def _joined(parts: list[tuple[int, Neighbours]]) -> Neighbours:
    """Of all rows, from those of some, each with the first row that it is of."""
    ordered = [part for _, part in sorted(parts, key=lambda each: each[0])]
    return Neighbours(*(torch.cat(side) for side in zip(*ordered, strict=True)))


@contextlib.contextmanager
def _tensor_cores(wanted: bool) -> Iterator[None]:
    """Products of float32 matrices from TF32, eight times as fast, off by 2e-5 for unit vectors of 512 numbers."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _Top(NamedTuple):
    values: Tensor
    indices: Tensor


def _top(similarity: Tensor, count: int) -> _Top:
    """As ``topk`` along rows. The largest values are in the chunks with the largest maxima, so few are sorted."""
    whole = similarity.shape[1] // _CHUNK
    if whole <= 2 * count:
        return _Top(*similarity.topk(count, dim=1))
    rest = similarity[:, whole * _CHUNK :]
    chunks = similarity[:, : whole * _CHUNK].reshape(len(similarity), whole, _CHUNK)
    chosen = chunks.amax(2).topk(count, dim=1).indices
    values = chunks.gather(1, chosen[..., None].expand(-1, -1, _CHUNK)).flatten(1)
    columns = (chosen[..., None] * _CHUNK + torch.arange(_CHUNK, device=chosen.device)).flatten(1)
    if rest.shape[1]:
        values = torch.cat([values, rest], dim=1)
        behind = torch.arange(whole * _CHUNK, similarity.shape[1], device=chosen.device)
        columns = torch.cat([columns, behind.expand(len(columns), -1)], dim=1)
    best = values.topk(count, dim=1)
    return _Top(best.values, columns.gather(1, best.indices))


class _Index:
    """An inverted file (faiss) of unit rows on the CPU, in codes of two bits a number.

    How many of its lists are looked through, and how many rows are compared
    exactly because their codes are alike, is what it takes to find the
    neighbours of some rows, which are searched for exactly, or some rows by
    what is just as much alike to them as is asked for.

    Args:
        units: shape ``(N, d)``.
        count: neighbours that are wanted.
        group: see :func:`nearest`.
        alike: likewise.

    Attributes:
        finds: whether it found enough of those neighbours.
    """

    def __init__(self, units: Tensor, count: int, group: Tensor, alike: float | None) -> None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        self._units, self._count, self._group, self._alike = units, count, group, alike
        random = torch.Generator().manual_seed(0)
        each = 1 if units.shape[1] <= _NARROW else 2  # numbers a code, of four bits
        codes = -(-units.shape[1] // each)
        # what numbers say is spread over all of them
        self._turn = torch.nn.init.orthogonal_(torch.empty(units.shape[1], each * codes), generator=random)
        lists = int(4 * len(units) ** 0.5)
        self._lists = faiss.IndexFlatIP(each * codes)
        self._index = faiss.IndexIVFPQFastScan(self._lists, each * codes, lists, codes, 4, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.niter = 10
        sample = torch.randperm(len(units), generator=random)[: 64 * lists]
        self._index.train(self._turned(units[sample]))
        for part in torch.split(units, 2**16):
            self._index.add(self._turned(part))
        tried = sample[:_TRIED]
        if alike is None:
            self._tune(units[tried], _exact(units, tried, count, group).rows)
        else:
            away = normalize(torch.randn(len(tried), units.shape[1], generator=random), dim=1)
            self._tune(alike * units[tried] + (1 - alike**2) ** 0.5 * away, tried[:, None])

    def look_up(self, rows: Tensor) -> Neighbours:
        """The neighbours of some rows; of similarity ``-inf`` where there are no more that need to be found."""
        candidates = self._candidates(self._units[rows], self._compared)
        found = []
        for own, places in zip(torch.split(rows, _RANKED), torch.split(candidates, _RANKED), strict=True):
            units = self._units
            fits = (places >= 0) & (self._group[places.clamp_min(0)] != self._group[own][:, None])
            similarity = torch.einsum("nd,nkd->nk", units[own], units[places.clamp_min(0)])
            best = similarity.masked_fill(~fits, -torch.inf).topk(self._count, dim=1)
            part = Neighbours(places.gather(1, best.indices), best.values)
            lacking = part.similarity[:, -1] == -torch.inf
            if lacking.any() and self._alike is None:  # copies fill what was found
                part.rows[lacking], part.similarity[lacking] = _exact(units, own[lacking], self._count, self._group)
            found.append(part)
        return Neighbours(torch.cat([each.rows for each in found]), torch.cat([each.similarity for each in found]))

    def _tune(self, asked: Tensor, truth: Tensor) -> None:
        near = torch.from_numpy(self._lists.search(self._turned(asked), self._lists.ntotal)[1])
        own = torch.from_numpy(self._lists.search(self._turned(self._units[truth.flatten()]), 1)[1]).view(truth.shape)
        self._index.nprobe = min(_enough(_places(own, near), (1 + _RECALL) / 2), self._lists.ntotal)
        most = min(_MOST_COMPARED, len(self._units))
        enough = _enough(_places(truth, self._candidates(asked, most)), _RECALL)
        self.finds = enough <= most
        self._compared = min(max(enough, self._count) + _SPARE, len(self._units))

    def _candidates(self, asked: Tensor, count: int) -> Tensor:
        """Rows with the codes that are most alike to some vectors, shape ``(n, count)``, -1 where there are no more."""
        return torch.from_numpy(self._index.search(self._turned(asked), count)[1])

    def _turned(self, vectors: Tensor) -> np.ndarray:
        return (vectors @ self._turn).numpy()


def _places(wanted: Tensor, found: Tensor) -> Tensor:
    """Where in its row of ``found``, ``(n, m)``, each of ``wanted`` is, ``(n, k)``; ``m`` where it is not."""
    same = wanted[:, :, None] == found[:, None]
    return torch.where(same.any(2), same.int().argmax(2), found.shape[1])


def _enough(places: Tensor, share: float) -> int:
    """How many places hold a share of those that are wanted."""
    return int(places.flatten().sort().values[math.ceil(share * places.numel()) - 1]) + 1


def _by_index(
    units: Tensor, count: int, group: Tensor, alike: float | None, processes: ProcessGroup
) -> Neighbours | None:
    """As :func:`nearest`, of unit rows on the CPU, by an index; None if that finds too few."""
    index = _Index(units, count, group, alike)
    if not all(processes.gather([index.finds])):
        return None
    everything = torch.arange(len(units))
    starts = processes.share(range(0, len(units), _LOOKED_UP))
    return _joined(
        processes.gather([(start, index.look_up(everything[start : start + _LOOKED_UP])) for start in starts])
    )


def _exact(units: Tensor, rows: Tensor, count: int, group: Tensor) -> Neighbours:
    """Neighbours of some rows among all."""
    found = []
    for part in torch.split(rows, 64):
        similarity = units[part] @ units.T
        similarity[group[part][:, None] == group[None]] = -torch.inf
        found.append(_top(similarity, count))
    return Neighbours(torch.cat([each.indices for each in found]), torch.cat([each.values for each in found]))
