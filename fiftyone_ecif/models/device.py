"""Where models run."""

from __future__ import annotations

import torch

from fiftyone_ecif.errors import EcifError


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
