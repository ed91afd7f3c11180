"""What functions of torch a module calls, and which of them what varies and what it is given reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from fiftyone_ecif.errors import EcifError

_LAYERS = {
    *("linear", "multi_head_attention_forward", "scaled_dot_product_attention"),
    *("conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "bmm", "baddbmm", "einsum"),
}
#: What tells values of tensors, by which a module may decide what to do.
_TELLING = {"__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy"} | {
    *("equal", "allclose", "is_nonzero"),
}

#: A call that a tensor comes out of, and its place among what that gives.
Origin = tuple[int, int]
GIVEN: Origin = (-1, 0)


class UnforeseenError(EcifError):
    """A module that calls other functions with other values, or other numbers, of inputs."""


@dataclass(frozen=True)
class Call:
    """A function that was called and gave tensors.

    Attributes:
        function: which.
        live: whether what varies reaches it.
        frozen: whether, if it is not live, what the module was given does.
        takes: the frozen tensors among its arguments.
        same: whether it gave its first argument back.
        changes: whether it changed an argument.
        gave: its output; empty where that was thrown away.
        structure: of the output.
    """

    function: Any
    live: bool
    frozen: bool
    takes: tuple[Origin, ...]
    same: bool
    changes: bool
    gave: tuple[Any, ...]
    structure: TreeSpec

    @property
    def is_layer(self) -> bool:
        """Whether most of a module's work is in such calls."""
        return getattr(self.function, "__name__", "") in _LAYERS


class Calls(TorchFunctionMode):
    """Notes what is called within.

    Args:
        given: what the module is given.
        varied: what varies, tensors that require gradients.

    Attributes:
        made: the calls that gave tensors, in order.
    """

    def __init__(self, given: Tensor, varied: Iterable[Tensor]) -> None:
        super().__init__()
        self.made: list[Call] = []
        self._origins: dict[int, Origin] = {id(given): GIVEN}
        self._live = {id(each) for each in varied}
        self._alive: list[Any] = [given]  # so that no tensor has the number of one before it

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the function and notes it.

        Raises:
            UnforeseenError: if it tells values that the module was given or that vary, or mixes them up
        """
        kwargs = kwargs or {}
        taken = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        takes = tuple(self._origins[id(each)] for each in taken if id(each) in self._origins)
        live = any(id(each) in self._live for each in taken)
        versions = [each._version for each in taken]
        output = func(*args, **kwargs)
        changed = [each for each, version in zip(taken, versions, strict=True) if each._version != version]
        leaves, structure = tree_flatten(output)
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        name = getattr(func, "__name__", "")
        if not tensors:
            if (live or takes) and (changed or name in _TELLING):
                raise UnforeseenError(f"{name} cannot be foreseen")
            return output
        live = live or any(each.requires_grad for each in (*taken, *tensors))
        if live and any(id(each) in self._origins for each in changed):
            raise UnforeseenError(f"{name} changes what it was given")
        same = bool(args) and output is args[0]
        for place, each in enumerate(leaves):
            if live:
                self._live.add(id(each))
                self._origins.pop(id(each), None)
            elif takes and not same:
                self._origins[id(each)] = len(self.made), place
        self._alive.append((args, kwargs, output))
        self.made.append(
            Call(func, live, bool(takes) and not live, takes, same, bool(changed), tuple(leaves), structure)
        )
        return output

    def origin(self, tensor: Tensor) -> Origin | None:
        """Where a frozen tensor comes from; None for any other."""
        return self._origins.get(id(tensor))
