"""Checkpoints: weights that ``open_clip.create_model(pretrained=path)`` loads, and adapters beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import EcifError

Adapters = dict[str, tuple[Tensor, Tensor]]
#: How images are prepared, as arguments of ``open_clip.create_model_and_transforms``.
PREPROCESSING = ("image_mean", "image_std", "image_interpolation", "image_resize_mode")


def save_checkpoint(
    path: Path,
    state: Mapping[str, Tensor],
    adapters: Adapters | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Saves weights, whole or not at all.

    Args:
        path: of the checkpoint; safetensors if it ends in that, else PyTorch's format.
        state: the model's state dict, on the CPU.
        adapters (None): ``{name: (A, B)}`` that are part of these weights, each
            name's ``B A`` already added. They are written to
            ``{path}.adapters`` (safetensors), so that they can be attributed
            later or fitted further.
        preprocessing (None): how images were prepared, as arguments of
            ``open_clip.create_model_and_transforms``; written to
            ``{path}.preprocessing.json``, as open_clip knows it by the pretrained tag only.

    Raises:
        EcifError: if a file cannot be written
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if adapters:
            parts = {
                f"{side}.{name}": part.detach().cpu().contiguous()
                for name, pair in adapters.items()
                for side, part in zip("AB", pair, strict=True)
            }
            _write(_adapters(path), lambda temporary: save_file(parts, temporary))
        if preprocessing:
            _write(_preprocessing(path), lambda temporary: temporary.write_text(json.dumps(dict(preprocessing))))
        else:
            _preprocessing(path).unlink(missing_ok=True)
        save = save_file if path.suffix == ".safetensors" else torch.save
        _write(path, lambda temporary: save(dict(state), temporary))
        if not adapters:
            _adapters(path).unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise EcifError(f"The checkpoint {path} cannot be written ({error})") from error


def load_adapters(pretrained: str | None) -> Adapters | None:
    """The adapters that :func:`save_checkpoint` wrote beside a checkpoint, or None."""
    if pretrained is None or not Path(pretrained).is_file() or not _adapters(Path(pretrained)).is_file():
        return None
    parts = load_file(_adapters(Path(pretrained)))
    return {name[2:]: (value, parts[f"B.{name[2:]}"]) for name, value in parts.items() if name.startswith("A.")}


def load_preprocessing(pretrained: str | None) -> dict[str, Any] | None:
    """The preprocessing that :func:`save_checkpoint` wrote beside a checkpoint, or None."""
    if pretrained is None or not Path(pretrained).is_file() or not _preprocessing(Path(pretrained)).is_file():
        return None
    found = json.loads(_preprocessing(Path(pretrained)).read_text())
    return {name: found[name] for name in PREPROCESSING if name in found}


def _adapters(path: Path) -> Path:
    return path.with_name(f"{path.name}.adapters")


def _preprocessing(path: Path) -> Path:
    return path.with_name(f"{path.name}.preprocessing.json")


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
