"""Files that are replaced as a whole or not at all."""

import os

import pytest

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import atomic_path, user_path, write_file

each_way = pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])


@each_way
def test_a_file_is_replaced_when_all_is_written(shared, tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    for content in ("first", "second"):
        with atomic_path(path, shared) as temporary:
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
        assert os.listdir(path.parent) == ["file.txt"]


def write_half(path, shared, error):
    with atomic_path(path, shared) as temporary:
        temporary.write_text("half")
        raise error


@each_way
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, GeneratorExit])
def test_what_was_there_stays_and_nothing_else_is_left(error, shared, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(error):
        write_half(path, shared, error)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_writers_of_one_file_do_not_write_into_each_other(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_path(path, shared=True) as first, atomic_path(path, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # it ended last


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    path = tmp_path / "file.txt"
    (tmp_path / "file.txt.tmp").write_text("half of it, and longer")
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_error_is_told_as_it_was(tmp_path):
    (tmp_path / "file.txt.tmp").mkdir()
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_text("")
    assert (tmp_path / "file.txt.tmp").is_dir()
    with pytest.raises(ValueError, match="null"), atomic_path(tmp_path / "a\0b") as temporary:
        temporary.write_text("")


def test_a_file_of_the_store_is_for_the_user_alone(tmp_path):
    write_file(tmp_path / "table" / "part", b"content")
    assert (tmp_path / "table" / "part").read_bytes() == b"content"
    assert (tmp_path / "table" / "part").stat().st_mode & 0o777 == 0o600
    with pytest.raises(EcifError, match=r"store cannot be written .*cache --free"):
        write_file(tmp_path / "table" / "part" / "below", b"")


@pytest.mark.parametrize("text", [" ~/a b.pt\n", '"~/a b.pt"', " '~/a b.pt' ", "~/a b.pt"])
def test_a_path_as_a_person_gives_it(text, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(user_path(text)) == "/home/me/a b.pt"
