"""Detection among many synthetic pairs on the CPU: ``python -m fiftyone_ecif.bench.speed.detection PAIRS``.

Prints two JSON objects, of :func:`neighbours` and of :func:`detect`.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.gathering import gather_evidence
from fiftyone_ecif.misalignment.judgement import judge
from fiftyone_ecif.misalignment.neighbours import nearest
from fiftyone_ecif.store.disk_matrix import DiskMatrix

_WIDTHS = 768, 512, 512  # of ViT-B-32: image features, text features, embeddings
_SHOWN = 512  # numbers that images and captions have in common, in part
_BATCH = 256
_NEIGHBOURS, _TRIED = 31, 1000
_ROWS = 2**16  # at a time


def features(pairs: int, folder: Path) -> tuple[DiskMatrix, DiskMatrix]:
    """Of images and of captions, on the disk in a folder, shape ``(N, w)``: their variance falls as ``1 / k``.

    That is along their principal axes, which are not the coordinates.
    """
    random = torch.Generator().manual_seed(0)
    sides = [DiskMatrix(pairs, width, folder) for width in _WIDTHS[:2]]
    axes = [torch.linalg.qr(torch.randn(width, width, generator=random))[0] for width in _WIDTHS[:2]]
    for places in torch.split(torch.arange(pairs), _ROWS):
        shown = torch.randn(len(places), _SHOWN, generator=random)
        for side, turn in zip(sides, axes, strict=True):
            part = 0.5 * torch.randn(len(places), len(turn), generator=random)
            part[:, :_SHOWN] += shown
            side.write(places.numpy(), ((part * torch.arange(1, len(turn) + 1) ** -0.5) @ turn).numpy())
    return sides[0], sides[1]


def neighbours(pairs: int) -> dict[str, Any]:
    """One search for the neighbours of all images: CPU ``seconds``, and of some images its ``recall``.

    ``dense`` are the CPU seconds of comparing all with all, extrapolated from those images.
    """
    with tempfile.TemporaryDirectory(prefix="ecif-detection-") as folder:
        images = features(pairs, Path(folder))[0][:]
    start = time.process_time()
    found = nearest(images, _NEIGHBOURS).rows
    seconds = time.process_time() - start
    units = normalize(images, dim=1)
    tried = torch.randperm(pairs, generator=torch.Generator().manual_seed(1))[:_TRIED]
    hits, start = [], time.process_time()
    for rows in torch.split(tried, 64):
        similarity = units[rows] @ units.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        truth = similarity.topk(_NEIGHBOURS).indices
        hits.append((found[rows][:, :, None] == truth[:, None]).any(2).float())
    dense = (time.process_time() - start) * pairs / len(tried)
    return {"pairs": pairs, "seconds": seconds, "recall": float(torch.cat(hits).mean()), "dense": dense}


def detect(pairs: int) -> dict[str, Any]:
    """CPU seconds in all and by stage, and the most memory that was ever resident."""
    with tempfile.TemporaryDirectory(prefix="ecif-detection-") as folder:
        return _detect(*features(pairs, Path(folder)))


def _detect(images: DiskMatrix, texts: DiskMatrix) -> dict[str, Any]:
    pairs = len(images)
    random = torch.Generator().manual_seed(0)
    heads = [torch.randn(width, _WIDTHS[2], generator=random) / width**0.5 for width in _WIDTHS[:2]]
    scope = HeadScope(heads[0], heads[1], scale=20.0)
    batches = FeatureBatches(images, texts, random_partition(pairs, _BATCH, 0))
    objective = ContrastiveLoss(scope, batches, pairs)
    start = last = time.process_time()
    stages: dict[str, float] = {}

    def passed(stage: str) -> None:
        nonlocal last
        seconds = time.process_time()
        stages[stage] = stages.get(stage, 0.0) + seconds - last
        last = seconds

    duplicates = find_duplicates(images[:], [str(number) for number in range(pairs)])
    passed("Finding duplicates")
    work = gather_evidence(DetectorInputs(objective, scope.start, duplicates))
    stage = "Comparing pairs"
    while True:
        try:
            following = next(work).stage
        except StopIteration as done:
            passed(stage)
            judge(done.value)
            passed("Judging")
            break
        passed(stage)
        stage = following
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"pairs": pairs, "seconds": last - start, "memory_gib": memory, "stages": stages}


if __name__ == "__main__":
    for measure in (neighbours, detect):
        print(json.dumps(measure(int(sys.argv[1]))), flush=True)
