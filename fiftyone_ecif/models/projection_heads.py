"""The linear maps that towers end in: found by trying, not by their names.

A tower ends in the weight ``W`` if its embedding is ``offset + features @ W + b``
with features and offset that do not depend on ``W``. Then the gradient of
``embedding . c`` with respect to ``W`` is the outer product of the features with
``c``, for any ``c``: one backward pass tells which weights may be the last, and
another ``W`` tells whether one is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

_CLOSE = 1e-2  # relative; a GPU may compute in 10 bits


@dataclass(frozen=True)
class Head:
    """The last linear map of a tower.

    Attributes:
        weight: the parameter's name in the model; None for an identity map that
            is appended to a tower which ends in no linear map.
        bias: the bias's name, or None.
        transposed: whether the weight is stored as ``(d, w)``, as in ``nn.Linear``.
        has_offset: whether the tower adds something to what the map gives.
        size: ``d``.
    """

    weight: str | None
    bias: str | None
    transposed: bool
    has_offset: bool
    size: int

    def matrix(self, model: nn.Module) -> Tensor:
        """What features are multiplied with, on the CPU in float64, which not every device has.

        Args:
            model: that the head is in.

        Returns:
            shape ``(w, d)``; with a bias, which is the last row, ``(w + 1, d)``
        """
        if self.weight is None:
            return torch.eye(self.size, dtype=torch.float64)
        weight = model.get_parameter(self.weight).detach().cpu().double()
        rows = [weight.T if self.transposed else weight]
        if self.bias:
            rows.append(model.get_parameter(self.bias).detach().cpu().double()[None])
        return torch.cat(rows)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parameters that a matrix stands for; none for an appended map.

        Args:
            matrix: as :meth:`matrix` gives it.

        Returns:
            weight and bias by name, in the model's layout
        """
        if self.weight is None:
            return {}
        weight = matrix[:-1] if self.bias else matrix
        found = {self.weight: weight.T if self.transposed else weight}
        return found | ({self.bias: matrix[-1]} if self.bias else {})

    def features(self, tower: nn.Module, inputs: Tensor) -> Tensor:
        """What :meth:`matrix` multiplies, followed by the offset if there is one.

        Args:
            tower: maps inputs to embeddings; the model is its ``model``.
            inputs: images or tokens, ``n`` of them.

        Returns:
            shape ``(n, w)``, ``(n, w + 1)`` with a bias, and ``d`` more columns with an offset
        """
        if self.weight is None:
            embeddings: Tensor = tower(inputs)
            return embeddings
        weight = tower.get_parameter(f"model.{self.weight}")
        width = weight.shape[1 if self.transposed else 0]
        seen: list[Tensor] = []
        if self.has_offset:  # a linear layer whose input can be seen; with zero weights it gives nothing
            replaced = {self.weight: torch.zeros_like(weight)}
            layer = tower.get_submodule(f"model.{self.weight}".rpartition(".")[0])
            handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        else:  # whose output is its input
            replaced = {self.weight: torch.eye(width, dtype=weight.dtype, device=weight.device)}
        if self.bias:
            size = self.size if self.has_offset else width
            replaced[self.bias] = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        try:
            output: Tensor = functional_call(
                tower, {f"model.{name}": value for name, value in replaced.items()}, (inputs,)
            )
        finally:
            if self.has_offset:
                handle.remove()
        ones = [output.new_ones(len(output), 1)] if self.bias else []
        parts = [seen[0].reshape(len(inputs), width), *ones, output] if self.has_offset else [output, *ones]
        return torch.cat(parts, dim=1)


def find_head(tower: nn.Module, inputs: Tensor) -> Head:
    """The last linear map of a tower, or an identity map to append where there is none.

    Args:
        tower: maps inputs to embeddings; the model is its ``model``.
        inputs: images or tokens to try it on, two at least.
    """
    with torch.no_grad():
        expected = tower(inputs).double()
    size = expected.shape[1]
    model = tower.get_submodule("model")
    for head in _candidates(tower, inputs, size):
        try:
            with torch.no_grad():
                features = head.features(tower, inputs).double()
        except (RuntimeError, IndexError):  # sizes do not fit, or the layer is not called as one
            continue
        matrix = head.matrix(model).to(features)
        found = features[:, : len(matrix)] @ matrix
        if head.has_offset:
            found = found + features[:, len(matrix) :]
        if (found - expected).abs().max() <= _CLOSE * expected.abs().max():
            return head
    return Head(None, None, False, False, size)


def _candidates(tower: nn.Module, inputs: Tensor, size: int) -> Iterator[Head]:
    """The weights that the embedding is linear in, with a slope that their features explain."""
    weights = {
        name: value.detach().requires_grad_()
        for name, value in tower.named_parameters()
        if (value.ndim == 2 and size in value.shape) or (name.endswith("bias") and value.shape == (size,))
    }
    with torch.enable_grad():
        embedding = functional_call(tower, weights, (inputs[:1],))[0]
        cotangent = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(embedding)
        slopes = _Slopes(weights, cotangent)
        (embedding @ cotangent).backward()
    for name, transposed, features in slopes.explained:
        bias = name.rpartition(".")[0] + ".bias"
        bias = bias if bias in slopes.shifts else ""
        weight = weights[name].detach()
        step = weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
        with torch.no_grad():
            moved = functional_call(tower, {name: weight + step}, (inputs[:1],))[0]
            rest = embedding - features @ (weight.T if transposed else weight)
            if bias:
                rest = rest - weights[bias]
        if _close(moved - embedding, features @ (step.T if transposed else step)):
            has_offset = bool(rest.abs().max() > _CLOSE * embedding.abs().max())
            yield Head(_in_model(name), _in_model(bias) or None, transposed, has_offset, size)


class _Slopes:
    """What the slopes of an embedding along a cotangent say of weights, each looked at and dropped as it comes.

    Args:
        weights: by name, as they are used.
        cotangent: shape ``(d,)``.

    Attributes:
        explained: name, whether it is stored as ``(d, w)``, and features whose outer product with the cotangent is
            the slope.
        shifts: the biases whose slope is the cotangent.
    """

    def __init__(self, weights: dict[str, Tensor], cotangent: Tensor) -> None:
        self._cotangent = cotangent
        self.explained: list[tuple[str, bool, Tensor]] = []
        self.shifts: set[str] = set()
        for name, weight in weights.items():
            weight.register_post_accumulate_grad_hook(partial(self._look, name))  # type: ignore[no-untyped-call]

    def _look(self, name: str, weight: Tensor) -> None:
        slope, weight.grad = weight.grad, None
        assert slope is not None
        if slope.ndim == 1:
            if _close(self._cotangent, slope):
                self.shifts.add(name)
            return
        for transposed, gradient in ((True, slope.T), (False, slope)):
            if gradient.shape[1] == len(self._cotangent) and slope.any():
                features = gradient @ self._cotangent / self._cotangent.dot(self._cotangent)
                if _close(features.outer(self._cotangent), gradient):
                    self.explained.append((name, transposed, features))


def _in_model(name: str) -> str:
    return name.removeprefix("model.")


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _CLOSE * expected.norm())
