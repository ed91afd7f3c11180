"""The head scope: both final projections of a CLIP model, on cached features.

A head maps the features in front of the final projection, ``x`` of shape
``(n, w)``, to an embedding ``x @ weight + bias`` of shape ``(n, d)``. Everything
before it is frozen, so the features are computed once and every loss, gradient
and Hessian product afterwards is a few matrix products in float64.

A tower may add something to its last projection, as one that ends in
``y + mlp(y)`` does. That is frozen as well: the features are then followed by
this offset, ``d`` more columns, and the embedding is ``offset + x @ weight + bias``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import jvp
from typing_extensions import override

from fiftyone_ecif.influence.losses import BatchLoss, SoftmaxLoss
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.store.disk_matrix import DiskMatrix

Batch = tuple[Tensor, Tensor]


def head_inputs(features: Tensor, head: Tensor) -> Tensor:
    """What of the features a head multiplies: all but the offset, ``(..., w)``."""
    return features[..., : len(head)]


def head_outputs(features: Tensor, head: Tensor) -> Tensor:
    """The embeddings that a head makes of features, with their offset if they have one, ``(..., d)``."""
    embeddings = head_inputs(features, head) @ head
    return embeddings if features.shape[-1] == len(head) else embeddings + features[..., len(head) :]


class HeadScope(Scope):
    """The parameters of both heads, and optionally the temperature, as one flat vector.

    Args:
        image_head: shape ``(w_image, d)``; a bias is its last row, for which the
            image features have a one at the end of what is multiplied.
        text_head: shape ``(w_text, d)``, likewise.
        scale: ``exp(logit_scale)``, the inverse temperature.
        bias (0): ``logit_bias`` of a model with a sigmoid loss; held fixed.
        loss (SoftmaxLoss()): what the model is trained with.
        with_scale (False): whether ``logit_scale`` is attributed, as the last
            parameter, or held fixed.

    Attributes:
        start: the given weights, flat, shape ``(p,)``.
    """

    projection = "kronecker"

    def __init__(
        self,
        image_head: Tensor,
        text_head: Tensor,
        scale: float,
        bias: float = 0.0,
        loss: BatchLoss | None = None,
        with_scale: bool = False,
    ) -> None:
        self.shapes = (image_head.shape, text_head.shape)
        parts = [image_head.flatten().double(), text_head.flatten().double()]
        if with_scale:
            parts.append(torch.tensor([math.log(scale)], dtype=torch.float64))
        self.start = torch.cat(parts)
        self.loss = loss or SoftmaxLoss()
        self.with_scale = with_scale
        self._scale, self._bias = scale, bias

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The two weight matrices inside a flat vector."""
        image, text = self.shapes
        cut = image.numel()
        return theta[:cut].view(image), theta[cut : cut + text.numel()].view(text)

    def inputs(self, batch: Batch) -> Batch:
        """What of a batch the heads multiply: its features without their offsets, ``(n, w)`` each."""
        image, text = self.split(self.start)
        return head_inputs(batch[0], image), head_inputs(batch[1], text)

    def scale(self, theta: Tensor) -> Tensor | float:
        """``exp(logit_scale)``."""
        return theta[-1].exp() if self.with_scale else self._scale

    @override
    def logit_parameters(self, theta: Tensor) -> list[int]:
        return [len(theta) - 1] if self.with_scale else []

    @override
    def embed_images(self, theta: Tensor, images: Tensor) -> Tensor:
        return head_outputs(images, self.split(theta)[0])

    @override
    def embed_captions(self, theta: Tensor, captions: Tensor) -> Tensor:
        return head_outputs(captions, self.split(theta)[1])

    def similarity_and_tangent(self, theta: Tensor, batch: Batch, direction: Tensor) -> tuple[Tensor, Tensor]:
        """As for any scope. Embeddings are linear in the heads, so they move by what ``direction`` embeds."""
        embeddings, moves = self.embed(theta, batch), self.embed(direction, self.inputs(batch))
        value, tangent = jvp(self.compare, (theta, *embeddings), (direction, *moves))[:2]
        return value, tangent

    @override
    def logits(self, theta: Tensor, cosine: Tensor) -> Tensor:
        return self.scale(theta) * cosine + self._bias


class FeatureBatches(Sequence[Batch]):
    """Batches of cached features, in float64, read when they are asked for.

    Args:
        images: image features, shape ``(N, w_image)``, followed by their offset if there is one; in memory or not.
        texts: caption features, shape ``(N, w_text)``, likewise.
        partition: the row indices of each batch.
    """

    def __init__(self, images: Tensor | DiskMatrix, texts: Tensor | DiskMatrix, partition: Sequence[Tensor]) -> None:
        self.images, self.texts, self.partition = images, texts, partition

    def regrouped(self, partition: Sequence[Tensor]) -> FeatureBatches:
        """The same pairs in other batches."""
        return FeatureBatches(self.images, self.texts, partition)

    def __len__(self) -> int:
        return len(self.partition)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        rows = self.partition[index]
        return self.images[rows].double(), self.texts[rows].double()

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))
