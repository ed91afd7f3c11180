"""The towers of an open_clip model as functions of their parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fiftyone_ecif.models.last_block import last_of_image, last_of_text
from fiftyone_ecif.models.replaced import replaced


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention that forward-mode differentiation can follow; torch's fused kernels have no such rule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class Tower(nn.Module):
    """One tower of a model as a module, so that ``functional_call`` can replace its parameters.

    Tokens may be fewer than the context of a text tower with a :func:`causal_mask`. Of the last block no more is
    computed than is read.

    Args:
        model: an open_clip model.
        tower: ``"image"`` or ``"text"``.
    """

    def __init__(self, model: Any, tower: str) -> None:
        super().__init__()
        self.model: Any = model
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings before normalisation, shape ``(n, d)``, of images ``(n, 3, h, w)`` or tokens ``(n, t)``."""
        if self.tower == "image":
            visual = replaced(self.model.visual, last_of_image(self.model.visual, inputs))
            return cast(Tensor, replaced(self.model, {"visual": visual}).encode_image(inputs, normalize=False))
        text, mask, length = _text_tower(self.model), causal_mask(self.model), inputs.shape[1]
        parts = last_of_text(text, inputs)
        if mask is not None and length < len(mask):
            parts |= {"positional_embedding": text.positional_embedding[:length], "attn_mask": mask[:length, :length]}
        model = replaced(text, parts)
        if text is not self.model:
            model = replaced(self.model, {"text": model})
        return cast(Tensor, model.encode_text(inputs, normalize=False))


def causal_mask(model: Any) -> Tensor | None:
    """The mask of a text tower whose tokens see only those before them, one for each place of the context, or None."""
    text = _text_tower(model)
    mask: Tensor | None = getattr(text, "attn_mask", None)
    places = getattr(text, "positional_embedding", ())
    return mask if mask is not None and len(mask) == len(places) == text.context_length else None


def _text_tower(model: Any) -> Any:
    return getattr(model, "text", model)
