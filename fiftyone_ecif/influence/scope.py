"""The parameters that are attributed, and the similarity matrix as a function of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.functional import normalize

from fiftyone_ecif.influence.losses import BatchLoss, SparingLoss

_CHUNK = 32  # gradients at a time, of all parameters each


class Scope(ABC):
    """Some of a model's parameters as one flat vector; the rest is held fixed.

    A batch is a tuple of what the image tower and what the text tower take, and, where
    equal pairs are not each other's negatives, which those are (``losses.others_equal``).

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

    def loss_of(self, batch: Any) -> BatchLoss:
        """The loss of a batch as a function of its similarity matrix."""
        return self.loss if len(batch) == 2 else SparingLoss(self.loss, batch[2])

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

    def sample_gradients(
        self, theta: Tensor, tower: str, inputs: Any, directions: Tensor, basis: Tensor | None = None
    ) -> Tensor:
        """Gradients of each embedding of one tower, before normalisation, along some directions of its own.

        Args:
            theta: the parameters, shape ``(p,)``.
            tower: ``"image"`` or ``"text"``.
            inputs: what that tower takes, of ``n`` samples.
            directions: shape ``(n, q, d)``.
            basis (None): directions to keep coordinates of, ``(p, r)``; by default
                all of the gradient.

        Returns:
            shape ``(n, q, r)``
        """
        embed = self.embed_images if tower == "image" else self.embed_captions
        return gradients_one_by_one(embed, theta, inputs, directions, basis)


def gradients_one_by_one(
    embed: Callable[[Tensor, Any], Tensor], theta: Tensor, inputs: Any, directions: Tensor, basis: Tensor | None
) -> Tensor:
    """What :meth:`Scope.sample_gradients` gives, by autograd for one sample after another.

    Args:
        embed: makes of parameters and ``n`` inputs the embeddings, ``(n, d)``.
        theta, inputs, directions, basis: as there.
    """

    def of_one(sample: Any, along: Tensor) -> Tensor:
        pull_back = vjp(lambda at: embed(at, sample[None])[0], theta)[1]

        def coordinates(direction: Tensor) -> Tensor:
            gradient: Tensor = pull_back(direction)[0]
            return gradient if basis is None else gradient @ basis

        rows: Tensor = torch.vmap(coordinates, chunk_size=_CHUNK)(along)
        return rows

    return torch.stack([of_one(sample, along) for sample, along in zip(inputs, directions, strict=True)])
