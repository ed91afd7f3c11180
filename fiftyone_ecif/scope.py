"""The parameters that are attributed, and the similarity matrix as a function of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from .contrastive import BatchLoss
from .errors import EcifError

DEFAULT_RANK = 4


@dataclass(frozen=True)
class ScopeChoice:
    """What a user's ``scope=`` means.

    Attributes:
        text: as given.
        heads: whether both final projections are meant.
        with_scale: whether ``logit_scale`` is attributed with them.
        rank: of low-rank adapters on the attention and MLP weights, if those are meant.
        blocks: only the last so many blocks of both towers.
        pattern: a regular expression that parameter names are searched for.
    """

    text: str
    heads: bool = False
    with_scale: bool = False
    rank: int | None = None
    blocks: int | None = None
    pattern: str | None = None


def parse_scope(text: str) -> ScopeChoice:
    """Reads ``heads``, ``heads+logit_scale``, ``lora[:RANK[:BLOCKS]]``, ``blocks:K`` or a regular expression.

    Raises:
        EcifError: if it is none of these
    """
    if text in ("heads", "heads+logit_scale"):
        return ScopeChoice(text, heads=True, with_scale=text != "heads")
    if found := re.fullmatch(r"lora(?::([1-9]\d*))?(?::([1-9]\d*))?", text):
        return ScopeChoice(text, rank=int(found[1] or DEFAULT_RANK), blocks=int(found[2]) if found[2] else None)
    if found := re.fullmatch(r"blocks:([1-9]\d*)", text):
        return ScopeChoice(text, blocks=int(found[1]))
    try:
        re.compile(text)
    except re.error as error:
        raise EcifError(f"scope={text!r} is no regular expression ({error}). Use heads, lora or blocks:1") from error
    if not text or re.fullmatch(r"(lora|blocks|heads)\W.*|blocks", text):
        raise EcifError(f"scope={text!r} is not known. Use heads, heads+logit_scale, lora:4, lora:4:2, blocks:1 ...")
    return ScopeChoice(text, pattern=text)


class Scope(ABC):
    """Some of a model's parameters as one flat vector; the rest is held fixed.

    A batch is a tuple of what the image tower and what the text tower take.

    Attributes:
        start: the parameters as loaded, shape ``(p,)``.
        loss: the loss that the model is trained with.
    """

    start: Tensor
    loss: BatchLoss

    @abstractmethod
    def embed_images(self, theta: Tensor, images: Any) -> Tensor:
        """Image embeddings before normalisation, shape ``(n, d)``."""

    @abstractmethod
    def embed_captions(self, theta: Tensor, captions: Any) -> Tensor:
        """Caption embeddings before normalisation, shape ``(n, d)``."""

    @abstractmethod
    def logits(self, theta: Tensor, cosine: Tensor) -> Tensor:
        """Scaled (and, for a sigmoid loss, shifted) cosine similarities."""

    def similarity(self, theta: Tensor, batch: Any) -> Tensor:
        """``S`` of a batch under the parameters ``theta``, shape ``(n, n)``."""
        return self.logits(theta, self.cosines(theta, batch))

    def cosines(self, theta: Tensor, batch: Any) -> Tensor:
        """Cosine similarities of a batch, images as rows, shape ``(n, n)``."""
        images, captions = batch
        return (
            normalize(self.embed_images(theta, images), dim=1)
            @ normalize(self.embed_captions(theta, captions), dim=1).T
        )
