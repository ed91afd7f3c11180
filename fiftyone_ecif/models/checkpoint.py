"""Checkpoints: weights that ``open_clip.create_model(pretrained=path)`` loads, and adapters beside them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import atomic_path, make_writable, user_path

Adapters = dict[str, tuple[Tensor, Tensor]]
#: How images are prepared, as arguments of ``open_clip.create_model_and_transforms``.
PREPROCESSING = ("image_mean", "image_std", "image_interpolation", "image_resize_mode")
_CHOICES = {
    "image_interpolation": ("bicubic", "bilinear", "random"),
    "image_resize_mode": ("shortest", "longest", "squash"),
}


def new_checkpoint(path: str | os.PathLike[str], overwrite: bool, source: str | None = None) -> Path:
    """The path of a checkpoint that is to be written, known to be one that can be.

    Args:
        path: of the file; ``~`` stands for the user's home. Its folder is made.
        overwrite: whether there may be such a file.
        source (None): what the weights were loaded from, which is never written over.

    Raises:
        EcifError: if it is a folder, a file that is there or the source, or cannot be written
    """
    path = user_path(path)
    if path.is_dir():
        raise EcifError(f"{path} is a folder. Give the path of the checkpoint to write, such as {path / 'model.pt'}")
    if source is not None and path.exists() and os.path.exists(source) and os.path.samefile(path, source):
        raise EcifError(f"{path} is the checkpoint that the model was loaded from. Choose another name")
    if path.exists() and not overwrite:
        raise EcifError(f"There is a file {path} already. Choose another name, or set overwrite=True")
    make_writable(path.parent, "Choose a path in one that can")
    return path


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
        if adapters:
            parts = {
                f"{side}.{name}": part.detach().cpu().contiguous()
                for name, pair in adapters.items()
                for side, part in zip("AB", pair, strict=True)
            }
            with atomic_path(_adapters(path)) as temporary:
                save_file(parts, temporary)
        if preprocessing:
            with atomic_path(_preprocessing(path)) as temporary:
                temporary.write_text(json.dumps(dict(preprocessing)))
        else:
            _preprocessing(path).unlink(missing_ok=True)
        save = save_file if path.suffix == ".safetensors" else torch.save
        with atomic_path(path) as temporary:
            save(dict(state), temporary)
        if not adapters:
            _adapters(path).unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise EcifError(f"The checkpoint {path} cannot be written ({error})") from error


def load_adapters(pretrained: str | None) -> Adapters | None:
    """The adapters that :func:`save_checkpoint` wrote beside a checkpoint, or None.

    Raises:
        EcifError: if the file is no such adapters
    """
    if pretrained is None or not Path(pretrained).is_file() or not _adapters(Path(pretrained)).is_file():
        return None
    file = _adapters(Path(pretrained))
    try:
        parts = load_file(file)
        names = sorted({name[2:] for name in parts})
        adapters = {name: (parts.pop(f"A.{name}"), parts.pop(f"B.{name}")) for name in names}
        whole = all(a.ndim == b.ndim == 2 and 0 < len(a) == b.shape[1] for a, b in adapters.values())
        ranks = {len(a) for a, _ in adapters.values()}
        if parts or not whole or len(ranks) != 1:
            raise ValueError("it does not hold pairs of matrices of one rank")
        if not all(part.is_floating_point() and part.isfinite().all() for pair in adapters.values() for part in pair):
            raise ValueError("it holds NaN, infinity or whole numbers")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EcifError(
            f"The adapters {file} cannot be read ({error}). Delete that file to load the weights alone"
        ) from error
    return adapters


def load_preprocessing(pretrained: str | None) -> dict[str, Any] | None:
    """The preprocessing that :func:`save_checkpoint` wrote beside a checkpoint, or None.

    Raises:
        EcifError: if the file says no such thing
    """
    if pretrained is None or not Path(pretrained).is_file() or not _preprocessing(Path(pretrained)).is_file():
        return None
    file = _preprocessing(Path(pretrained))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        known = {name: found[name] for name in PREPROCESSING if name in found}
        wrong = next((name for name, value in known.items() if not _is_usable(name, value)), None)
        if wrong:
            raise ValueError(f"{wrong} is {str(known[wrong])[:100]!r}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise EcifError(
            f"{file}, which says how images are prepared, cannot be used ({error}). Delete it to prepare them as "
            "open_clip does by itself"
        ) from error
    return known


def _is_usable(name: str, value: Any) -> bool:
    """Whether open_clip can prepare images by a value of :data:`PREPROCESSING`."""
    if name in _CHOICES:
        return value in _CHOICES[name]
    numbers = value if isinstance(value, list) else [value]
    least = 0.0 if name == "image_mean" else 1e-6
    return len(numbers) in (1, 3) and all(
        type(number) in (int, float) and math.isfinite(number) and number >= least for number in numbers
    )


def _adapters(path: Path) -> Path:
    return path.with_name(f"{path.name}.adapters")


def _preprocessing(path: Path) -> Path:
    return path.with_name(f"{path.name}.preprocessing.json")
