"""The layers of a tower as forward-mode differentiation does them fastest.

With a derivative, a linear layer on inputs of three dimensions becomes a batched
product with an expanded weight, and one whose weight has a derivative too takes
three products in place of one. An adapter beside a weight that stays as it is,
``W x + B (A x)``, takes two, and small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.nn.functional import layer_norm, linear, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fiftyone_ecif.models.attention import attention, is_plain, mix
from fiftyone_ecif.models.tangents import LayerNorm, Linear, Softmax


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
        if func is multi_head_attention_forward and is_plain(args, kwargs):
            return attention(args, kwargs, self._linear, Softmax.apply)
        if func is scaled_dot_product_attention and len(args) == 3 and not any(kwargs.values()):
            return mix(*args, softmax=Softmax.apply)
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
