"""Checkpoints: weights that ``open_clip.create_model(pretrained=path)`` loads, and adapters beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import EcifError

Adapters = dict[str, tuple[Tensor, Tensor]]


def save_checkpoint(path: Path, state: Mapping[str, Tensor], adapters: Adapters | None = None) -> None:
    """Saves weights, whole or not at all.

    Args:
        path: of the checkpoint; safetensors if it ends in that, else PyTorch's format.
        state: the model's state dict, on the CPU.
        adapters (None): ``{name: (A, B)}`` that are part of these weights, each
            name's ``B A`` already added. They are written to
            ``{path}.adapters`` (safetensors), so that they can be attributed
            later or fitted further.

    Raises:
        EcifError: if the file cannot be written
    """
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        if path.suffix == ".safetensors":
            save_file(dict(state), temporary)
        else:
            torch.save(dict(state), temporary)
        os.replace(temporary, path)
        if adapters:
            parts = {
                f"{side}.{name}": part.detach().cpu().contiguous()
                for name, pair in adapters.items()
                for side, part in zip("AB", pair, strict=True)
            }
            temporary = beside.with_name(f"{beside.name}.tmp")
            save_file(parts, temporary)
            os.replace(temporary, beside)
    except OSError as error:
        raise EcifError(f"The checkpoint {path} cannot be written ({error.strerror or error})") from error


def load_adapters(pretrained: str | None) -> Adapters | None:
    """The adapters that :func:`save_checkpoint` wrote beside a checkpoint, or None."""
    if pretrained is None or not _beside(Path(pretrained)).is_file():
        return None
    parts = load_file(_beside(Path(pretrained)))
    return {name[2:]: (value, parts[f"B.{name[2:]}"]) for name, value in parts.items() if name.startswith("A.")}


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.adapters")
