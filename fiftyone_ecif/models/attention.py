"""torch's multi-head attention spelled out, so that the layers in it are seen, each with its weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: As ``torch.nn.functional.linear``.
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_POSITIONAL = 13  # arguments of attention that torch gives without a name


def is_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``multi_head_attention_forward`` is asked for what most towers do: no more than a mask.

    It is of shape ``(t, t)``, or ``(n * heads, t, t)``.
    """
    if len(args) != _POSITIONAL or args[0].ndim != 3:
        return False
    bias_k, _, add_zero = args[7:10]
    mask = kwargs.get("attn_mask")
    asked = (kwargs.get("need_weights", True), kwargs.get("key_padding_mask") is not None, kwargs.get("training", True))
    odd = bias_k is not None or add_zero or any(asked) or kwargs.get("static_k") is not None
    return not odd and (mask is None or mask.ndim in {2, 3})


def attention(
    args: Sequence[Any], kwargs: Mapping[str, Any], linear: Linear, softmax: Callable[[Tensor], Tensor]
) -> tuple[Tensor, None]:
    """What ``multi_head_attention_forward`` makes of sequences ``(t, n, w)`` where it is plain.

    Args:
        args: that torch's function is given without a name.
        kwargs: that it is given by name.
        linear: what computes the layers.
        softmax: over the last dimension.

    Returns:
        sequences, shape ``(t, n, w)``, and no weights
    """
    query, key, value, _, heads, weight, bias, *_, out_weight, out_bias = args
    inputs = [each.transpose(0, 1) for each in (query, key, value)]
    if kwargs.get("use_separate_proj_weight"):
        weights = [kwargs[f"{name}_proj_weight"] for name in "qkv"]
        biases = [None] * 3 if bias is None else bias.chunk(3)
        parts = [linear(*each) for each in zip(inputs, weights, biases, strict=True)]
    elif key is value:
        parts = list(linear(inputs[1], weight, bias).chunk(3, -1))
        if query is not key:
            parts[0] = linear(inputs[0], weight, bias).chunk(3, -1)[0]
    else:
        parts = [linear(each, weight, bias).chunk(3, -1)[place] for place, each in enumerate(inputs)]
    q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in parts)
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, heads))
    mixed = mix(q, k, v, softmax=softmax, mask=mask)
    return linear(mixed.transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1), None


def mix(q: Tensor, k: Tensor, v: Tensor, *, softmax: Callable[[Tensor], Tensor], mask: Tensor | None = None) -> Tensor:
    """Attention of heads ``(..., t, d)``; what a mask of bools holds is left out."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return softmax(scores) @ v
