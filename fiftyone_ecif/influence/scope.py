"""The parameters that are attributed, and the similarity matrix as a function of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.functional import normalize

from fiftyone_ecif.influence.losses import BatchLoss, SparingLoss

#: The names of the towers, as batches have them.
TOWERS = ("image", "text")


class SampleGradients(NamedTuple):
    """Embeddings of samples, and what they are back-propagated to.

    Attributes:
        embeddings: before normalisation, shape ``(n, d)``.
        along: gives for a direction of each embedding, ``(n, d)``, the gradient of the embedding along it, ``(n, r)``;
            it may be called several times.
    """

    embeddings: Tensor
    along: Callable[[Tensor], Tensor]


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

    def sample_gradients(self, theta: Tensor, tower: str, inputs: Any, basis: Tensor | None = None) -> SampleGradients:
        """Gradients of each embedding of one tower, along a direction of its own.

        Args:
            theta: the parameters, shape ``(p,)``.
            tower: one of :data:`TOWERS`.
            inputs: what that tower takes, of ``n`` samples.
            basis (None): directions to keep coordinates of, ``(p, r)``; by default
                all of the gradient.
        """
        embed = self.embed_images if tower == "image" else self.embed_captions
        along = gradients_one_by_one(embed, theta, inputs, basis)
        with torch.no_grad():
            return SampleGradients(embed(theta, inputs), along)


def gradients_one_by_one(
    embed: Callable[[Tensor, Any], Tensor], theta: Tensor, inputs: Any, basis: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What :class:`SampleGradients` has as ``along``, by autograd for one sample after another.

    Args:
        embed: makes of parameters and ``n`` inputs the embeddings, ``(n, d)``.
        theta, inputs, basis: as in :meth:`Scope.sample_gradients`.
    """

    def embed_one(sample: Any, at: Tensor) -> Tensor:
        return embed(at, sample[None])[0]

    pulls_back = [vjp(partial(embed_one, sample), theta)[1] for sample in inputs]

    def along(directions: Tensor) -> Tensor:
        rows = torch.stack([one(direction)[0] for one, direction in zip(pulls_back, directions, strict=True)])
        return rows if basis is None else rows @ basis

    return along
