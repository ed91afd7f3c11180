"""What layers of a tower do with a batch, seen: their inputs, and in a backward pass the gradients of their outputs.

The gradient of a layer's weight is a product of the two. So a backward pass of
the activations alone gives it for each sample of the batch apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from fiftyone_ecif.models.attention import attention, is_plain

_NEAR, _FAR = 1e-3, 1e-2  # relative distance of the same numbers but for rounding, and of others


class LayerCall(NamedTuple):
    """A layer's work on a batch.

    Attributes:
        normalises: whether it is a layer norm; a linear layer otherwise.
        inputs: what is multiplied with the weight, shape ``(..., w)``.
        outputs: shape ``(..., m)``.
        versions: of the memory of both, when they were seen.
        names: of weight and bias, None for what is not looked for.
    """

    normalises: bool
    inputs: Tensor
    outputs: Tensor
    versions: tuple[int, int]
    names: tuple[str | None, str | None]

    @property
    def overwritten(self) -> bool:
        """Whether the inputs or outputs are not what they were."""
        return (self.inputs._version, self.outputs._version) != self.versions


class LayerCalls(TorchFunctionMode):
    """Entered, it sees linear layers and layer norms that use some weights.

    The derivative of a GELU is kept, as many backward passes go through it.

    Args:
        weights: by name, as the model is given them.

    Attributes:
        calls: in their order.
        elsewhere: names of the weights that were used in other ways.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(value): name for name, value in weights.items()}
        self.calls: list[LayerCall] = []
        self.elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes what was called."""
        kwargs = kwargs or {}
        if func is linear:
            return self._linear(*args, **kwargs)
        if func is layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is multi_head_attention_forward and is_plain(args, kwargs):
            self.elsewhere.update(self._used(kwargs.get("attn_mask")))
            return attention(args, kwargs, self._linear, partial(torch.softmax, dim=-1))
        if func is gelu:
            return self._gelu(*args, **kwargs)
        found = func(*args, **kwargs)
        if isinstance(found, Tensor | tuple | list):  # not its precision or its device
            self.elsewhere.update(self._used((args, tuple(kwargs.values()))))
        return found

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.elsewhere.update(self._used(input))
        return self._keep(False, input, linear(input, weight, bias), weight, bias)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        self.elsewhere.update(self._used(input))
        output = layer_norm(input, normalized_shape, weight, bias, eps)
        if len(normalized_shape) != 1:
            self.elsewhere.update(self._used((weight, bias)))
            return output
        if not list(self._used((weight, bias))):
            return output
        with torch.no_grad():
            normal = layer_norm(input, normalized_shape, eps=eps)
        return self._keep(True, normal, output, weight, bias)

    def _gelu(self, input: Tensor, approximate: str = "none") -> Tensor:
        self.elsewhere.update(self._used(input))
        function = partial(gelu, approximate=approximate)
        if not (input.requires_grad and torch.is_grad_enabled()):
            return function(input)
        return cast(Tensor, _OneSlope.apply(function, input))

    def _keep(
        self, normalises: bool, inputs: Tensor, output: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        names = self._names.get(id(weight)), self._names.get(id(bias))
        if names == (None, None):
            return output
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output + output.new_zeros(()).requires_grad_()  # so that what is behind it can be differentiated
        inputs = inputs.detach()
        self.calls.append(LayerCall(normalises, inputs, output, (inputs._version, output._version), names))
        return output

    def _used(self, value: Any) -> Iterator[str]:
        if isinstance(value, tuple | list):
            for one in value:
                yield from self._used(one)
        elif id(value) in self._names:
            yield self._names[id(value)]


class _OneSlope(torch.autograd.Function):
    """A function of each number apart, whose derivative is computed once and serves all backward passes."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of the shape of ``x``."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            y = function(at)
            (slope,) = torch.autograd.grad(y, at, torch.ones_like(y))
        ctx.save_for_backward(slope)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:
        """The gradient of ``x``."""
        return None, slope * ctx.saved_tensors[0]


class _Layer(NamedTuple):
    """A call with all that is the same in every backward pass.

    Attributes:
        call: as it was seen.
        place: the dimension of its input that has the samples.
        minor: whether the sample changes fastest in it.
        inputs: by sample, ``(n, t, w)``.
        narrow: the inputs after ``A`` of an adapter on the weight, ``(n, r, t)``; None without one.
        b: ``B`` of that adapter, transposed.
    """

    call: LayerCall
    place: int
    minor: bool
    inputs: Tensor
    narrow: Tensor | None = None
    b: Tensor | None = None


