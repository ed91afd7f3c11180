"""Files of the cache: where they lie, and how one is written whole or not at all."""

from __future__ import annotations

import os
import tempfile
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


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file of the store, whole or not at all.

    Raises:
        EcifError: if the disk is full, or the folder cannot be written
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=TEMPORARY_SUFFIX)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:  # also when the user stops it: no litter, and the exception goes on
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise EcifError(
            f"The store cannot be written ({path}: {error.strerror}). Make room, for example by "
            "fiftyone-ecif cache --free, or set FIFTYONE_ECIF_CACHE_DIR to another folder; then run again"
        ) from error
