"""The stages of a default job on one device: seconds, pairs a second, the device's own limit beside them, memory.

Needs no FiftyOne: pairs are synthetic features, or JPEG files for the encoder.
"""

from __future__ import annotations

import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from fiftyone_ecif.bench.speed.caches import fresh_cache
from fiftyone_ecif.bench.speed.photographs import make_photographs
from fiftyone_ecif.bench.speed.stopwatch import side_by_side
from fiftyone_ecif.bench.tables import table
from fiftyone_ecif.devices import Placement, wait_for
from fiftyone_ecif.influence.cached_gradients import influence_vectors
from fiftyone_ecif.influence.curvature import hessian_at
from fiftyone_ecif.influence.direct import direct_influence
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import solve
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projected_gradients import keep_gradients
from fiftyone_ecif.influence.target_losses import Contrastive
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.gathering import gather_evidence
from fiftyone_ecif.misalignment.judgement import judge
from fiftyone_ecif.misalignment.neighbours import nearest
from fiftyone_ecif.models.inputs import default_readers, loaded
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.models.towers import Tower
from fiftyone_ecif.progress import result_of
from fiftyone_ecif.store.tables import Store

Row = dict[str, Any]
WIDTHS = 768, 512, 512  # of ViT-B-32: image features, text features, embeddings
_SHOWN = 64  # what images and captions have in common
_BATCH = 256
_TARGET = 1024
_NEIGHBOURS = 30
_ON_CPU = 100_000  # pairs at most that all others are searched for, so that a report takes minutes
_DIFFERENT = 256  # photographs; making them takes longer than encoding


def run(device: str, pairs: Sequence[int], models: Sequence[str], photographs: int, keep: Callable[[Row], None]) -> Row:
    """Measures a device.

    Args:
        device: of torch.
        pairs: numbers of synthetic pairs.
        models: of open_clip, whose encoding is measured.
        photographs: pairs that are encoded.
        keep: called with what is found so far.
    """
    threads = torch.get_num_threads()
    found: Row = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "limits": [limits(each) for each in dict.fromkeys([device, "cpu"])],
        "encoders": [],
        "stages": [],
    }
    for model in models:
        for row in encoder(model, photographs, device):
            found["encoders"].append(row)
            keep(found)
    for where, count in dict.fromkeys([*[(device, count) for count in pairs], ("cpu", min(pairs))]):
        for row in heads(count, where):
            found["stages"].append(row)
            keep(found)
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """All tables, under a heading each."""
    titles = {
        "limits": "What the devices can do at best",
        "encoders": "Encoding JPEG files and captions, beside forward passes and reading alone",
        "stages": "Stages of a job on the heads, 768 and 512 to 512, from synthetic features",
    }
    parts = [f"{found['machine']}, {found['date']}.\n"]
    return "\n".join(
        parts + [f"### {title}\n\n{table(found[name])}\n" for name, title in titles.items() if found[name]]
    )


def limits(device: str) -> Row:
    """What the device can do at best: a copy in its memory, products of large matrices in three precisions."""
    cuda = torch.device(device).type == "cuda"
    size = 8192 if cuda else 1024
    found: Row = {"device": torch.cuda.get_device_name(device) if cuda else "cpu"}
    source = torch.randn(2**28 if cuda else 2**24, device=device)
    found["copy_gb_per_s"] = 2 * source.nbytes / _seconds(device, source.clone) / 1e9
    kinds = (torch.float64, torch.float32, torch.float16) if cuda else (torch.float64, torch.float32)
    for kind in kinds:
        matrix = torch.randn(size, size, device=device).to(kind)
        seconds = _seconds(device, partial(torch.matmul, matrix, matrix))
        found[f"{str(kind).removeprefix('torch.')}_tflops"] = 2 * size**3 / seconds / 1e12
    return found


