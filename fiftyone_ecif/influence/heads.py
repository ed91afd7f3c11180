"""The head scope: both final projections of a CLIP model, on cached features.

A head maps the features in front of the final projection, ``x`` of shape
``(n, w)``, to an embedding ``x @ weight + bias`` of shape ``(n, d)``. Everything
before it is frozen, so the features are computed once and every loss, gradient
and Hessian product afterwards is a few matrix products, in float64 where that
is not slow.

A tower may add something to its last projection, as one that ends in
``y + mlp(y)`` does. That is frozen as well: the features are then followed by
this offset, ``d`` more columns, and the embedding is ``offset + x @ weight + bias``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.linalg import vecdot
from typing_extensions import override

from fiftyone_ecif.devices import ON_CPU, Placement
from fiftyone_ecif.influence.head_point import HeadPoint, Heads, Pull
from fiftyone_ecif.influence.losses import BatchLoss, SoftmaxLoss, others_equal
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.store.disk_matrix import DiskMatrix

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
_AT_ONCE = 2**16  # rows that are copied to a device
_COARSELY = 16  # stacks that are added up in their own precision
_GRADIENTS = 16  # of all parameters each, at a time


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
        placement (ON_CPU): where the parameters are, and in which precision.

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
        placement: Placement = ON_CPU,
    ) -> None:
        self.shapes = (image_head.shape, text_head.shape)
        parts = [image_head.flatten().double(), text_head.flatten().double()]
        if with_scale:
            parts.append(torch.tensor([math.log(scale)], dtype=torch.float64))
        self.start = torch.cat([part.cpu() for part in parts]).to(placement.device, placement.dtype)
        self.loss = loss or SoftmaxLoss()
        self.with_scale = with_scale
        self._scale, self._bias = scale, bias

    def at(self, theta: Tensor) -> Heads:
        """Both heads and the temperature inside a flat vector, which may be a direction."""
        return Heads(*self.split(theta), theta[-1] if self.with_scale else None)

    def point(self, theta: Tensor, batch: Batch) -> HeadPoint:
        """A batch, or a stack of batches, seen from ``theta``, in the same precision."""
        return HeadPoint(self.loss_of(batch), self.embed(theta, batch), self.scale(theta), self._bias)

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The two weight matrices inside a flat vector."""
        image, text = self.shapes
        cut = image.numel()
        return theta[:cut].view(image), theta[cut : cut + text.numel()].view(text)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What of a batch the heads multiply: its features without their offsets, ``(n, w)`` each."""
        image, text = self.split(self.start)
        return head_inputs(batch[0], image), head_inputs(batch[1], text)

    def squared(self, batch: Batch, pull: Pull) -> Tensor:
        """The squared norms of the gradients of the heads, added up over the batches of a stack, a scalar.

        Args:
            batch: the features, ``(b, n, w_image)`` and ``(b, n, w_text)``.
            pull: of each batch at its embeddings.
        """
        total = pull.image.new_zeros(())
        for features, part in zip(self.inputs(batch), pull[:2], strict=True):
            for start in range(0, len(part), _GRADIENTS):
                some = slice(start, start + _GRADIENTS)
                total = total + (features[some].mT @ part[some]).square().sum()
        return total if pull.log_scale is None else total + pull.log_scale.square().sum()

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
        embeddings = self.embed(theta, batch)
        lengths = [side.norm(dim=-1, keepdim=True) for side in embeddings]
        u, v = (side / length for side, length in zip(embeddings, lengths, strict=True))
        cosine = u @ v.mT
        along = self.at(direction)
        steps = [
            (features @ head).div_(length)
            for features, head, length in zip(self.inputs(batch), along[:2], lengths, strict=True)
        ]
        grows = [vecdot(step, unit)[..., None] for step, unit in zip(steps, (u, v), strict=True)]
        tangent = steps[0] @ v.mT + u @ steps[1].mT
        tangent.addcmul_(grows[0] + grows[1].mT, cosine, value=-1)
        if along.log_scale is not None:
            tangent.addcmul_(along.log_scale, cosine)
        return self.logits(theta, cosine), self.scale(theta) * tangent

    @override
    def logits(self, theta: Tensor, cosine: Tensor) -> Tensor:
        return self.scale(theta) * cosine + self._bias


class HeadSum:
    """A sum over batches of what they pull at the heads.

    A few are added up in their own precision, all of them in that of the total.

    Args:
        scope: the heads.
        like: a vector of its parameters, shape ``(p,)``, in the precision of the total.
    """

    def __init__(self, scope: HeadScope, like: Tensor) -> None:
        self._scope, self._total = scope, torch.zeros_like(like)
        self._few, self._added = self._total, 0

    def add(self, batch: Batch, pull: Pull) -> None:
        """Adds what a batch, or a stack of batches, pulls.

        Args:
            batch: its features, ``(..., n, w_image)`` and ``(..., n, w_text)``.
            pull: at its embeddings.
        """
        if pull.image.dtype != self._few.dtype:
            self._few = torch.zeros_like(self._total, dtype=pull.image.dtype)
        into = self._scope.at(self._few)
        for head, features, part in zip(into[:2], self._scope.inputs(batch), pull[:2], strict=True):
            head.addmm_(features.flatten(0, -2).T, part.flatten(0, -2))
        if into.log_scale is not None and pull.log_scale is not None:
            into.log_scale.add_(pull.log_scale.sum())
        self._added += 1
        if self._added % _COARSELY == 0:
            self._settle()

    def total(self) -> Tensor:
        """Of what was added, flat, shape ``(p,)``."""
        self._settle()
        return self._total

    def _settle(self) -> None:
        if self._few is not self._total:
            self._total += self._few
            self._few.zero_()


class FeatureBatches(Sequence[Batch]):
    """Batches of cached features, read when they are asked for.

    Several batches of one size are also given as a stack, which has a dimension
    before the others: one large product instead of many small ones.

    Args:
        images: image features, shape ``(N, w_image)``, followed by their offset if there is one; on the disk, in memory
            or on the device.
        texts: caption features, shape ``(N, w_text)``, likewise.
        partition: the row indices of each batch.
        placement (ON_CPU): where batches are given, and in which precision.
        twins (None): by which equal pairs are told (``losses.equal_pairs``), which are not each other's negatives then.
    """

    def __init__(
        self,
        images: Tensor | DiskMatrix,
        texts: Tensor | DiskMatrix,
        partition: Sequence[Tensor],
        placement: Placement = ON_CPU,
        twins: Tensor | None = None,
    ) -> None:
        self.images, self.texts, self.partition = images, texts, partition
        self.placement, self.twins = placement, twins

    def regrouped(self, partition: Sequence[Tensor]) -> FeatureBatches:
        """The same pairs in other batches."""
        return FeatureBatches(self.images, self.texts, partition, self.placement, self.twins)

    def coarse(self) -> FeatureBatches:
        """The same batches as :attr:`Placement.coarse`."""
        return FeatureBatches(self.images, self.texts, self.partition, self.placement.coarse, self.twins)

    def stacks(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of batches, those that are given as one stack together: of one size, as many as suit."""
        by_size: dict[int, list[int]] = {}
        for number in numbers:
            by_size.setdefault(len(self.partition[number]), []).append(number)
        found = []
        for size, alike in by_size.items():
            most = max(1, self.placement.stacked // size**2)
            found += [alike[start : start + most] for start in range(0, len(alike), most)]
        return found

    def rows(self, stack: Sequence[int]) -> Tensor:
        """The row indices of a stack, shape ``(b, n)``."""
        return torch.stack([self.partition[number] for number in stack])

    def each(self, stacks: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """The features of each stack, ``(b, n, w_image)`` and ``(b, n, w_text)``; the next is read meanwhile."""
        if isinstance(self.images, Tensor) and isinstance(self.texts, Tensor):
            yield from map(self._read, map(self.rows, stacks))
            return
        with ThreadPoolExecutor(1) as pool:
            ahead: deque[Future[Batch]] = deque()
            for stack in stacks:
                ahead.append(pool.submit(self._read, self.rows(stack)))
                if len(ahead) > 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def __len__(self) -> int:
        return len(self.partition)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._read(self.partition[index])

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def _read(self, rows: Tensor) -> Batch:
        """Features of some rows, ``(..., w)``, and which of these are equal."""
        images, texts = (self._placed(side, rows) for side in (self.images, self.texts))
        if self.twins is None:
            return images, texts
        return images, texts, others_equal(self.twins, rows).to(images.device)

    def _placed(self, side: Tensor | DiskMatrix, rows: Tensor) -> Tensor:
        if isinstance(side, Tensor):
            return side[rows.to(side.device)].to(self.placement.device, self.placement.dtype)
        found = side[rows.flatten()].view(*rows.shape, -1)
        if self.placement.device.startswith("cuda"):
            found = found.pin_memory()
        return found.to(self.placement.device, non_blocking=True).to(self.placement.dtype)


def resident(features: DiskMatrix, placement: Placement) -> Tensor | DiskMatrix:
    """Features, ``(N, w)``, in float32 on the device that they are computed with if there is room; else as they are."""
    if torch.device(placement.device).type == "cpu" or features.nbytes > placement.room:
        return features
    return torch.cat(
        [features[start : start + _AT_ONCE].to(placement.device) for start in range(0, len(features), _AT_ONCE)]
    )
