"""What enters the part of a tower that varies is computed once for each pair, wherever it is kept."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from fiftyone_ecif.bench.speed.passes import network
from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.influence.targets import ZeroShotTarget
from fiftyone_ecif.models import entered_batches
from fiftyone_ecif.models.inputs import ImageTextBatches
from fiftyone_ecif.models.tower_cut import Activations
from fiftyone_ecif.models.tower_scope import TowerScope, scope_parameters

PAIRS, SIDE = 10, 32
PARTITION = [torch.tensor([7, 2, 4, 0]), torch.tensor([1, 3, 9]), torch.tensor([5, 8, 6])]


class Files:
    """Images that count how often they are read."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(256, (PAIRS, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
        self.paths, self.read = [f"{row}.png" for row in range(PAIRS)], []

    def __len__(self):
        return PAIRS

    def __getitem__(self, row):
        self.read.append(row)
        return row, self.pixels[row], None


def finish(images):
    assert images.dtype == torch.uint8
    return images.float() / 255


@pytest.fixture
def pairs():
    draw = torch.Generator().manual_seed(1)
    files, tokens = Files(), torch.randint(1, 1000, (PAIRS, 9), generator=draw)
    return SimpleNamespace(files=files, batches=ImageTextBatches(files, tokens, "cpu", PARTITION, finish))


def make_scope(text):
    model = network(64, 4)
    probe = torch.rand(2, 3, SIDE, SIDE), torch.randint(1, 1000, (2, 9))
    return TowerScope(model, scope_parameters(model, parse_scope(text), probe), SoftmaxLoss())


def results(scope, batches):
    """A gradient, its value, a product, and a gradient in other batches without some pairs."""
    objective = ContrastiveLoss(scope, batches, PAIRS)
    theta = scope.start * 1.01
    other = ContrastiveLoss(scope, batches.regrouped([torch.tensor([0, 1, 2]), torch.tensor([9, 4])]), PAIRS)
    found = [*objective.gradient_and_value(theta), objective.hessian_product(theta, theta)]
    return [*found, other.gradient_and_value(theta)[0]]


@pytest.fixture(params=["memory", "disk", "nowhere"])
def kept(request, monkeypatch, tmp_path):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path / "cache"))
    if request.param != "memory":
        monkeypatch.setattr(entered_batches, "_IN_MEMORY", 0)
    if request.param == "nowhere":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    return request.param


def test_it_is_the_same_wherever_it_is_kept(kept, pairs):
    scope = make_scope("blocks:1")
    expected = results(scope, pairs.batches)
    entered = scope.entered(pairs.batches)
    for found, wanted in zip(results(scope, entered), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    for side in entered[0]:
        assert isinstance(side, Activations)
    assert len(entered) == len(PARTITION)
    pairs.files.read.clear()
    pairs.batches._pixels.clear()
    entered[0]
    assert bool(pairs.files.read) == (kept == "nowhere")


def test_no_image_is_read_or_enters_twice(pairs, monkeypatch):
    scope, entering = make_scope("blocks:1"), []
    enter = scope.enter
    monkeypatch.setattr(
        scope, "enter", lambda tower, given: entering.append((tower, len(given))) or enter(tower, given)
    )
    entered = scope.entered(pairs.batches)
    results(scope, entered)
    assert sorted(pairs.files.read) == list(range(PAIRS))
    for tower in ("image", "text"):  # and one alone, which told whether the tower is cut
        assert sum(count for name, count in entering if name == tower) == PAIRS + 1


def test_pixels_are_kept_as_they_are_read_and_only_where_they_are_needed_again(pairs):
    scope = make_scope(".")
    whole = scope.entered(pairs.batches)
    assert whole[0][0].dtype == torch.float32
    whole[0], whole[0]
    assert sorted(pairs.files.read) == sorted(PARTITION[0].tolist())
    assert {pixels.dtype for pixels in pairs.batches._pixels.values()} == {torch.uint8}
    entered = make_scope("blocks:1").entered(pairs.batches)
    entered[1], entered[2]
    assert len(pairs.batches._pixels) == len(PARTITION[0]) + 1  # the image that told whether the tower is cut


def test_prompts_enter_once(pairs):
    scope = make_scope("blocks:1")
    prompts, labels = torch.randint(1, 1000, (6, 7)), torch.arange(PAIRS) % 3
    entered = scope.entered_captions(prompts)
    assert isinstance(entered, Activations)
    found, expected = (
        ZeroShotTarget(scope, pairs.batches, labels, each, templates=2).losses(scope.start)
        for each in (entered, prompts)
    )
    torch.testing.assert_close(found, expected)
