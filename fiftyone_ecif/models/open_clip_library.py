"""The models that open_clip and this plugin bring, known without importing open_clip, which takes seconds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from fiftyone_ecif.models.model_library import ModelLibrary

if TYPE_CHECKING:
    from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder

_BRING_WEIGHTS = ("hf-hub:", "local-dir:")


class OpenClipLibrary(ModelLibrary):
    """Models of open_clip by name, from a folder (``local-dir:…``) or from the Hugging Face hub (``hf-hub:…``)."""

    name = "open_clip"
    says = "CLIP, SigLIP and their like, by name, hf-hub:… or local-dir:…"

    def model_names(self) -> list[str]:
        """The models that open_clip and this plugin have a configuration of, in order."""
        return sorted(_configs())

    def knows(self, model: str) -> bool:
        """Whether there is a configuration of a model, or its name says where that is."""
        return self.brings_weights(model) or model in _configs()

    def brings_weights(self, model: str) -> bool:
        """Whether a model name says where its weights are: ``local-dir:…`` or ``hf-hub:…``."""
        return model.startswith(_BRING_WEIGHTS)

    def pretrained_tags(self, model: str) -> list[str] | None:
        """The pretrained tags of a model; None until open_clip is imported, which starts here."""
        open_clip: Any = sys.modules.get("open_clip")
        if hasattr(open_clip, "list_pretrained_tags_by_model"):  # else it is being imported
            return list(open_clip.list_pretrained_tags_by_model(model))
        if open_clip is None:
            Thread(target=importlib.import_module, args=("open_clip",), daemon=True).start()
        return None

    def multiplications(self, model: str) -> float | None:
        """How many a pair takes on its way through both towers.

        Those of transformers and of ResNet's bottlenecks are counted; None for
        a model that has other towers or is not known.
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
        words = text.get("context_length", 77)
        return float(image + _transformer(text.get("layers", 12), text.get("width", 512), words))

    def check(self, model: str, pretrained: str | None) -> None:
        """Checks a model name and its weights without loading anything.

        Raises:
            EcifError: if open_clip does not know the model, with those that
                are named alike, or ``pretrained`` is neither a tag of it nor a file
        """
        from fiftyone_ecif.models.open_clip_names import check_names

        check_names(model, pretrained)

    def load(self, model: str, pretrained: str | None = None, device: str | None = None) -> OpenClipEncoder:
        """Loads a model; see :class:`OpenClipEncoder`.

        Raises:
            EcifError: if the model, the tag, the checkpoint or the device does not exist
        """
        from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder

        return OpenClipEncoder(model, pretrained, device)


def _transformer(depth: int, width: int, tokens: int) -> float:
    return depth * tokens * (12 * width**2 + 2 * tokens * width)


def _configs() -> dict[str, Path]:
    spec = importlib.util.find_spec("open_clip")  # not imported, which takes seconds
    folders = [Path(place) / "model_configs" for place in (spec and spec.submodule_search_locations) or []]
    folders.append(Path(__file__).parent / "configs")
    return {path.stem: path for folder in folders for path in folder.glob("*.json")}
