"""Scoring of synthetic pairs in a process of its own: ``python -m fiftyone_ecif.bench.speed.growth PAIRS [WIDTHS]``.

Prints one JSON object: ``pairs``, ``widths`` (``narrow`` or ``clip``), ``seconds`` of
:func:`fiftyone_ecif.influence.scoring.score_pairs` in the heads scope from an empty store, ``cpu_seconds`` of it by all
threads, ``memory_mib`` (the most that was ever resident, everything
included), ``import_mib`` (as much before it began) and ``products`` (with the curvature).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fiftyone_ecif.bench.speed.caches import fresh_cache
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.objective import random_partition
from fiftyone_ecif.influence.scoring import score_pairs
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.influence.target_losses import Contrastive
from fiftyone_ecif.progress import result_of
from fiftyone_ecif.store.disk_matrix import DiskMatrix
from fiftyone_ecif.store.tables import Store

_WIDTHS = {"narrow": (64, 64, 32), "clip": (768, 512, 512)}  # of the features of images and captions, and embeddings
_BATCH = 256
_TARGET = 256  # pairs


def measure(pairs: int) -> dict[str, Any]:
    """Runs this program for so many pairs."""
    command = [sys.executable, "-m", __name__, str(pairs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def synthetic(pairs: int, seed: int, folder: Path, widths: str = "narrow") -> tuple[DiskMatrix, DiskMatrix]:
    """Features of images and captions that share what they show, ``(pairs, w)`` each, on the disk in a folder."""
    generator = torch.Generator().manual_seed(seed)
    image, text, _ = _WIDTHS[widths]
    images, texts = DiskMatrix(pairs, image, folder), DiskMatrix(pairs, text, folder)
    for places in torch.split(torch.arange(pairs), _BATCH):
        shown = torch.randn(len(places), max(image, text), generator=generator)
        images.write(places.numpy(), shown[:, :image].numpy())
        other = torch.randn(shown.shape, generator=generator)
        texts.write(places.numpy(), (shown + 0.5 * other)[:, :text].numpy())
    return images, texts


def scope(widths: str = "narrow") -> HeadScope:
    """Heads that map both kinds of features alike."""
    image, text, embedding = _WIDTHS[widths]
    widest = max(image, text)
    head = torch.randn(widest, embedding, generator=torch.Generator().manual_seed(0)) / widest**0.5
    return HeadScope(head[:image].clone(), head[:text].clone(), scale=10.0)


def _score(pairs: int, widths: str = "narrow") -> dict[str, Any]:
    before = _resident()
    heads = scope(widths)
    with tempfile.TemporaryDirectory(prefix="ecif-growth-") as name, fresh_cache(Path(name)):
        features, partition = synthetic(pairs, 1, Path(name), widths), random_partition(pairs, _BATCH, 0)
        aims = FeatureBatches(*synthetic(_TARGET, 2, Path(name), widths), random_partition(_TARGET, _BATCH, 0))
        target = Contrastive().make(heads, aims)
        start, cpu = time.perf_counter(), time.process_time()
        images, texts = (side.in_order(torch.cat(partition)) for side in features)
        batches = FeatureBatches(images, texts, partition)
        store = Store("growth")
        store.ensure_writable()
        scores = result_of(score_pairs(store, heads, batches, {"target": target}, ScoringOptions()))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    products = scores.diagnostics["solve_iterations"]
    return {
        "pairs": pairs,
        "widths": widths,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "memory_mib": _resident(),
        "import_mib": before,
        "products": products,
    }


def _resident() -> float:
    """The most that this process ever had in memory, in MiB."""
    status = Path("/proc/self/status")  # Linux's ru_maxrss also counts the process that started this one
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    print(json.dumps(_score(int(sys.argv[1]), *sys.argv[2:])))
