"""Image files that were seen before, known again by their bytes when their place or time of change is another.

An image is known by a key of its path, size and time of change, which is quick to tell. Once a file is read, the
digest of its bytes is kept beside that key. A file whose key is new, and whose bytes are not, was moved or copied:
it goes by the key that those bytes had first, and so do its features, and the runs on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fiftyone_ecif.store.keys import content_of, digest, image_key
from fiftyone_ecif.store.tables import Store

TABLE = "files"


class KnownFiles:
    """The files that some stores know.

    Args:
        *stores: of encoders; what is learned is written to the first.
    """

    def __init__(self, *stores: Store) -> None:
        self._table = stores[0].table(TABLE)
        self._first: dict[str, str] = {}  # key -> the key that its bytes had first
        self._by_content: dict[str, str] = {}  # digest of the bytes -> likewise
        for store in stores:
            found = store.table(TABLE).read_all("key", "content", "first")
            for key, content, first in zip(*found.values(), strict=True):
                self._first.setdefault(key.decode(), first.tobytes().hex())
                self._by_content.setdefault(content.tobytes().hex(), first.tobytes().hex())

    def unknown(self, paths: Iterable[str]) -> list[str]:
        """Those of some files that were not seen at this place, as they are now."""
        return [path for path in dict.fromkeys(paths) if image_key(path) not in self._first]

    def learn(self, contents: Mapping[str, str]) -> None:
        """Keeps the digests of files that were read.

        Of equal files that are new together, each goes by its own key.

        Args:
            contents: ``{path: digest of its bytes}``.
        """
        if not contents:
            return
        keys = {path: image_key(path) for path in contents}
        firsts = {path: self._by_content.get(content, keys[path]) for path, content in contents.items()}
        for path, content in contents.items():
            self._first[keys[path]] = firsts[path]
            self._by_content.setdefault(content, firsts[path])
        self._table.write(
            digest("".join(keys.values())),
            {
                "key": np.array(list(keys.values()), dtype="S32"),
                "content": _bytes(contents.values()),
                "first": _bytes(firsts.values()),
            },
        )

    def key(self, path: str) -> str:
        """What an image is known by; a file that was not seen before is read, and nothing is learned of it.

        Raises:
            EcifError: if there is no such file
        """
        quick = image_key(path)
        if quick not in self._first and self._by_content:
            return self._by_content.get(content_of(path) or "", quick)
        return self._first.get(quick, quick)


def _bytes(digests: Iterable[str]) -> np.ndarray:
    return np.array([list(bytes.fromhex(found)) for found in digests], dtype=np.uint8)