def synthetic(pairs: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Features of images and captions that have something in common, ``(N, 768)`` and ``(N, 512)``, float32."""
    random = torch.Generator(device).manual_seed(seed)
    views = torch.Generator(device).manual_seed(0)
    shown = torch.randn(pairs, _SHOWN, generator=random, device=device)
    sides = []
    for width in WIDTHS[:2]:
        view = torch.randn(_SHOWN, width, generator=views, device=device) / _SHOWN**0.5
        sides.append(shown @ view + 0.5 * torch.randn(pairs, width, generator=random, device=device))
    return sides[0], sides[1]


def heads(pairs: int, device: str, dtype: torch.dtype | None = None) -> Iterator[Row]:
    """Seconds of each stage of scoring and of a search of neighbours, from synthetic features.

    Args:
        pairs: how many.
        device: of torch.
        dtype (None): of the heads; by default the device's own.

    Yields:
        a row a stage
    """
    placement = Placement.of_heads(device) if dtype is None else Placement(device, dtype)
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(width, WIDTHS[2], generator=random) / width**0.5 for width in WIDTHS[:2]]
    scope = HeadScope(weights[0], weights[1], 20.0, placement=placement)
    features = synthetic(pairs, 1, device)
    batches = FeatureBatches(*features, random_partition(pairs, _BATCH, 0), placement)
    aims = FeatureBatches(*synthetic(_TARGET, 2, device), random_partition(_TARGET, _BATCH, 0), placement)
    target = Contrastive().make(scope, aims)
    objective = ContrastiveLoss(scope, batches, pairs, 0.1)
    objective.gradient_and_value(scope.start)  # loads what the device needs for it
    watch = _Watch(pairs, device, placement)

    theta = scope.start
    steps = 0

    def fit() -> None:
        nonlocal theta, steps
        for theta, _ in minimise(objective, 1e-5 if placement.dtype == torch.float64 else 1e-4):  # noqa: B007
            steps += 1

    yield watch.row("fit", fit) | {"products": steps}
    gradient = target.gradient_and_value(theta)[0]
    solution = None

    def invert() -> None:
        nonlocal solution
        solution = result_of(solve(hessian_at(objective, theta), gradient))

    row = watch.row("solve", invert)
    assert solution is not None
    yield row | {"products": solution.iterations}
    yield watch.row("score", lambda: result_of(direct_influence(objective, theta, [solution.vector], "exact")))
    with tempfile.TemporaryDirectory(prefix="ecif-stages-") as name, fresh_cache(Path(name)):
        store = Store("stages")
        store.ensure_writable()
        kept = GradientStore(store, pairs)
        yield watch.row(
            "stored gradients", lambda: result_of(keep_gradients(kept, objective, theta, {"target": target}))
        )
        yield watch.row("effects", kept.effects)
        vectors = influence_vectors(kept.curvature(), kept.target("target", _TARGET).gradient[:100], pairs)
        yield watch.row("trace 100 from the store", lambda: kept.influence(vectors))
    if pairs <= _ON_CPU or torch.device(device).type == "cuda":
        parts = torch.split(features[0], 2**16)
        images = torch.cat([scope.embed_images(theta, part.to(theta)).float() for part in parts])
        yield watch.row("neighbours, one search", lambda: nearest(images, _NEIGHBOURS, device=device))
        captions = [str(number) for number in range(pairs)]
        duplicates = find_duplicates(features[0], captions, device)
        inputs = DetectorInputs(objective, theta, duplicates, device=device)
        yield watch.row("detect misaligned pairs", lambda: judge(result_of(gather_evidence(inputs))))


def encoder(model: str, pairs: int, device: str) -> Iterator[Row]:
    """Inputs a second of each tower with random weights, beside forward passes and reading alone.

    Args:
        model: of open_clip.
        pairs: JPEG files of 640 by 480 pixels, and as many captions.
        device: of torch.

    Yields:
        a row a tower. What is read are images, decoded and resized, or captions, split into tokens
    """
    with tempfile.TemporaryDirectory(prefix="ecif-stages-") as name:
        folder = Path(name)
        made_once = make_photographs(folder, min(pairs, _DIFFERENT))
        paths, captions = (list(islice(cycle(each), pairs)) for each in made_once)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(model).state_dict(), folder / "model.pt")
        made = OpenClipEncoder(model, str(folder / "model.pt"), device)
        batch, readers = made.batch_size, default_readers()
        pixels = made.finish(torch.stack([made.preprocess(Image.open(path)) for path in paths[:batch]]).to(device))
        towers: dict[str, tuple[Tensor, Callable[[], Iterator[Any]], Callable[[], Iterator[Any]]]] = {
            "image": (
                pixels,
                lambda: made.image_features(paths, batch, readers),
                lambda: loaded(made.images(paths), batch, readers),
            ),
            "text": (
                made.tokens(captions[:batch]),
                lambda: made.text_features(captions, batch),
                lambda: (made.tokens(captions[start : start + batch]) for start in range(0, pairs, batch)),
            ),
        }
        for tower, (inputs, encode, read) in towers.items():
            run = Tower(made.model, tower)
            ways = {"encode": partial(_exhaust, encode), "forward": partial(_forward, run, inputs, pairs, device)}
            for way in ways.values():
                way()
            found = side_by_side(3, ways | {"read": partial(_exhaust, read)})
            rates = {f"{way}_per_s": pairs / seconds for way, seconds in found.items()}
            yield {"model": model, "tower": tower, **rates, "utilisation": found["forward"] / found["encode"]}


def _exhaust(make: Callable[[], Iterator[Any]]) -> None:
    for _ in make():
        pass


@torch.no_grad()
def _forward(run: Callable[[Tensor], Tensor], inputs: Tensor, count: int, device: str) -> None:
    """As many inputs as ``count``, in batches of those given."""
    kind = torch.device(device).type
    with torch.autocast(kind, torch.float16, enabled=kind == "cuda"):
        for start in range(0, count, len(inputs)):
            run(inputs[: count - start])
    wait_for(device)


class _Watch:
    """Seconds and memory of stages."""

    def __init__(self, pairs: int, device: str, placement: Placement) -> None:
        self._pairs, self._device, self._placement = pairs, device, placement

    def row(self, stage: str, work: Callable[[], Any]) -> Row:
        """Does the work and says what it took."""
        cuda = torch.device(self._device).type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        wait_for(self._device)
        start = time.perf_counter()
        work()
        wait_for(self._device)
        seconds = time.perf_counter() - start
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {
            "device": self._device,
            "precision": str(self._placement.dtype).removeprefix("torch."),
            "pairs": self._pairs,
            "stage": stage,
            "seconds": seconds,
            "pairs_per_s": self._pairs / seconds,
            "device_gib": torch.cuda.max_memory_allocated(self._device) / 2**30 if cuda else None,
            "host_gib": resident,
        }


def _seconds(device: str, work: Callable[[], Any], repeats: int = 10) -> float:
    """Of one of many, after some that are not counted."""
    for count in (3, repeats):
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            work()
        wait_for(device)
        seconds = time.perf_counter() - start
    return seconds / repeats
