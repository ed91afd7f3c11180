"""What is computed where, and how exactly: the one place that decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fiftyone_ecif.errors import EcifError

_KEPT_ON_CPU = 2**28  # bytes; what a run keeps beside its data is small beside torch
_SHARE = 0.4  # of a GPU's free memory, for one thing that is kept there
_STACKED = {"cpu": 2**16, "gpu": 2**24}  # similarities computed at once
_UNWATCHED = {"cpu": 1, "gpu": 8}  # steps between two looks at what they came to
_PULLED = {"cpu": 8, "gpu": 32}  # losses of a batch back-propagated at once


def choose_device(device: str | None) -> str:
    """The device to compute on.

    Args:
        device: ``"cpu"``, ``"cuda"`` or another torch device; None for a GPU where there is one.

    Raises:
        EcifError: if torch does not know it, or a GPU is asked for and there is none
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise EcifError(f"device={device!r} is none that torch knows. Use 'cpu', or 'cuda' for a GPU") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EcifError(f"device={device!r} was asked for, but torch finds no GPU here. Use device='cpu'")
    return device


@dataclass(frozen=True)
class Placement:
    """Where vectors, features and matrices of similarities are, and in which precision.

    Attributes:
        device: of torch.
        dtype: float64, or float32 where float64 is slow or missing.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float64

    @staticmethod
    def of_heads(device: str) -> Placement:
        """Float64 on the CPU and on GPUs made for it, those for data centres; float32 on others.

        NVIDIA's data centre chips, whose float64 is half as fast as float32 or
        faster, have a compute capability that ends in ``.0`` (6.0, 7.0, 8.0,
        9.0, 10.0); on others it is 32 or 64 times slower.
        """
        kind = torch.device(device).type
        if kind == "cpu":
            return Placement(device)
        exact = kind == "cuda" and torch.cuda.get_device_capability(device)[1] == 0
        return Placement(device, torch.float64 if exact else torch.float32)

    @property
    def coarse(self) -> Placement:
        """For steps whose result is checked in ``dtype``, and for what is kept in float32: float32 on a CPU.

        A CPU is twice as fast with it. A GPU that is made for float64 is not, and others are in float32 already.
        """
        return replace(self, dtype=torch.float32) if self._kind == "cpu" else self

    @property
    def unwatched(self) -> int:
        """Steps of an iteration between two looks at what it came to: for each the program waits for a GPU."""
        return _UNWATCHED[self._kind]

    @property
    def room(self) -> int:
        """Bytes that may be kept here for later."""
        if torch.device(self.device).type != "cuda":
            return _KEPT_ON_CPU
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(_SHARE * (free + cached))

    @property
    def stacked(self) -> int:
        """How many similarities are worth computing at once: a GPU is launch-bound with few, a CPU's cache is small."""
        return _STACKED[self._kind]

    @property
    def _kind(self) -> str:
        return "cpu" if torch.device(self.device).type == "cpu" else "gpu"

    @property
    def pulled(self) -> int:
        """How many losses of one batch are worth back-propagating at once, through the heads."""
        return _PULLED[self._kind]


ON_CPU = Placement()


def wait_for(device: str) -> None:
    """Returns when a device has done what it was given: its clock is not that of the program."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts to copy a tensor to the CPU, behind what its device has to do already; what is returned gives the copy.

    Meanwhile the device can be given more to do. It would stand still while the program waits for it.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.current_stream(tensor.device).record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


def say_device(device: str) -> str:
    """What a device is and how heads are computed on it, in a few words."""
    precision = str(Placement.of_heads(device).dtype).removeprefix("torch.")
    if torch.device(device).type != "cuda":
        return f"{device}, heads in {precision}"
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)} with {memory:.0f} GiB, towers in float16 and heads in {precision}"
