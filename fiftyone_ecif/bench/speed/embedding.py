"""Scoring from scratch beside FiftyOne's own embeddings of the same images and captions."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fiftyone as fo
import fiftyone.utils.open_clip as fouo
import numpy as np
import open_clip
import torch

from fiftyone_ecif.api.influence import influence_steps
from fiftyone_ecif.bench.speed.caches import fresh_cache
from fiftyone_ecif.bench.speed.photographs import make_photographs
from fiftyone_ecif.bench.speed.stopwatch import side_by_side
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings

Row = dict[str, Any]
_BATCH = 128
_ZOO = {  # the zoo's "open-clip-torch", but for the prompt before each caption and its list of classes
    "embeddings_layer": "visual",
    "output_processor_cls": "fiftyone.utils.torch.ClassifierOutputProcessor",
    "text_prompt": "",
    "classes": ["object"],
}


@contextlib.contextmanager
def photographs(pairs: int, model: str, size: tuple[int, int] = (640, 480)) -> Iterator[tuple[Any, str]]:
    """JPEG files with captions of 6 to 14 words, an eighth of them a target, and a checkpoint with random weights.

    Args:
        pairs: how many.
        model: a model name of open_clip.
        size ((640, 480)): of the images, in pixels.

    Yields:
        the dataset, which is deleted afterwards with the files, and the checkpoint's path
    """
    with tempfile.TemporaryDirectory(prefix="ecif-speed-") as name, fresh_cache(Path(name)):
        paths, captions = make_photographs(Path(name), pairs, size)
        samples = [
            fo.Sample(filepath=path, caption=caption, tags=["train" if number % 8 else "val"])
            for number, (path, caption) in enumerate(zip(paths, captions, strict=True))
        ]
        torch.manual_seed(0)
        checkpoint = str(Path(name) / "model.pt")
        torch.save(open_clip.create_model(model).state_dict(), checkpoint)
        dataset = fo.Dataset()
        try:
            dataset.add_samples(samples, progress=False)
            yield dataset, checkpoint
        finally:
            dataset.delete()


def theirs(dataset: Any, model: str, checkpoint: str) -> Row:
    """Seconds of each stage of FiftyOne's embeddings, with batches as large as ours and its own number of workers."""
    clock = _Clock()
    config = _ZOO | {"clip_model": model, "pretrained": checkpoint}
    zoo = fouo.TorchOpenClipModel(fouo.TorchOpenClipModelConfig(config))
    clock.lap("Loading the model")
    images = dataset.compute_embeddings(zoo, batch_size=_BATCH, progress=False)
    clock.lap("Encoding images")
    captions = dataset.values("caption")
    with torch.no_grad():
        texts = [zoo.embed_prompts(captions[start : start + _BATCH]) for start in range(0, len(captions), _BATCH)]
    clock.lap("Encoding captions")
    assert len(images) == len(np.concatenate(texts)) == len(dataset)
    return clock.seconds


def ours(dataset: Any, model: str, checkpoint: str) -> Row:
    """Seconds of each stage of scoring the heads, from an empty cache to fields on the samples."""
    clock = _Clock()
    settings = InfluenceSettings(model=model, pretrained=checkpoint)
    with tempfile.TemporaryDirectory(prefix="ecif-speed-") as name, fresh_cache(Path(name)):
        train, target = dataset.match_tags("train"), dataset.match_tags("val")
        for step in influence_steps(train, target, settings, JobSettings(overwrite=True), "speed"):
            clock.lap(step.stage)
    return clock.seconds


def embed(pairs: int, repeats: int, model: str = "ViT-B-32") -> list[Row]:
    """Rows of who and seconds by stage: the medians of runs in turns."""
    stages: dict[str, list[Row]] = {"fiftyone": [], "ecif": []}
    with photographs(pairs, model) as (dataset, checkpoint):
        side_by_side(
            repeats,
            {
                "fiftyone": lambda: stages["fiftyone"].append(theirs(dataset, model, checkpoint)),
                "ecif": lambda: stages["ecif"].append(ours(dataset, model, checkpoint)),
            },
        )
    return [{"who": who, "pairs": pairs, "total": _median(runs)} | _median_stages(runs) for who, runs in stages.items()]


def _median(runs: Sequence[Row]) -> float:
    return float(np.median([sum(run.values()) for run in runs]))


def _median_stages(runs: Sequence[Row]) -> Row:
    return {stage: float(np.median([run[stage] for run in runs])) for stage in runs[0]}


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: Row = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