class SampleLayers:
    """A tower's forward pass, and the gradients of its weights for each sample apart.

    Args:
        run: the tower, which computes the embedding of each sample from that sample alone.
        inputs: of ``n`` samples, indexed by them.
        weights: by name, as ``run`` uses them.
        adapters: ``{name: (A, B)}`` of the weights that vary through those, whose gradients are then given.

    Attributes:
        embeddings: what came out, shape ``(n, d)``.
        names: of the weights whose gradients can be had, because all that is done with them was seen.
    """

    def __init__(
        self,
        run: Callable[[Any], Tensor],
        inputs: Any,
        weights: Mapping[str, Tensor],
        adapters: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        with torch.no_grad(), LayerCalls(weights) as alone:
            run(inputs[:1])
        with torch.enable_grad(), LayerCalls(weights) as seen:
            self._embeddings = run(inputs)
        self.embeddings = self._embeddings.detach()
        self._count = len(inputs)
        self._layers: list[_Layer] = []
        used = {name for call in seen.calls for name in call.names if name}
        hidden = alone.elsewhere | seen.elsewhere
        if [call.names for call in alone.calls] != [call.names for call in seen.calls]:
            hidden = used
        for one, call in zip(alone.calls, seen.calls, strict=False):
            layout = _sample_places(one.inputs, call.inputs, self._count)
            if layout is None or call.overwritten:
                hidden.update(filter(None, call.names))
                continue
            layer = _Layer(call, *layout, _by_sample(call.inputs, self._count, *layout))
            if call.names[0] in adapters:
                a, b = adapters[call.names[0]]
                layer = layer._replace(narrow=linear(layer.inputs, a).mT, b=b.T.contiguous())
            self._layers.append(layer)
        self.names = used - hidden

    def gradients(self, directions: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the embeddings along a direction of each one's own; a weight used twice comes twice.

        Args:
            directions: shape ``(n, d)``.

        Yields:
            the name of a weight and its gradient of each sample, ``(n, size)``
        """
        outputs = [layer.call.outputs for layer in self._layers]
        found = torch.autograd.grad(self._embeddings, outputs, directions, retain_graph=True, allow_unused=True)
        for layer, whole in zip(self._layers, found, strict=True):
            if whole is None:  # the embeddings do not depend on it
                continue
            slopes = self._by_sample(whole, layer)
            weight, bias = (name if name in self.names else None for name in layer.call.names)
            if bias is not None:
                yield bias, slopes.sum(1)
            if weight is None:
                continue
            if layer.call.normalises:
                yield weight, (layer.inputs * slopes).sum(1)
            elif layer.narrow is not None and layer.b is not None:
                # products in the order and layout in which narrow matrices are multiplied fast
                of_a = self._by_sample(linear(whole, layer.b), layer).mT @ layer.inputs
                of_b = (layer.narrow @ slopes).mT
                yield weight, torch.cat([part.flatten(1) for part in (of_a, of_b)], 1)
            else:
                yield weight, (slopes.mT @ layer.inputs).flatten(1)

    def _by_sample(self, tensor: Tensor, layer: _Layer) -> Tensor:
        return _by_sample(tensor, self._count, layer.place, layer.minor)


def _sample_places(alone: Tensor, batch: Tensor, count: int) -> tuple[int, bool] | None:
    """Where the samples of a batch are in a layer's input, or None if that cannot be told.

    Args:
        alone: what enters the layer with the first sample only.
        batch: with all.
        count: how many these are.

    Returns:
        the dimension, and whether the sample changes fastest in it
    """
    if count == 1:
        return 0, False
    if alone.ndim != batch.ndim:
        return None
    places = [place for place in range(batch.ndim - 1) if alone.shape[place] != batch.shape[place]]
    if len(places) != 1 or batch.shape[places[0]] != count * alone.shape[places[0]]:
        return None
    (place,) = places
    if alone.shape[place] == 1:
        return place, False
    distances = []
    for minor in (False, True):
        first = _split(batch, count, place, minor).select(place + minor, 0)
        distances.append(((first - alone).norm() / alone.norm()).item())
    near, far = min(distances), max(distances)
    return (place, distances[1] < distances[0]) if near < _NEAR and far > _FAR else None


def _split(tensor: Tensor, count: int, place: int, minor: bool) -> Tensor:
    shape = tensor.shape
    return tensor.view(*shape[:place], *((-1, count) if minor else (count, -1)), *shape[place + 1 :])


def _by_sample(tensor: Tensor, count: int, place: int, minor: bool) -> Tensor:
    """Shape ``(n, t, w)``."""
    apart = _split(tensor, count, place, minor).movedim(place + minor, 0)
    return apart.reshape(count, -1, tensor.shape[-1])
