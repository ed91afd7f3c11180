"""The last block of an open_clip transformer, computed for what is read of it: one token of each input.

The other tokens have a part in that one by what attention takes from them. So
they have keys and values, and no queries, no MLP and no output.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip import CLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn


class LastBlock(nn.Module):
    """A block that gives one token of each input.

    Args:
        block: of open_clip.
        places: of these tokens, shape ``(n,)``.
    """

    def __init__(self, block: ResidualAttentionBlock, places: Tensor) -> None:
        super().__init__()
        self.block: Any = block
        self.places = places

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Shape ``(n, 1, w)``.

        Args:
            tokens: shape ``(n, t, w)``.
            attn_mask (None): what is added to the scores of attention, shape ``(t, t)``.
        """
        block, normed = self.block, self.block.ln_1(tokens)
        if attn_mask is not None:  # a row for each head of each input
            attn_mask = attn_mask[self.places].repeat_interleave(block.attn.num_heads, 0)[:, None]
        read = self._read(tokens) + block.ls_1(block.attention(self._read(normed), normed, normed, attn_mask))
        found: Tensor = read + block.ls_2(block.mlp(block.ln_2(read)))
        return found

    def get_weight_dtype(self) -> torch.dtype:
        """As that of the block, which a transformer asks its first one for."""
        found: torch.dtype = self.block.get_weight_dtype()
        return found

    def _read(self, tokens: Tensor) -> Tensor:
        return tokens.gather(1, self.places[:, None, None].expand(-1, 1, tokens.shape[2]))


def last_of_image(visual: nn.Module, images: Tensor) -> dict[str, Any]:
    """What to replace in an image tower, by name; nothing where it is not known to read one token.

    Args:
        visual: the tower.
        images: that it is to take, ``n`` of them.
    """
    if not isinstance(visual, VisionTransformer) or visual.output_tokens:
        return {}
    if visual.attn_pool is not None or visual.pool_type != "tok":
        return {}
    return _last(visual, torch.zeros(len(images), dtype=torch.int64, device=images.device))


def last_of_text(text: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """What to replace in a text tower, likewise: the token that there is then is the one to pool.

    Args:
        text: the tower, or a model whose parts it is.
        tokens: that it is to take, shape ``(n, t)``.
    """
    if isinstance(text, CLIP):
        pool, end = "text_pool_type", "text_eos_id"
    elif isinstance(text, TextTransformer) and text.cls_emb is None and not (text.use_pad_mask or text.output_tokens):
        pool, end = "pool_type", "eos_id"
    else:
        return {}
    kind = getattr(text, pool)
    if kind == "argmax":
        places = tokens.argmax(1)
    elif kind == "eos":
        places = (tokens == getattr(text, end)).int().argmax(1)
    elif kind in {"first", "last"}:
        places = torch.full_like(tokens[:, 0], 0 if kind == "first" else tokens.shape[1] - 1)
    else:
        return {}
    changed = _last(text, places)
    return changed | {pool: "first"} if changed else {}


def _last(tower: Any, places: Tensor) -> dict[str, Any]:
    """The last block of a tower by its name, if it is one that is known."""
    name = f"transformer.resblocks.{len(tower.transformer.resblocks) - 1}"
    block = tower.get_submodule(name)
    known = type(block) is ResidualAttentionBlock and tower.transformer.batch_first
    return {name: LastBlock(block, places)} if known else {}
