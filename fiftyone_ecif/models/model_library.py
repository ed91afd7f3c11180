"""Libraries of models: what has names, weights and a way to load them. No heavy imports: forms read the names."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from fiftyone_ecif.models.dual_encoder import DualEncoder


class ModelLibrary(ABC):
    """A library that models come from.

    Only :meth:`check` and :meth:`load` may import what takes seconds.

    Attributes:
        name: of the library.
        says: what its models are, in a few words.
    """

    name: str
    says: str

    @abstractmethod
    def model_names(self) -> list[str]:
        """The models that can be offered, in order."""

    @abstractmethod
    def knows(self, model: str) -> bool:
        """Whether a model name is one of this library's, which may be more than it can list."""

    @abstractmethod
    def brings_weights(self, model: str) -> bool:
        """Whether a model name alone says which weights are meant, so that ``pretrained`` is left out."""

    @abstractmethod
    def pretrained_tags(self, model: str) -> list[str] | None:
        """The weights of a model that can be named as ``pretrained``; None as long as that is not known."""

    @abstractmethod
    def multiplications(self, model: str) -> float | None:
        """How many a pair takes on its way through both towers, for a first guess of the time; None if not known."""

    @abstractmethod
    def check(self, model: str, pretrained: str | None) -> None:
        """Checks a model name and its weights without loading anything.

        Raises:
            EcifError: if there is no such model, with what is known, or
                ``pretrained`` does not go with it
        """

    @abstractmethod
    def load(self, model: str, pretrained: str | None = None, device: str | None = None) -> DualEncoder:
        """Loads a model.

        Args:
            model: its name.
            pretrained (None): a pretrained tag, or the path of a checkpoint.
            device (None): where it is to run; by default a GPU where there is one.

        Raises:
            EcifError: if the model, its weights or the device does not exist
        """


def unknown_model(library: str, model: str, known: Sequence[str]) -> str:
    """What is said of a name that a library does not know, with those of its names that are alike.

    >>> unknown_model("open_clip", "ViT-B-23", ["RN50", "ViT-B-32"])
    "open_clip has no model 'ViT-B-23'. Did you mean ViT-B-32?"
    """
    near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
    return f"{library} has no model {model!r}." + (f" Did you mean {' or '.join(near)}?" if near else "")
