"""Files of the cache: where they lie, and how one is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fiftyone_ecif.errors import EcifError

TEMPORARY_SUFFIX = ".tmp"


def cache_folder() -> Path:
    """The folder that holds every store.

    ``FIFTYONE_ECIF_CACHE_DIR`` where it is set, else ``fiftyone-ecif`` in the
    user's cache folder.
    """
    configured = os.environ.get("FIFTYONE_ECIF_CACHE_DIR")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fiftyone-ecif"


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a person gives it: without blanks and quotes around it, ``~`` for the home."""
    return Path(bare(os.fspath(text))).expanduser()


def bare(text: str) -> str:
    """A text without the blanks and quotes around it that come with what is pasted."""
    text = text.strip()
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return text


def looks_like_a_path(text: str) -> bool:
    """Whether a text that may be a name or a path can only be meant as a path."""
    endings = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
    return "/" in text or "\\" in text or Path(text).suffix in endings


def make_writable(folder: Path, remedy: str) -> None:
    """Creates a folder, and tries to write into it.

    Raises:
        EcifError: if that fails, with the remedy
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EcifError(f"The folder {folder} cannot be written ({error.strerror}). {remedy}") from error


@contextlib.contextmanager
def atomic_path(path: Path, shared: bool = False) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place in the end: it is replaced as a whole or not at all.

    Its folder is made if it is not there. If anything fails meanwhile, what was written is deleted.

    Args:
        path: of the file.
        shared (False): whether others may write the file at the same time. What is written has a name of its own
            then; else always the same, so that what a killed process left is overwritten.

    Raises:
        OSError: if the folder cannot be made, or the file not be replaced
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f"{secrets.token_hex(4)}-" if shared else ""
    temporary = path.with_name(f"{own}{path.name}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # also when the user stops it: no litter, and the exception goes on
        with contextlib.suppress(OSError, ValueError):  # the latter of a path with a NUL
            temporary.unlink()
        raise


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file of the store, whole or not at all, for the user alone to read.

    Raises:
        EcifError: if the disk is full, or the folder cannot be written
    """
    try:
        with atomic_path(path, shared=True) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(content)
    except OSError as error:
        raise EcifError(
            f"The store cannot be written ({path}: {error.strerror}). Make room, for example by "
            "fiftyone-ecif cache --free, or set FIFTYONE_ECIF_CACHE_DIR to another folder; then run again"
        ) from error
