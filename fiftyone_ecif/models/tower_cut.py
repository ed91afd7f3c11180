"""A tower cut in two: what comes before all that a scope varies, computed once, and the rest.

The cut follows what depends on what, call by call, and not the names of
blocks: functions that the inputs reach and no varied parameter does are
*frozen*. What they hand to the others is kept, for each input; with that the
tower runs again, its frozen calls giving empty tensors of the right shape. This
is tried first. A tower that decides by the values of tensors, or does not come
out the same, is not cut.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_unflatten

from fiftyone_ecif.models.calls import GIVEN, Call, Calls, Origin, UnforeseenError
from fiftyone_ecif.models.towers import differentiable_attention

_LEAST = 1 / 4  # of the layers are frozen, or a cut is not worth its memory
_TRIED = 3  # inputs
_CLOSE = 1e-2  # relative; a GPU may compute in 10 bits
_MOVED = 1.5  # times the parameters that it was found with


@dataclass(frozen=True)
class Activations:
    """What enters the part of a tower that varies, of some inputs; indexed as a tensor of them is.

    Attributes:
        rows: shape ``(n, w)``, float64 if the tower computes in that, else float32.
        plan: how the tower takes them.
    """

    rows: Tensor
    plan: Plan

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Activations:
        return Activations(self.rows[index], self.plan)


@dataclass(frozen=True)
class _Like:
    """A tensor without its values, whose shape grows with the number of inputs.

    Attributes:
        shape: with no input.
        growth: of each dimension with an input.
        dtype: of torch.
        device: of torch.
    """

    shape: tuple[int, ...]
    growth: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(fewer: Tensor, more: Tensor, count: int) -> _Like:
        """From the tensors of ``count`` inputs and of one more."""
        if fewer.ndim != more.ndim:
            raise UnforeseenError("a tensor has other dimensions with more inputs")
        growth = tuple(b - a for a, b in zip(fewer.shape, more.shape, strict=True))
        shape = tuple(a - count * by for a, by in zip(fewer.shape, growth, strict=True))
        return _Like(shape, growth, fewer.dtype, fewer.device)

    @property
    def batch(self) -> int:
        """The dimension in which inputs follow each other.

        Raises:
            UnforeseenError: if there is no such
        """
        grows = [place for place, by in enumerate(self.growth) if by]
        if len(grows) != 1 or self.shape[grows[0]]:
            raise UnforeseenError("a tensor does not hold its inputs one after another")
        return grows[0]

    @property
    def of_one(self) -> tuple[int, ...]:
        """The shape for one input."""
        return tuple(size + by for size, by in zip(self.shape, self.growth, strict=True))

    @property
    def size(self) -> int:
        """Numbers for one input."""
        return torch.Size(self.of_one).numel()

    @property
    def nbytes(self) -> int:
        """For one input."""
        return self.size * self.dtype.itemsize

    def empty(self, count: int) -> Tensor:
        """A tensor for some inputs that takes no memory."""
        shape = [size + count * by for size, by in zip(self.shape, self.growth, strict=True)]
        return torch.empty((), dtype=self.dtype, device=self.device).expand(shape)

    def pack(self, value: Tensor) -> Tensor:
        """A tensor of ``n`` inputs as ``(n, size)``."""
        apart = value.unflatten(self.batch, (-1, self.growth[self.batch]))  # type: ignore[no-untyped-call]
        return cast(Tensor, apart.movedim(self.batch, 0).flatten(1))

    def unpack(self, rows: Tensor) -> Tensor:
        """What :meth:`pack` was given."""
        apart = rows.reshape(len(rows), *self.of_one).movedim(0, self.batch)
        return apart.flatten(self.batch, self.batch + 1).to(self.dtype)


class TowerCut:
    """A tower and where it is cut, found when it first gets inputs of a shape.

    Args:
        tower: maps inputs to embeddings.
        varied: its parameters that vary, by name.
    """

    def __init__(self, tower: nn.Module, varied: Mapping[str, Tensor]) -> None:
        self._tower, self._varied = tower, varied
        self._plans: dict[Any, Plan | None] = {}

    def enter(self, inputs: Tensor) -> Activations | None:
        """What enters the part that varies, without gradient; None where the tower is not cut.

        Args:
            inputs: images or tokens, ``n`` of them, at least one.
        """
        kind = inputs.shape[1:], inputs.dtype, inputs.device
        if kind not in self._plans:
            try:
                self._plans[kind] = self._plan(inputs[0])
            except Exception:  # of many libraries; what is wrong with a tower is said when it is run as a whole
                self._plans[kind] = None
        plan = self._plans[kind]
        return None if plan is None else plan.enter(self._tower, inputs)

    def _plan(self, example: Tensor) -> Plan | None:
        """How to cut for inputs like an example, tried with other parameters than those it was found with."""
        inputs = torch.stack([example.roll(shift, -1) for shift in range(_TRIED)])
        plan = make_plan(self._calls(inputs[:-1]), self._calls(inputs), inputs)
        if plan is None:
            return None
        moved = {name: _MOVED * value for name, value in self._varied.items()}
        rows = [plan.enter(self._tower, part).rows for part in (inputs[:1], inputs[1:])]
        with torch.no_grad(), differentiable_attention():
            expected = functional_call(self._tower, moved, (inputs,))
            with Resumed(Activations(torch.cat(rows), plan)) as rest:
                found = functional_call(self._tower, moved, (rest.inputs,))
        same = (found - expected).abs().max() <= _CLOSE * expected.abs().max()
        return plan if same else None

    def _calls(self, inputs: Tensor) -> tuple[Calls, Tensor]:
        moving = {name: value.detach().clone().requires_grad_() for name, value in self._varied.items()}
        with torch.enable_grad(), differentiable_attention(), Calls(inputs, moving.values()) as calls:
            return calls, functional_call(self._tower, moving, (inputs,))


def make_plan(fewer: tuple[Calls, Tensor], more: tuple[Calls, Tensor], inputs: Tensor) -> Plan | None:
    """Where to cut a tower.

    Args:
        fewer: its calls and its output with one input less than all.
        more: the same with all.
        inputs: all.

    Returns:
        how to run it; None if too little comes before what varies

    Raises:
        UnforeseenError: if it calls other functions with other numbers of inputs
    """
    calls, count = fewer[0].made, len(inputs) - 1
    layers = [call for call in calls if call.is_layer]
    if sum(call.frozen for call in layers) < _LEAST * len(layers):
        return None
    likes = {GIVEN: _Like.of(inputs[:-1], inputs, count)}
    for step, (one, other) in enumerate(zip(calls, more[0].made, strict=True)):
        if (one.function, one.live, one.frozen, one.same) != (other.function, other.live, other.frozen, other.same):
            raise UnforeseenError("other functions are called with more inputs")
        for place, (a, b) in enumerate(zip(one.gave, other.gave, strict=True)):
            if isinstance(a, Tensor):
                likes[step, place] = _Like.of(a, b, count)
    needed = {origin for call in calls if call.live for origin in call.takes}
    end = fewer[0].origin(fewer[1])
    needed |= {end} if end is not None else set()
    changed = {origin for call in calls if call.changes for origin in call.takes}
    again = set()
    for step in reversed(range(len(calls))):  # what is quick and takes no more than it gives is done again, not kept
        call, gives = calls[step], {origin for origin in needed if origin[0] == step}
        if not gives or call.is_layer or changed & (gives | set(call.takes)):
            continue
        if sum(likes[each].nbytes for each in set(call.takes) - needed) <= sum(likes[each].nbytes for each in gives):
            again.add(step)
            needed = needed - gives | set(call.takes)
    forgot = [
        replace(call, gave=tuple(likes.get((step, place), each) for place, each in enumerate(call.gave)))
        for step, call in enumerate(calls)
    ]
    return Plan(forgot, {origin: likes[origin] for origin in sorted(needed)}, again, likes[GIVEN])


class Plan:
    """How a tower is run up to the cut, and from there on, for inputs of one shape.

    Args:
        calls: of the tower, in order; what they gave without values.
        kept: what is kept of each input.
        again: frozen calls that are made again.
        inputs: of the tower, without values.
    """

    def __init__(self, calls: Sequence[Call], kept: Mapping[Origin, _Like], again: set[int], inputs: _Like) -> None:
        self.calls, self.kept, self.again, self.inputs = calls, kept, again, inputs
        exact = any(like.dtype == torch.float64 for like in kept.values())
        self._dtype = torch.float64 if exact else torch.float32  # in which whole numbers of inputs are exact too

    @torch.no_grad()
    def enter(self, tower: nn.Module, inputs: Tensor) -> Activations:
        """Runs what is frozen, with whatever attention is the fastest."""
        run = _Entering(self, inputs)
        with contextlib.suppress(_Finished), run:
            tower(inputs)
        parts = [like.pack(run.seen[origin]).to(self._dtype) for origin, like in self.kept.items()]
        return Activations(torch.cat(parts, 1), self)

    def leave(self, rows: Tensor) -> dict[Origin, Tensor]:
        """What the rows of activations hold."""
        parts = rows.split([like.size for like in self.kept.values()], 1)  # type: ignore[no-untyped-call]
        return {origin: like.unpack(part) for (origin, like), part in zip(self.kept.items(), parts, strict=True)}


class _Finished(Exception):  # noqa: N818, nothing is wrong
    """All that is frozen has been computed."""


class _Guided(TorchFunctionMode, ABC):
    """Has a tower make some of its calls only.

    Args:
        plan: of the tower.
        count: of inputs.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        super().__init__()
        self._plan, self._count, self._step = plan, count, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Makes a call, or gives what stands for its output.

        Raises:
            UnforeseenError: if it is not the one that is to come
        """
        step = self._step
        call = self._plan.calls[step] if step < len(self._plan.calls) else None
        if call is None or func != call.function:
            output = func(*args, **(kwargs or {}))
            if any(isinstance(each, Tensor) for each in tree_leaves(output)):
                raise UnforeseenError(f"{func} was called, which was not foreseen")
            return output  # such as a shape
        self._step += 1
        if not self._skips(step, call):
            output = func(*args, **(kwargs or {}))
            self._note(step, output)
            return output
        if call.same:
            return args[0]
        gave = [self._stand_in((step, place), each) for place, each in enumerate(call.gave)]
        return tree_unflatten(gave, call.structure)

    @abstractmethod
    def _skips(self, step: int, call: Call) -> bool:
        """Whether a call is not made, and something stands for its output."""

    def _note(self, step: int, output: Any) -> None:
        """Sees the output of a call that was made."""

    def _stand_in(self, origin: Origin, gave: Any) -> Any:
        return gave.empty(self._count) if isinstance(gave, _Like) else gave


class _Entering(_Guided):
    """Makes the frozen calls.

    Attributes:
        seen: what is kept of what they gave.
    """

    def __init__(self, plan: Plan, inputs: Tensor) -> None:
        super().__init__(plan, len(inputs))
        self.seen = {GIVEN: inputs}
        self._last = max(step for step, call in enumerate(plan.calls) if call.frozen)

    def _skips(self, step: int, call: Call) -> bool:
        return call.live

    def _note(self, step: int, output: Any) -> None:
        for place, each in enumerate(tree_leaves(output)):
            if (step, place) in self._plan.kept:
                self.seen[step, place] = each
        if step == self._last:
            raise _Finished


class Resumed(_Guided):
    """Has a tower that is run within go on from activations.

    Args:
        activations: of inputs.

    Attributes:
        inputs: what the tower is to be given.
    """

    def __init__(self, activations: Activations) -> None:
        super().__init__(activations.plan, len(activations))
        self._kept = activations.plan.leave(activations.rows)
        self.inputs = self._stand_in(GIVEN, activations.plan.inputs)

    def _skips(self, step: int, call: Call) -> bool:
        return call.frozen and step not in self._plan.again

    def _stand_in(self, origin: Origin, gave: Any) -> Any:
        return self._kept[origin] if origin in self._kept else super()._stand_in(origin, gave)
