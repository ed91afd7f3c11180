"""What pairs are known by: an image by its path, size and time of change, a caption by its text.

Images that were moved are known again by their bytes; see :mod:`fiftyone_ecif.store.known_files`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fiftyone_ecif.errors import EcifError


class PairKey(NamedTuple):
    """What the image and the caption of a pair are known by."""

    image: str
    caption: str

    @property
    def digest(self) -> str:
        """A short form, to tell later whether the pair has changed."""
        return self.image[:8] + self.caption[:8]


def pair_key(path: str, caption: str) -> PairKey:
    """The key of a pair as its image file is now.

    Raises:
        EcifError: if there is no such file
    """
    return PairKey(image_key(path), digest(caption))


def image_key(path: str) -> str:
    """The key of an image file as it is now, by its path, size and time of change.

    Raises:
        EcifError: if there is no such file
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise EcifError(f"The image {path} went away while it was read ({error.strerror}). Run again") from error
    return digest(f"{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}")


def content_digest(path: str) -> str:
    """Of the bytes of a file.

    Raises:
        OSError: if it cannot be read
    """
    with open(path, "rb") as file:
        return digest(iter(lambda: file.read(1 << 20), b""))


def content_of(path: str) -> str | None:
    """As :func:`content_digest`, or None of a file that cannot be read, which is said where it is decoded."""
    try:
        return content_digest(path)
    except OSError:
        return None


def equal_files(paths: Sequence[str]) -> list[int]:
    """A number for each file, the same for the same bytes. Only files of one size are read."""
    sizes = {path: os.path.getsize(path) if os.path.exists(path) else -1 for path in paths}
    alike = Counter(sizes.values())
    numbers: dict[str, int] = {}
    found = []
    for path in paths:
        name = (content_of(path) if alike[sizes[path]] > 1 else None) or path  # what cannot be read is like no other
        found.append(numbers.setdefault(name, len(numbers)))
    return found


def digest(parts: str | Iterable[str | bytes | memoryview], size: int = 16) -> str:
    """Hexadecimal digits that stand for a text, or for texts and bytes one after another.

    Digests name what is kept on the disk, so that theirs must never change.

    Args:
        parts: taken one at a time, so that they need not be in memory together. Where one ends and the next
            begins plays no part.
        size (16): bytes of the digest, two digits each.
    """
    found = hashlib.blake2b(digest_size=size)
    for part in (parts,) if isinstance(parts, str) else parts:
        found.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return found.hexdigest()
