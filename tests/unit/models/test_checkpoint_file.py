"""A file that is no checkpoint is told by its first bytes."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.checkpoint_file import check_checkpoint_file


def test_what_weights_are_kept_in_passes(tmp_path):
    state = {"a": torch.zeros(3)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe.safetensors")
    np.savez(tmp_path / "numpy.npz", a=np.zeros(3))
    for path in tmp_path.iterdir():
        check_checkpoint_file(path)


@pytest.mark.parametrize("content", [b"", b"root:x:0:0", b"{}", b"\xff\xd8\xff\xe0", b"\xff" * 8 + b"{"])
def test_anything_else_does_not(tmp_path, content):
    path = tmp_path / "mine.pt"
    path.write_bytes(content)
    with pytest.raises(EcifError, match="is no checkpoint"):
        check_checkpoint_file(path)
    with pytest.raises(EcifError, match="cannot be read"):
        check_checkpoint_file(tmp_path / "none.pt")
