"""A function of tensors on a GPU whose kernels are launched at once, instead of one after another from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    given: Tensor
    found: Tensor


class Replayed:
    """A function whose kernels are recorded when inputs of a shape come again, and replayed from then on.

    Threads that decode images hold Python's lock most of the time, and a tower that launches a thousand kernels would
    wait for it before each; a replay is one launch. What cannot be recorded is run as it is.

    Args:
        function: of a tensor on a GPU, without other effects; what it computes depends on the tensor alone.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function, self._usable = function, True
        self._shape: torch.Size | None = None
        self._recording: _Recording | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """What the function gives; the next call may overwrite it."""
        if inputs.shape != self._shape:  # the memory of a recording is kept for one shape only
            self._shape, self._recording = inputs.shape, None
            return self._function(inputs)
        if self._recording is None and self._usable:
            self._recording = self._record(inputs)
        if self._recording is None:
            return self._function(inputs)
        self._recording.given.copy_(inputs)
        self._recording.graph.replay()
        return self._recording.found

    def _record(self, inputs: Tensor) -> _Recording | None:
        graph, given = torch.cuda.CUDAGraph(), inputs.clone()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads use the device meanwhile
                return _Recording(graph, given, self._function(given))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the function waits for the device somewhere
            self._usable = False
            return None
