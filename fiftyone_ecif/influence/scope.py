"""The parameters that are attributed, and the similarity matrix as a function of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.func import jvp
from torch.nn.functional import normalize

from fiftyone_ecif.influence.losses import BatchLoss


class Scope(ABC):
    """Some of a model's parameters as one flat vector; the rest is held fixed.

    A batch is a tuple of what the image tower and what the text tower take.

    Attributes:
        start: the parameters as loaded, shape ``(p,)``.
        loss: the loss that the model is trained with.
        projection: the kind of directions that gradients are stored in, see ``projections.PROJECTIONS``.
    """

    start: Tensor
    loss: BatchLoss
    projection = "basis"

    @abstractmethod
    def embed_images(self, theta: Tensor, images: Any) -> Tensor:
        """Image embeddings before normalisation, shape ``(n, d)``."""

    @abstractmethod
    def embed_captions(self, theta: Tensor, captions: Any) -> Tensor:
        """Caption embeddings before normalisation, shape ``(n, d)``."""

    @abstractmethod
    def logits(self, theta: Tensor, cosine: Tensor) -> Tensor:
        """Scaled (and, for a sigmoid loss, shifted) cosine similarities."""

    def entered(self, batches: Any) -> Any:
        """Batches of the same pairs, for :meth:`similarity`, with what no parameter in scope reaches computed once."""
        return batches

    def entered_captions(self, captions: Any) -> Any:
        """Captions for :meth:`embed_captions` in the same way."""
        return captions

    def logit_parameters(self, theta: Tensor) -> list[int]:
        """Places in ``theta`` of the temperature and the bias, as far as they are in scope."""
        return []

    def similarity(self, theta: Tensor, batch: Any) -> Tensor:
        """``S`` of a batch under the parameters ``theta``, shape ``(n, n)``."""
        return self.compare(theta, *self.embed(theta, batch))

    def similarity_and_tangent(self, theta: Tensor, batch: Any, direction: Tensor) -> tuple[Tensor, Tensor]:
        """``S`` of a batch and its derivative as ``theta`` moves along ``direction``, ``(n, n)`` each."""
        value, tangent = jvp(lambda at: self.similarity(at, batch), (theta,), (direction,))[:2]
        return value, tangent

    def compare(self, theta: Tensor, images: Tensor, captions: Tensor) -> Tensor:
        """``S`` of embeddings before normalisation, shape ``(n, n)``."""
        return self.logits(theta, normalize(images, dim=-1) @ normalize(captions, dim=-1).mT)

    def embed(self, theta: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Image and caption embeddings of a batch before normalisation, ``(n, d)`` each."""
        return self.embed_images(theta, batch[0]), self.embed_captions(theta, batch[1])
