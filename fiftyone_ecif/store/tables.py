"""The HDF5 store: what is expensive to compute, kept as tables of rows.

A :class:`Table` is a folder of HDF5 files ("parts"), each holding some rows of
the same columns. A part is written to a temporary file and then renamed, and
never changed afterwards: a run that is killed leaves whole parts behind, never
half of one, and two processes can fill the same table. What is read may have been
damaged or made by others: a part is read only if it looks as :meth:`Table.write`
makes them, all of it is in the file, and its checksums hold.

The folders below :func:`cache_folder`::

    format-1/<dataset id>/.owner                           which database the dataset is in
                         /writing/                          what is being written to samples
                         /<encoder fingerprint>/images      key, features of every image
                                                /captions    key, features of every caption
                                                /files       key, digest of the bytes, first key of every image file
                                                /run-<key>/  what depends on a partition

Nothing in the store is needed for its own sake: deleting it costs time only.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import TEMPORARY_SUFFIX, cache_folder, make_writable, write_file

if TYPE_CHECKING:
    import h5py

FORMAT = 1
_SAFE_NAME = re.compile(r"[0-9a-z-]{1,64}")
_SAFE_PART = re.compile(r"\w[\w.+-]{0,127}")
_LAYOUT = ("v110", "v110")  # the first with checksums of all but the data; those are fletcher32's
_OWNER = ".owner"


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
        """The table of this name, which may have no rows yet.

        Raises:
            EcifError: if it is not a name, as those of stores
        """
        return Table(self.inside(name).folder)

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
        write_file(self.folder / _OWNER, owner.encode())

    def lock(self) -> Path:
        """The file that a process holds while it changes what all share."""
        self.ensure_writable()
        return self.folder / ".lock"

    def sweep(self, seconds: float) -> None:
        """Deletes what killed processes left half-written, if nothing was written to it for so long."""
        for path in self.folder.rglob(f"*{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may have renamed it
                if time.time() - path.lstat().st_mtime > seconds:
                    path.unlink()

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
        make_writable(self.folder, "Set FIFTYONE_ECIF_CACHE_DIR to one that can")

    def delete(self) -> None:
        """Deletes the folder with all it holds, and folders above that are then empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self.folder.parents:
            if parent == _root() or not parent.is_dir() or any(path.name[0] != "." for path in parent.iterdir()):
                return
            shutil.rmtree(parent, ignore_errors=True)


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

        Raises:
            EcifError: if the disk is full, or the folder cannot be written
        """
        import h5py

        image = io.BytesIO()  # HDF5 loses errors of a full disk, and crashes on them
        with h5py.File(image, "w", libver=_LAYOUT) as file:
            file.attrs["format"] = FORMAT
            file.attrs["rows"] = len(next(iter(columns.values())))
            for name, values in columns.items():
                chunk = values.shape if values.size else None  # one: a column is always read as a whole
                file.create_dataset(name, data=values, fletcher32=chunk is not None, chunks=chunk)
        write_file(self._path(part), image.getbuffer())

    def parts(self) -> list[str]:
        """Names of the parts, in order."""
        return sorted(path.stem for path in self.folder.glob("*.h5"))

    def read(self, part: str, *columns: str) -> dict[str, np.ndarray]:
        """The columns of one part.

        Raises:
            EcifError: if it is damaged, was written in another format, or is
                no file as :meth:`write` makes them
        """
        with self._columns(part, columns) as found:
            return {name: column[()] for name, column in found.items()}

    def read_each(self, *columns: str) -> Iterator[dict[str, np.ndarray]]:
        """The columns of one part after another, while the system fetches those of the next part from the disk."""
        ahead: Iterator[Any] = iter(())
        for part in self.parts():
            this, ahead = ahead, self._fetch(part, columns)
            next(ahead)
            yield from this
        yield from ahead

    def read_all(self, *columns: str) -> dict[str, np.ndarray]:
        """The columns of all parts, one after another; empty arrays if there is none."""
        found = [self.read(part, *columns) for part in self.parts()]
        if not found:
            return {name: np.empty(0) for name in columns}
        try:
            return {name: np.concatenate([part[name] for part in found]) for name in columns}
        except ValueError as error:
            raise self._damaged(self.folder, error) from error

    def _fetch(self, part: str, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray] | None]:
        """Has the system fetch columns from the disk, without waiting for it; then, asked again, reads them."""
        with self._columns(part, columns) as found, self._path(part).open("rb") as file:
            for column in found.values():
                if column.size and hasattr(os, "posix_fadvise"):
                    chunk = column.id.get_chunk_info(0)  # there is one
                    os.posix_fadvise(file.fileno(), chunk.byte_offset, chunk.size, os.POSIX_FADV_WILLNEED)
            yield None
            yield {name: column[()] for name, column in found.items()}

    @contextlib.contextmanager
    def _columns(self, part: str, names: Sequence[str]) -> Iterator[dict[str, h5py.Dataset]]:
        """The columns of one part, known to be such, as long as it is open; errors as of :meth:`read`."""
        import h5py  # not above: the plugin must be able to say that it is missing

        path = self._path(part)
        try:
            with h5py.File(_plain_file(path), "r") as file:
                if _number(file, "format") != FORMAT:
                    raise EcifError(
                        f"{path} was written in format {_number(file, 'format')} of the store, this version reads "
                        f"{FORMAT}. Delete {self.folder} and run again"
                    )
                rows, size = _number(file, "rows"), path.stat().st_size
                yield {name: _column(file, name, rows, size) for name in names}
        except EcifError:
            raise
        except Exception as error:  # h5py raises many kinds on damaged files
            raise self._damaged(path, error) from error

    def _path(self, part: str) -> Path:
        if not _SAFE_PART.fullmatch(part):
            raise EcifError(f"{part!r} is not a name of a part of {self.folder}")
        return self.folder / f"{part}.h5"

    def _damaged(self, path: Path, error: Exception) -> EcifError:
        return EcifError(f"{path} is damaged ({error}). Delete {self.folder} and run again")


def _plain_file(path: Path) -> Path:
    """The path, if it and all folders down to it are what they seem: no links, no pipes.

    Raises:
        ValueError: if not
    """
    root = _root()
    if path.resolve() != root.resolve() / path.relative_to(root) or not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is no plain file, or in a folder that is a link")
    return path


def _number(file: h5py.File, name: str) -> int:
    """A whole number among the attributes of a file."""
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "iu":
        raise ValueError(f"{name} is no whole number")
    return int(file.attrs[name])


def _column(file: h5py.File, name: str, rows: int, size: int) -> Any:
    """A column of a part, once it is known to be one; nothing of it is read or allocated before.

    Args:
        file: the open part.
        name: of the column.
        rows: of the part.
        size: of the file in bytes.

    Raises:
        ValueError: if it is no array of so many numbers (or keys), which
            lies in this file as it is, with checksums
    """
    import h5py

    column = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(column, h5py.Dataset):
        raise ValueError(f"{name} is a link or a group")
    made = column.id.get_create_plist()
    filters = [made.get_filter(number)[0] for number in range(made.get_nfilters())]
    if column.is_virtual or made.get_external_count():
        raise ValueError(f"{name} lies in another file")
    if column.dtype.kind not in ("S" if name == "key" else "biuf"):
        raise ValueError(f"{name} holds {column.dtype}")
    if not column.shape or column.shape[0] != rows:
        raise ValueError(f"{name} has shape {column.shape}, the part has {rows} rows")
    if column.nbytes > size:
        raise ValueError(f"{name} claims {column.nbytes} bytes in a file of {size}")
    if filters != ([h5py.h5z.FILTER_FLETCHER32] if column.size else []):
        raise ValueError(f"{name} is stored with filters {filters}, not with checksums")
    return column
