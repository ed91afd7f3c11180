"""Files are known again by their bytes."""

import os

from fiftyone_ecif.store.keys import content_digest, image_key
from fiftyone_ecif.store.known_files import KnownFiles
from fiftyone_ecif.store.tables import Store


def learn(known, *paths):
    known.learn({path: content_digest(path) for path in known.unknown(paths)})


def test_a_moved_file_goes_by_its_first_key(tmp_path, monkeypatch):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path / "cache"))
    one, two, moved = (str(tmp_path / name) for name in ("one", "two", "moved"))
    for path, content in ((one, b"same"), (two, b"same")):
        with open(path, "wb") as file:
            file.write(content)
    home = Store("home")
    known = KnownFiles(home)
    assert known.unknown([one, two, one]) == [one, two]
    learn(known, one, two)
    first = image_key(one)
    assert known.key(one) == first
    assert known.key(two) == image_key(two)  # equal files that are new together keep their own
    os.rename(one, moved)
    again = KnownFiles(home)
    assert again.unknown([moved]) == [moved]
    assert again.key(moved) == first  # nothing is learned by asking
    assert again.unknown([moved]) == [moved]
    learn(again, moved)
    assert KnownFiles(home).unknown([moved]) == []
    assert KnownFiles(home).key(moved) == first
    other = KnownFiles(Store("other"), home)
    assert other.key(moved) == first
    with open(moved, "wb") as file:
        file.write(b"changed")
    os.utime(moved, ns=(0, 10**18))
    assert KnownFiles(home).key(moved) == image_key(moved)
