"""Photographs to encode: blurred noise, which decodes as slowly as real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_WORDS = "a two red small old dog cat boat man child on under near field river".split()  # noqa: SIM905


def make_photographs(folder: Path, pairs: int, size: tuple[int, int] = (640, 480)) -> tuple[list[str], list[str]]:
    """Makes JPEG files and captions of 6 to 14 words.

    Args:
        folder: where.
        pairs: how many.
        size ((640, 480)): of the images, in pixels.

    Returns:
        paths and captions
    """
    random = np.random.default_rng(0)
    paths, captions = [], []
    for number in range(pairs):
        path = folder / f"{number:06d}.jpg"
        coarse = Image.fromarray(random.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(str(path))
        captions.append(" ".join(random.choice(_WORDS, random.integers(6, 15))))
    return paths, captions
