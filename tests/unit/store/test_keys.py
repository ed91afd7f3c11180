"""Digests: of a text, of parts, and of parts that are not in memory together."""

import hashlib

import pytest

from fiftyone_ecif.store.keys import digest, equal_files


def test_a_digest_is_of_the_text():
    assert digest("") == hashlib.blake2b(b"", digest_size=16).hexdigest() == "cae66941d9efbd404e4d88758ea67670"
    assert digest("a bird") == "4af80e2fc06bca998fe167129e8c9fff"
    assert digest("a bird", size=8) == hashlib.blake2b(b"a bird", digest_size=8).hexdigest()


@pytest.mark.parametrize("text", ["ü 紅", "\ud800", "\ud83d\udc36"], ids=ascii)
def test_texts_are_utf_8_also_where_they_are_no_unicode(text):
    assert digest(text) == digest([text.encode("utf-8", "surrogatepass")])


def test_parts_are_taken_one_after_another():
    taken = []

    def parts():
        for part in ("a ", b"bi", memoryview(b"rd")):
            taken.append(part)
            yield part

    assert digest(parts()) == digest("a bird")
    assert len(taken) == 3
    assert digest([]) == digest("")
    assert digest(["a", "b"]) != digest(["b", "a"])


def test_files_of_the_same_bytes_are_equal(tmp_path):
    contents = [b"one", b"two", b"one", b"three", b""]
    paths = [str(tmp_path / f"{n}.png") for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        with open(path, "wb") as file:
            file.write(content)
    assert equal_files([*paths, paths[1], str(tmp_path / "gone")]) == [0, 1, 0, 2, 3, 1, 4]
