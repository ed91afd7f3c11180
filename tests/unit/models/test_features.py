"""What an image and a caption are known by."""

import os

import pytest

from fiftyone_ecif import EcifError
from fiftyone_ecif.store.keys import pair_key


def test_a_key_knows_path_size_time_and_text(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    os.utime(path, ns=(0, 10**18))
    key = pair_key(str(path), "a red two")
    assert pair_key(str(path), "a red two") == key
    assert pair_key(str(path), "a red three").image == key.image
    assert pair_key(str(path), "a red three").caption != key.caption

    path.write_bytes(b"two")  # the same size
    os.utime(path, ns=(0, 10**18 + 1))
    assert pair_key(str(path), "a red two").image != key.image
    path.write_bytes(b"three")  # the same time
    os.utime(path, ns=(0, 10**18))
    assert pair_key(str(path), "a red two").image != key.image
    other = tmp_path / "b.png"
    other.write_bytes(b"one")
    os.utime(other, ns=(0, 10**18))
    assert pair_key(str(other), "a red two").image != key.image


def test_a_file_that_went_away_is_said(tmp_path):
    with pytest.raises(EcifError, match="went away"):
        pair_key(str(tmp_path / "gone.png"), "a red two")
