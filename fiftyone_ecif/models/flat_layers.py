"""The layers of a tower as forward-mode differentiation does them fastest.

With a derivative, a linear layer on inputs of three dimensions becomes a batched
product with an expanded weight, and one whose weight has a derivative too takes
three products in place of one. An adapter beside a weight that stays as it is,
``W x + B (A x)``, takes two, and small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fiftyone_ecif.models.tangents import LayerNorm, Linear, Softmax

_POSITIONAL = 13  # arguments of attention that torch gives without a name


class _Adapted(NamedTuple):
    """A weight of ``m`` rows, and the adapter on it: ``(r, n)`` and ``(m, r)``."""

    name: str
    weight: Tensor
    a: Tensor
    b: Tensor


class FlatLayers(TorchFunctionMode):
    """What is computed within has linear layers on matrices, and adapters beside their weight.

    torch's own attention is spelled out, so that its projections are seen. A
    weight with an adapter that is used in another way, such as in a
    convolution, is the sum of both there.

    Args:
        weights: without their adapters, by name, as the model is given them.
        adapters: ``{name: (A, B)}`` of those that have one.

    Attributes:
        unused: names of adapters whose weight has not been used yet.
    """

    def __init__(self, weights: Mapping[str, Tensor], adapters: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._adapted = {id(weights[name]): _Adapted(name, weights[name], *pair) for name, pair in adapters.items()}
        self.unused = set(adapters)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes what was called, or the same in another way."""
        kwargs = kwargs or {}
        if func is linear:
            return self._linear(*args, **kwargs)
        if func is multi_head_attention_forward and _is_plain(args, kwargs):
            return self._attention(args, kwargs)
        if func is scaled_dot_product_attention and len(args) == 3 and not any(kwargs.values()):
            return _mix(*args)
        if func is layer_norm:
            return _normed(*args, **kwargs)
        if not self._has_adapted(args, kwargs):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") == "__get__":  # shape and precision are the weight's, not so what transposes
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):
                return found
        return func(*self._merged(args), **{name: self._merged(value) for name, value in kwargs.items()})

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Of inputs ``(..., n)``, shape ``(..., m)``."""
        adapted, a, b = self._adapted.get(id(weight)), None, None
        if adapted is not None:
            self.unused.discard(adapted.name)
            a, b = adapted.a, adapted.b
        rows = Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias, a, b)
        return cast(Tensor, rows.reshape(*input.shape[:-1], rows.shape[-1]))

    def _attention(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, None]:
        """What ``multi_head_attention_forward`` makes of sequences ``(t, n, w)``."""
        query, key, value, _, heads, weight, bias, *_, out_weight, out_bias = args
        inputs = [each.transpose(0, 1) for each in (query, key, value)]
        if kwargs.get("use_separate_proj_weight"):
            weights = [kwargs[f"{name}_proj_weight"] for name in "qkv"]
            biases = [None] * 3 if bias is None else bias.chunk(3)
            parts = [self._linear(*each) for each in zip(inputs, weights, biases, strict=True)]
        elif query is key is value:
            parts = list(self._linear(inputs[0], weight, bias).chunk(3, -1))
        else:
            parts = [self._linear(each, weight, bias).chunk(3, -1)[place] for place, each in enumerate(inputs)]
        q, k, v = (part.view(*part.shape[:2], heads, -1).transpose(1, 2) for part in parts)
        mixed = _mix(q, k, v, kwargs.get("attn_mask"))
        return self._linear(mixed.transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1), None

    def _has_adapted(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        values = (*args, *kwargs.values()) if self._adapted else ()
        return any(
            id(one) in self._adapted
            for value in values
            for one in (value if isinstance(value, tuple | list) else (value,))
        )

    def _merged(self, value: Any) -> Any:
        """A value with the adapters added to the weights in it."""
        if isinstance(value, tuple | list):
            return type(value)(self._merged(one) for one in value)
        adapted = self._adapted.get(id(value))
        if adapted is None:
            return value
        self.unused.discard(adapted.name)
        return merge(adapted.weight, adapted.a, adapted.b)


def merge(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``W + B A``, of the shape of the weight."""
    return weight + (b @ a).view_as(weight)


def _normed(
    input: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As torch's function ``layer_norm``."""
    normed: Tensor = LayerNorm.apply(input, list(shape), weight, bias, eps)
    return normed


def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of heads ``(..., t, d)``; what a mask of bools holds is left out."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    mixed: Tensor = Softmax.apply(scores) @ v
    return mixed


def _is_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether torch's attention is asked for what most towers do: no more than a mask of ``(t, t)``."""
    if len(args) != _POSITIONAL or args[0].ndim != 3:
        return False
    bias_k, _, add_zero = args[7:10]
    mask = kwargs.get("attn_mask")
    asked = (kwargs.get("need_weights", True), kwargs.get("key_padding_mask") is not None, kwargs.get("training", True))
    odd = bias_k is not None or add_zero or any(asked) or kwargs.get("static_k") is not None
    return not odd and (mask is None or mask.ndim == 2)
