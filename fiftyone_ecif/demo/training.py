"""Training a small open_clip model from scratch, for the demo and the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch.nn.functional import pad

import fiftyone_ecif.models.open_clip_names  # noqa: F401  # the model is among them
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.store.files import atomic_path

MODEL = "ecif-digits"
_LEARNING_RATE = 1e-3
_WARM_UP = 50
_SHIFT = 2  # pixels


def train(
    images: Sequence[Path],
    captions: Sequence[str],
    checkpoint: Path,
    steps: int,
    seed: int,
    batch_size: int = 128,
    model: str = MODEL,
) -> Generator[Progress, None, None]:
    """Trains a small model from scratch with open_clip's loss and saves its weights.

    AdamW with a warmed-up cosine schedule; the images are shifted at random.

    Args:
        images: image files.
        captions: one for each.
        checkpoint: where to save the weights; written whole or not at all.
        steps: how many batches to train on.
        seed: fixes weights, batches and shifts.
        batch_size (128): pairs a batch, or all of them if they are fewer.
        model ("ecif-digits"): its name.
    """
    torch.manual_seed(seed)
    network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=None)
    tokens = open_clip.get_tokenizer(model)(list(captions))
    pixels = torch.stack([preprocess(Image.open(path)) for path in images])
    size = pixels.shape[-1]

    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    loss = open_clip.ClipLoss()
    network.train()
    for step in range(steps):
        rows = torch.randperm(len(pixels))[:batch_size]
        dx, dy = torch.randint(0, 2 * _SHIFT + 1, (2,)).tolist()
        shifted = pad(pixels[rows], [_SHIFT] * 4, mode="replicate")[:, :, dy : dy + size, dx : dx + size]
        image, text, scale = network(shifted, tokens[rows])[:3]
        optimiser.zero_grad()
        loss(image, text, scale).backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            network.logit_scale.clamp_(0, math.log(100))
        yield Progress("Training the model", step + 1, steps)

    with atomic_path(checkpoint) as temporary:
        torch.save(network.state_dict(), temporary)
