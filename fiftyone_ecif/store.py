"""The HDF5 store: what is expensive to compute, kept as tables of rows.

A :class:`Table` is a folder of HDF5 files ("parts"), each holding some rows of
the same columns. A part is written to a temporary file and then renamed, and
never changed afterwards: a run that is killed leaves whole parts behind, never
half of one, and two processes can fill the same table.

The folders below :func:`cache_folder`::

    format-1/<dataset id>/.owner                           which database the dataset is in
                         /<encoder fingerprint>/images      key, features of every image
                                                /captions    key, features of every caption
                                                /run-<key>/  what depends on a partition

Nothing in the store is needed for its own sake: deleting it costs time only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .errors import EcifError

FORMAT = 1
_SAFE_NAME = re.compile(r"[0-9a-z-]{1,64}")
_OWNER = ".owner"


def cache_folder() -> Path:
    """The folder that holds every store.

    ``FIFTYONE_ECIF_CACHE_DIR`` where it is set, else ``fiftyone-ecif`` in the
    user's cache folder.
    """
    configured = os.environ.get("FIFTYONE_ECIF_CACHE_DIR")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fiftyone-ecif"


class Store:
    """A tree of tables.

    Args:
        *names: at least one folder, one in the other, of lower-case letters,
            digits and ``-`` only, so that no name can lead out of it.
    """

    def __init__(self, *names: str) -> None:
        for name in names or ("",):  # no names would be the whole cache
            if not _SAFE_NAME.fullmatch(name):
                raise EcifError(f"{name!r} is not a name of a store")
        self.names = list(names)
        self.folder = _root().joinpath(*names)

    def table(self, name: str) -> Table:
        """The table of this name, which may have no rows yet."""
        return Table(self.folder / name)

    def inside(self, name: str) -> Store:
        """The store in the folder ``name`` of this one."""
        return Store(*self.names, name)

    def stores(self) -> list[Store]:
        """The stores and tables in this one."""
        return [self.inside(name) for name in _names(self.folder)]

    def size(self) -> int:
        """The bytes that it takes, with all it holds."""
        return sum(stat.st_size for stat in _stats(self.folder))

    def last_change(self) -> float:
        """When something in it was last written, in seconds since 1970; 0 if there is nothing."""
        return max((stat.st_mtime for stat in _stats(self.folder)), default=0.0)

    def claim(self, owner: str) -> None:
        """Notes whose it is, for :attr:`owner`."""
        (self.folder / _OWNER).write_text(owner)

    @property
    def owner(self) -> str | None:
        """Whose it is, None if nobody said."""
        try:
            return (self.folder / _OWNER).read_text()
        except OSError:
            return None

    def ensure_writable(self) -> None:
        """Creates the folder.

        Raises:
            EcifError: if that, or writing into it, is not allowed
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise EcifError(
                f"The cache folder {self.folder} cannot be written ({error.strerror}). "
                "Set FIFTYONE_ECIF_CACHE_DIR to a folder that can"
            ) from error

    def delete(self) -> None:
        """Deletes the folder with all it holds, and folders above that are then empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.folder.parents:
            if parent == _root() or not parent.is_dir() or any(path.name != _OWNER for path in parent.iterdir()):
                return
            (parent / _OWNER).unlink(missing_ok=True)
            parent.rmdir()


def outermost_stores() -> list[Store]:
    """All stores of the cache that lie in no other."""
    return [Store(name) for name in _names(_root())]


def _root() -> Path:
    """The part of the cache that this version reads and writes."""
    return cache_folder() / f"format-{FORMAT}"


def _names(folder: Path) -> list[str]:
    """The folders in a folder that can be stores."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and _SAFE_NAME.fullmatch(path.name))


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Of all files in a folder, however deep."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may have deleted it
                yield os.stat(os.path.join(parent, name))


class Table:
    """Rows of equally named columns, in immutable HDF5 parts.

    Args:
        folder: where the parts lie; made with the first of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, part: str, columns: Mapping[str, np.ndarray]) -> None:
        """Writes one part, whole or not at all; one of that name is replaced.

        Args:
            part: its name. Parts are read in the order of their names.
            columns: arrays of equal length.
        """
        import h5py

        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
        os.close(handle)
        try:
            with h5py.File(temporary, "w") as file:
                file.attrs["format"] = FORMAT
                file.attrs["rows"] = len(next(iter(columns.values())))
                for name, values in columns.items():
                    file.create_dataset(name, data=values, fletcher32=values.size > 0 and values.ndim > 0)
            os.replace(temporary, self.folder / f"{part}.h5")
        except BaseException:  # also when the user stops it: no litter, and the exception goes on
            Path(temporary).unlink(missing_ok=True)
            raise

    def parts(self) -> list[str]:
        """Names of the parts, in order."""
        return sorted(path.stem for path in self.folder.glob("*.h5"))

    def read(self, part: str, *columns: str) -> dict[str, np.ndarray]:
        """The columns of one part.

        Raises:
            EcifError: if it is damaged or was written in another format
        """
        import h5py  # not above: the plugin must be able to say that it is missing

        path = self.folder / f"{part}.h5"
        try:
            with h5py.File(path, "r") as file:
                if file.attrs["format"] != FORMAT:
                    raise EcifError(
                        f"{path} was written in format {file.attrs['format']} of the store, this version reads "
                        f"{FORMAT}. Delete {self.folder} and run again"
                    )
                found = {name: file[name][()] for name in columns}
                rows = file.attrs["rows"]
        except (OSError, KeyError) as error:
            raise EcifError(f"{path} is damaged ({error}). Delete {self.folder} and run again") from error
        if any(len(values) != rows for values in found.values()):
            raise EcifError(f"{path} is damaged (columns differ in length). Delete {self.folder} and run again")
        return found

    def read_all(self, *columns: str) -> dict[str, np.ndarray]:
        """The columns of all parts, one after another; empty arrays if there is none."""
        found = [self.read(part, *columns) for part in self.parts()]
        if not found:
            return {name: np.empty(0) for name in columns}
        return {name: np.concatenate([part[name] for part in found]) for name in columns}
