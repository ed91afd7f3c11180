"""The models that open_clip and this plugin bring, known without importing open_clip, which takes seconds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from threading import Thread
from typing import Any


def model_names() -> list[str]:
    """In order."""
    return sorted(_configs())


def pretrained_tags(model: str) -> list[str] | None:
    """The pretrained tags of a model; None until open_clip is imported, which starts here."""
    open_clip: Any = sys.modules.get("open_clip")
    if hasattr(open_clip, "list_pretrained_tags_by_model"):  # else it is being imported
        return list(open_clip.list_pretrained_tags_by_model(model))
    if open_clip is None:
        Thread(target=importlib.import_module, args=("open_clip",), daemon=True).start()
    return None


def multiplications(model: str) -> float | None:
    """How many a pair takes on its way through both towers.

    Those of transformers and of ResNet's bottlenecks are counted; None for a
    model that has other towers or is not known.
    """
    try:
        config = json.loads(_configs()[model].read_text())
        vision, text = config["vision_cfg"], config["text_cfg"]
    except (KeyError, OSError, ValueError):
        return None
    if {"timm_model_name", "hf_model_name"} & {*vision, *text}:
        return None
    size = vision.get("image_size", 224)
    height, width = size if isinstance(size, list) else (size, size)
    depth, channels = vision.get("layers", 12), vision.get("width", 768)
    if isinstance(depth, list):
        image = sum(depth) * 17 * height * width * channels**2 / 16  # in each stage as many a block
    else:
        image = _transformer(depth, channels, height * width // vision.get("patch_size", 16) ** 2 + 1)
    return float(image + _transformer(text.get("layers", 12), text.get("width", 512), text.get("context_length", 77)))


def _transformer(depth: int, width: int, tokens: int) -> float:
    return depth * tokens * (12 * width**2 + 2 * tokens * width)


def _configs() -> dict[str, Path]:
    spec = importlib.util.find_spec("open_clip")  # not imported, which takes seconds
    folders = [Path(place) / "model_configs" for place in (spec and spec.submodule_search_locations) or []]
    folders.append(Path(__file__).parent / "configs")
    return {path.stem: path for folder in folders for path in folder.glob("*.json")}
