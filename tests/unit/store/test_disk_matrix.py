"""Matrices on disk against the same matrices in memory."""

import numpy as np
import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.disk_matrix import DiskMatrix


@pytest.fixture
def both(tmp_path):
    """A matrix in memory and on disk."""
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    rows = DiskMatrix(50, 7, tmp_path)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).numpy()
    for places in np.array_split(order, 4):
        rows.write(places, values[places].numpy())
    return values, rows


def test_rows_are_read_as_from_a_tensor(both):
    values, rows = both
    assert len(rows) == 50
    assert rows.shape == values.shape
    for index in (torch.tensor([3, 3, 49, 0, 1, 2]), slice(4, 9), slice(None), torch.tensor([], dtype=torch.long)):
        torch.testing.assert_close(rows[index], values[index], rtol=0, atol=0)
    mask = torch.arange(50) % 3 == 0
    torch.testing.assert_close(rows[mask], values[mask], rtol=0, atol=0)


def test_a_selection_of_a_selection(both):
    values, rows = both
    first, second = torch.tensor([9, 4, 30, 4]), np.array([3, 0, 2])
    found = rows.select(first).select(second)
    assert found.shape == (3, 7)
    torch.testing.assert_close(found[:], values[first][second], rtol=0, atol=0)
    torch.testing.assert_close(found[torch.tensor([2])], values[[30]], rtol=0, atol=0)


def test_what_was_not_written_is_zero_and_no_width_is_fine(tmp_path):
    rows = DiskMatrix(4, 3, tmp_path)
    rows.write([2], np.ones((1, 3)))
    assert rows[:].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert DiskMatrix(4, 0, tmp_path)[torch.tensor([1, 3])].shape == (2, 0)


def test_the_file_has_no_name(both, tmp_path):
    assert list(tmp_path.iterdir()) == []


def test_places_out_of_range_are_refused(both):
    for place in (50, -1):
        with pytest.raises(IndexError):
            both[1][torch.tensor([0, place])]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    rows = DiskMatrix(4, 3, tmp_path)

    class Full:
        def seek(self, place): ...

        def write(self, values):
            raise OSError(28, "No space left on device")

    rows._file = Full()
    with pytest.raises(EcifError, match=r"cannot be written to .* \(No space left on device\)\. Make room"):
        rows.write([0], np.ones((1, 3)))


def test_rows_can_be_read_inside_a_function_that_is_differentiated(both):
    values, rows = both
    chosen = torch.tensor([4, 2])
    gradient = torch.func.grad(lambda weight: (rows[chosen] @ weight).sum())(torch.ones(7))
    torch.testing.assert_close(gradient, values[chosen].sum(0))
