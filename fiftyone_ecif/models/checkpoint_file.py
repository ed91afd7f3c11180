"""Which file of a path holds weights, and whether it can, by its first bytes. No heavy imports: forms ask."""

from __future__ import annotations

import os
from pathlib import Path

from fiftyone_ecif.errors import EcifError

_IN_FOLDERS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ARCHIVE, _PICKLE = b"PK\x03\x04", b"\x80"  # what PyTorch writes, now and formerly; numpy's archives are the former too


def check_checkpoint_file(path: str | os.PathLike[str]) -> None:
    """Checks that a file starts as one that weights are kept in: of PyTorch, safetensors or numpy.

    Raises:
        EcifError: if it does not, or cannot be read
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise EcifError(f"The checkpoint {path} cannot be read ({error.strerror}). Give another one") from error
    header = int.from_bytes(start[:8], "little")
    is_safetensors = start[8:] == b"{" and 8 + header <= size
    if not (is_safetensors or start.startswith((_ARCHIVE, _PICKLE))):
        raise EcifError(f"{path} is no checkpoint. Give a file of PyTorch or safetensors that holds a model's weights")


def weights_file(path: Path) -> Path:
    """The file that holds the weights, or the first of them: the path itself, or one of a folder.

    Raises:
        EcifError: if a folder has none
    """
    if not path.is_dir():
        return path
    found = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
    if not found:
        raise EcifError(f"The folder {path} holds no weights. It needs one of {', '.join(_IN_FOLDERS)}")
    return found[0]
