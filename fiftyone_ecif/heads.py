"""The head scope: both final projections of a CLIP model, on cached features.

A head maps the features in front of the final projection, ``x`` of shape
``(n, w)``, to an embedding ``x @ weight + bias`` of shape ``(n, d)``. Everything
before it is frozen, so the features are computed once and every loss, gradient
and Hessian product afterwards is a few matrix products in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

Batch = tuple[Tensor, Tensor]


class HeadScope:
    """The parameters of both heads as one flat vector.

    Args:
        image_head: shape ``(w_image, d)``; a bias is its last row, and the
            image features then end in a one.
        text_head: shape ``(w_text, d)``, likewise.
        scale: ``exp(logit_scale)``, the inverse temperature; held fixed.

    Attributes:
        start: the given weights, flat, shape ``(p,)``.
    """

    def __init__(self, image_head: Tensor, text_head: Tensor, scale: float) -> None:
        self.shapes = (image_head.shape, text_head.shape)
        self.start = torch.cat([image_head.flatten(), text_head.flatten()]).double()
        self.scale = scale

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The two weight matrices inside a flat vector."""
        image, text = self.shapes
        return theta[: image.numel()].view(image), theta[image.numel() :].view(text)

    def similarity(self, theta: Tensor, batch: Batch) -> Tensor:
        """Scaled cosine similarities of a batch of features, shape ``(n, n)``."""
        image_head, text_head = self.split(theta)
        images, texts = batch
        return self.scale * normalize(images @ image_head, dim=1) @ normalize(texts @ text_head, dim=1).T

    def embedding_norms(self, theta: Tensor, batch: Batch) -> Tensor:
        """Lengths of the image and the caption embeddings before normalisation, shape ``(n, 2)``."""
        return torch.stack(
            [(features @ head).norm(dim=1) for features, head in zip(batch, self.split(theta), strict=True)], dim=1
        )


class FeatureBatches(Sequence[Batch]):
    """Batches of cached features, cut from the whole when they are asked for.

    Args:
        images: image features, shape ``(N, w_image)``.
        texts: caption features, shape ``(N, w_text)``.
        partition: the row indices of each batch.
    """

    def __init__(self, images: Tensor, texts: Tensor, partition: Sequence[Tensor]) -> None:
        self.images, self.texts, self.partition = images, texts, partition

    def __len__(self) -> int:
        return len(self.partition)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        rows = self.partition[index]
        return self.images[rows].double(), self.texts[rows].double()

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))
