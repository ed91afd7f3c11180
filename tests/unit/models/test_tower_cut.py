"""Towers cut before what varies: the same numbers, with what comes before computed once."""

import open_clip
import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

from fiftyone_ecif.bench.models.small import small_model
from fiftyone_ecif.bench.speed import passes
from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.tower_cut import Activations, Resumed, TowerCut
from fiftyone_ecif.models.tower_scope import TowerScope, scope_parameters
from fiftyone_ecif.models.towers import Tower, differentiable_attention

FAMILIES = (
    *("ViT-B-32", "ViT-B-32-quickgelu", "RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "EVA02-B-16", "PE-Core-B-16"),
    *("convnext_base", "swin_base_patch4_window7_224", "MobileCLIP-S1", "ViTamin-B", "ViT-H-14-CLIPA"),
)
PAIRS = 4


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder, models = tmp_path_factory.mktemp("small"), {}

    def run(name):
        if name not in models:
            small, weights = small_model(name, folder)
            model = open_clip.create_model(small, pretrained=str(weights)).eval().double().requires_grad_(False)
            size = model.visual.image_size
            draw = torch.Generator().manual_seed(0)
            pixels = torch.rand(PAIRS, 3, *(size if isinstance(size, tuple) else (size, size)), generator=draw).double()
            models[name] = model, (pixels, torch.randint(3, 20, (PAIRS, 12), generator=draw))
        return models[name]

    return run


def random_like(theta, seed):
    return torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed), dtype=theta.dtype)


def whole(scope, theta, batch):
    """By open_clip's towers, run from their inputs to their end."""
    found = []
    for tower, inputs in zip(("image", "text"), batch, strict=True):
        changed = {f"model.{name}": value for name, value in scope.parameters(theta).items()}
        own = {name: value for name, value in changed.items() if ("visual." in name) == (tower == "image")}
        with differentiable_attention():
            found.append(functional_call(Tower(scope.model, tower), own, (inputs,)))
    return scope.compare(theta, *found)


@pytest.mark.parametrize("text", ["blocks:1", "lora:2:1"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_cut_and_gives_the_same(name, text, make):
    model, batch = make(name)
    choice = parse_scope(text)
    scope = TowerScope(model, scope_parameters(model, choice, batch), SoftmaxLoss(), choice.rank)
    entered = tuple(map(scope.enter, ("image", "text"), batch))
    assert [type(side) for side in entered] == [Activations, Activations]
    theta = scope.start + 0.05 * random_like(scope.start, 1)
    moves = (random_like(theta, 2),)
    expected = jvp(lambda at: whole(scope, at, batch), (theta,), moves)
    for given in (batch, entered, (entered[0], batch[1])):
        found = jvp(lambda at, given=given: scope.similarity(at, given), (theta,), moves)
        torch.testing.assert_close(found, expected)
    some = torch.tensor([2, 0, 2])
    found = scope.similarity(theta, tuple(side[some] for side in entered))
    torch.testing.assert_close(found, expected[0][some][:, some])
    one = tuple(side[1][None] for side in entered)
    torch.testing.assert_close(scope.similarity(theta, one), expected[0][1:2, 1:2])


def test_a_tower_that_nothing_varies_in_is_not_run_again(make):
    model, batch = make("ViT-B-32")
    scope = TowerScope(model, ["visual.proj"], SoftmaxLoss())
    entered = tuple(map(scope.enter, ("image", "text"), batch))
    assert entered[1].rows.shape == (PAIRS, 32)
    with FlopCounterMode(display=False) as counted:
        found = scope.similarity(scope.start, entered)
    assert counted.get_total_flops() <= 2 * PAIRS * 32 * (48 + PAIRS)
    torch.testing.assert_close(found, whole(scope, scope.start, batch))


@pytest.mark.parametrize("text", [".", "lora:2"])
def test_what_varies_from_the_start_on_is_not_worth_it(text, make):
    model, batch = make("ViT-B-32")
    choice = parse_scope(text)
    scope = TowerScope(model, scope_parameters(model, choice, batch), SoftmaxLoss(), choice.rank)
    assert all(scope.enter(tower, side) is side for tower, side in zip(("image", "text"), batch, strict=True))


def test_captions_of_another_length_are_cut_too(make):
    model, (pixels, tokens) = make("ViT-B-32")
    scope = TowerScope(model, scope_parameters(model, parse_scope("blocks:1"), (pixels, tokens)), SoftmaxLoss())
    for length in (12, 7):
        short = tokens[:, :length]
        entered = scope.enter("text", short)
        assert isinstance(entered, Activations)
        expected = Tower(model, "text")(short)
        torch.testing.assert_close(scope.embed_captions(scope.start, entered), expected)


def test_passes_take_a_share_of_a_forward_pass():
    """Of twelve blocks and two that vary: a forward pass of these, and products with their derivative."""
    scope, batch, _ = passes.problem("blocks:2", 4, 64, 12)
    entered = tuple(map(scope.enter, ("image", "text"), batch))
    scope.similarity(scope.start, entered)
    counts = {}
    for name, run in {
        "whole": lambda: whole(scope, scope.start, batch),
        "forward": lambda: scope.similarity(scope.start, entered),
        "direct": lambda: scope.similarity_and_tangent(scope.start, entered, scope.start),
    }.items():
        with FlopCounterMode(display=False) as counted:
            run()
        counts[name] = counted.get_total_flops()
    assert counts["forward"] <= 3 / 12 * counts["whole"]
    assert counts["direct"] <= 3 * 2.1 / 12 * counts["whole"]


class Odd(nn.Module):
    """A tower of two layers, with something odd between them."""

    def __init__(self, odd):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.odd = nn.Linear(4, 4), nn.Linear(4, 3), odd

    def forward(self, inputs):
        return self.last(self.odd(self.first(inputs)))


def decides(x):
    return x if x.sum() > 0 else -x


def counts(x):
    return torch.cat([x[: len(x) // 2] + 1, x[len(x) // 2 :] + 2])


def mixes(x):
    return x + x.mean(0)


def changes(x):
    y = x * 1
    return y + y.relu_()


def transposes(x):
    return x.T.contiguous().T.clone()


def remembers(x):
    return x + torch.ones(len(x), 1)


@pytest.mark.parametrize("odd", [decides, mixes, counts])
def test_what_cannot_be_foreseen_is_run_as_a_whole(odd):
    tower = Odd(odd).requires_grad_(False)
    inputs = torch.randn(PAIRS, 4, generator=torch.Generator().manual_seed(1))
    assert TowerCut(tower, {"last.weight": tower.last.weight}).enter(inputs) is None


@pytest.mark.parametrize("odd", [changes, transposes, remembers])
def test_what_can_be_foreseen_is_cut(odd):
    tower = Odd(odd).requires_grad_(False)
    inputs = torch.randn(PAIRS, 4, generator=torch.Generator().manual_seed(1))
    entered = TowerCut(tower, {"last.weight": tower.last.weight}).enter(inputs)
    assert entered is not None
    with Resumed(entered) as rest:
        found = tower(rest.inputs)
    torch.testing.assert_close(found, tower(inputs))
