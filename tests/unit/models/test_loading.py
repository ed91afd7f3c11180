"""Images that threads read come in order, whatever cannot be read, and reading ends with who reads."""

import threading
import time

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from fiftyone_ecif.models.inputs import Images, loaded


@pytest.fixture
def files(tmp_path):
    paths = []
    for number in range(23):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        paths.append(str(path))
    (tmp_path / "7.png").write_bytes(b"no image")
    return paths


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_in_order(files, workers):
    found = list(loaded(Images(files, pil_to_tensor), 5, workers))
    assert [len(indices) + len(failures) for indices, _, failures in found] == [5, 5, 5, 5, 3]
    assert [index for indices, _, _ in found for index in indices] == [n for n in range(23) if n != 7]
    assert [list(failures) for _, _, failures in found] == [[], [7], [], [], []]
    for indices, images, _ in found:
        assert images.dtype.itemsize == 1
        np.testing.assert_array_equal(images[:, 0, 0, 0].numpy(), indices)


def test_a_batch_of_which_nothing_can_be_read(files):
    indices, images, failures = next(loaded(Images([files[7]] * 3, pil_to_tensor), 5, 2))
    assert (indices, images.numel(), len(failures)) == ([], 0, 3)


def test_who_stops_early_leaves_no_threads(files):
    read = []

    def slowly(image):
        read.append(1)
        time.sleep(0.01)
        return pil_to_tensor(image)

    before = threading.active_count()
    work = loaded(Images(files * 20, slowly), 5, 2)
    next(work)
    work.close()
    assert len(read) < 100
    time.sleep(0.3)
    assert threading.active_count() <= before
