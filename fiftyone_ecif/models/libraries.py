"""The libraries that models come from, by name. No heavy imports: forms read the names of their models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fiftyone_ecif.models.model_library import ModelLibrary
from fiftyone_ecif.models.open_clip_library import OpenClipLibrary
from fiftyone_ecif.registry import Registry

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fiftyone_ecif.models.dual_encoder import DualEncoder

MODEL_LIBRARIES: Registry[ModelLibrary] = Registry("model_library")
MODEL_LIBRARIES.register(OpenClipLibrary)


def model_names() -> list[str]:
    """The models of all libraries that can be offered, one library after the other."""
    return [name for library in MODEL_LIBRARIES.values() for name in library.model_names()]


def library_of(model: str) -> ModelLibrary:
    """The library that a model name belongs to: the first that knows it, or open_clip to say what is like it."""
    knowing = (library for library in MODEL_LIBRARIES.values() if library.knows(model))
    return next(knowing, MODEL_LIBRARIES[OpenClipLibrary.name])


def load_encoder(model: str, pretrained: str | None = None, device: str | None = None) -> DualEncoder:
    """Loads a model of whichever library it belongs to; see :meth:`ModelLibrary.load`.

    Raises:
        EcifError: if the model, its weights or the device does not exist
    """
    return library_of(model).load(model, pretrained, device)
