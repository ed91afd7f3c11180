"""Nearest neighbours by cosine similarity: exact in blocks, or by an index where that would take hours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError

#: Rows beyond which a CPU looks neighbours up in an index, see :func:`nearest`.
EXACT_ON_CPU = 100_000
#: The share of true neighbours that an index is to find, tried on some rows.
RECALL = 0.99
_BLOCK = {"cpu": (1024, 16384), "gpu": (4096, 65536)}  # of the similarity matrix that is in memory at a time
_CHUNK = 64  # columns of which only the best is looked at first
_SPARE = 16  # neighbours that an index finds beyond those that are wanted, as some may be copies
_LOOKED_UP = 4096  # rows at a time
_TRIED = 256  # rows on which an index is held against the truth


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
) -> Neighbours:
    """The rows most alike to each row.

    Exact up to 100,000 rows and on a GPU: ``N^2 d`` multiplications, a block
    of the similarity matrix in memory. Beyond that, a CPU looks in an inverted
    file (faiss), in as many of its lists as it takes to find 99 % of the
    neighbours of 256 rows, with exact similarities.

    Args:
        embeddings: shape ``(N, d)``; need not be normalised.
        count: neighbours to find; fewer if there are not as many.
        group (None): rows of one number are never neighbours of one another;
            by default each row is its own group. Shape ``(N,)``.
        device ("cpu"): where they are compared.
        processes (ALONE): the processes that share the rows; all must call this.

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
        return _by_index(normalize(embeddings.cpu().float(), dim=1), count, group, processes)
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


def _by_index(units: Tensor, count: int, group: Tensor, processes: ProcessGroup) -> Neighbours:
    """As :func:`nearest`, of unit rows on the CPU, by an inverted file in half precision."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    width, wanted = units.shape[1], count + _SPARE
    lists = int(4 * len(units) ** 0.5)
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.niter = 10
    random = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(units), generator=random)[: 64 * lists]
    index.train(units[sample].numpy())
    for part in torch.split(units, 2**16):
        index.add(part.numpy())

    tried = sample[:_TRIED]
    truth = _exact(units, tried, count, group)
    index.nprobe = 8
    while index.nprobe < lists:
        found, lacking = _looked_up(index, units, tried, wanted, count, group)
        hits = (found.rows[:, :, None] == truth.rows[:, None]).any(2).float().mean(1)
        if hits[~lacking].mean() >= RECALL or lacking.all():
            break
        index.nprobe = min(2 * index.nprobe, lists)

    everything, parts = torch.arange(len(units)), []
    for start in processes.share(range(0, len(units), _LOOKED_UP)):
        part = everything[start : start + _LOOKED_UP]
        found, lacking = _looked_up(index, units, part, wanted, count, group)
        if lacking.any():  # copies fill what was found
            found.rows[lacking], found.similarity[lacking] = _exact(units, part[lacking], count, group)
        parts.append((start, found))
    return _joined(processes.gather(parts))


def _looked_up(
    index: object, units: Tensor, rows: Tensor, wanted: int, count: int, group: Tensor
) -> tuple[Neighbours, Tensor]:
    """Neighbours of some rows by an index, and of which rows it found too few."""
    found = torch.from_numpy(index.search(units[rows].numpy(), wanted)[1])  # type: ignore[attr-defined]
    fits = (found >= 0) & (group[found.clamp_min(0)] != group[rows][:, None])
    similarity = torch.einsum("nd,nkd->nk", units[rows], units[found.clamp_min(0)]).masked_fill(~fits, -torch.inf)
    best = similarity.topk(count, dim=1)
    return Neighbours(found.gather(1, best.indices), best.values), fits.sum(1) < count


def _exact(units: Tensor, rows: Tensor, count: int, group: Tensor) -> Neighbours:
    """Neighbours of some rows among all."""
    found = []
    for part in torch.split(rows, 64):
        similarity = units[part] @ units.T
        similarity[group[part][:, None] == group[None]] = -torch.inf
        found.append(_top(similarity, count))
    return Neighbours(torch.cat([each.indices for each in found]), torch.cat([each.values for each in found]))
