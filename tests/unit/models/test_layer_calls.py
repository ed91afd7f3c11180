"""Gradients from what layers took and what came back to them, against autograd for one sample after another."""

import open_clip
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.layer_calls import SampleLayers
from fiftyone_ecif.models.tower_cut import Activations
from fiftyone_ecif.models.tower_scope import TowerScope, scope_parameters

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
VISIONS = {
    "vit": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "convnext": {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "image_size": 32},
}


def along(way, scope, tower, inputs, directions, basis=None):
    """The gradients along each of some directions, ``(n, q, d)``, as a way of a scope gives them."""
    found = way(scope, scope.start, tower, inputs, basis)
    plain = {"image": scope.embed_images, "text": scope.embed_captions}[tower](scope.start, inputs)
    torch.testing.assert_close(found.embeddings, plain)
    return torch.stack([found.along(direction) for direction in directions.unbind(1)], 1)


def make_scope(vision, text):
    torch.manual_seed(0)
    model = (
        open_clip.CLIP(embed_dim=16, vision_cfg=VISIONS[vision], text_cfg=TEXT).eval().double().requires_grad_(False)
    )
    side = VISIONS[vision]["image_size"]
    batch = torch.randn(3, 3, side, side, dtype=torch.float64), torch.randint(1, 50, (3, 8))
    choice = parse_scope(text)
    scope = TowerScope(model, scope_parameters(model, choice, batch), SoftmaxLoss(), choice.rank)
    if choice.rank:
        scope.start = scope.start + 0.05 * torch.randn_like(scope.start)
    return scope, batch


@pytest.mark.parametrize("text", ["lora:2", "blocks:1", "."])
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_gradients_of_each_sample_are_those_of_autograd(vision, text):
    scope, batch = make_scope(vision, text)
    directions = torch.randn(3, 2, 16, dtype=torch.float64)
    basis = torch.randn(len(scope.start), 4, dtype=torch.float64)
    for tower, inputs in zip(("image", "text"), batch, strict=True):
        expected = along(Scope.sample_gradients, scope, tower, inputs, directions)
        assert expected.abs().max() > 0
        whole = along(TowerScope.sample_gradients, scope, tower, inputs, directions)
        torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-12)
        kept = along(TowerScope.sample_gradients, scope, tower, inputs, directions, basis)
        torch.testing.assert_close(kept, expected @ basis, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("text", ["lora:2:1", "blocks:1"])
def test_so_are_those_from_where_the_towers_are_cut(text):
    scope, batch = make_scope("vit", text)
    directions = torch.randn(3, 2, 16, dtype=torch.float64)
    for tower, inputs in zip(("image", "text"), batch, strict=True):
        entered = scope.enter(tower, inputs)
        assert isinstance(entered, Activations)
        expected = along(Scope.sample_gradients, scope, tower, inputs, directions)
        found = along(TowerScope.sample_gradients, scope, tower, entered, directions)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_so_are_those_of_convolutions():
    scope, batch = make_scope("convnext", "lora:1:1")
    directions = torch.randn(3, 1, 16, dtype=torch.float64)
    expected = along(Scope.sample_gradients, scope, "image", batch[0], directions)
    found = along(TowerScope.sample_gradients, scope, "image", batch[0], directions)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("text", ["lora:2", "blocks:1"])
def test_no_sample_is_differentiated_alone_where_all_layers_are_seen(monkeypatch, text):
    scope, batch = make_scope("vit", text)
    monkeypatch.setattr(scope, "_embed", None)  # what autograd would call
    for tower, inputs in zip(("image", "text"), batch, strict=True):
        scope.sample_gradients(scope.start, tower, inputs).along(torch.randn(3, 16, dtype=torch.float64))


class Odd(nn.Module):
    """Layers that are used in ways that could be taken for others."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.way = way

    def forward(self, inputs):  # (n, 3, 4)
        hidden = self.first(inputs)
        if self.way == "transposed":
            hidden = hidden @ self.first.weight.T
        elif self.way == "through a gelu":
            hidden = hidden + functional.gelu(self.first.bias)
        elif self.way == "as an input":
            hidden = hidden @ functional.linear(self.first.weight, self.second.weight)
        elif self.way == "normalised":
            hidden = hidden @ functional.layer_norm(self.first.weight, [4], self.second.bias)
        elif self.way == "overwritten":
            hidden.relu_()
        elif self.way == "input overwritten":
            hidden = 2 * hidden
            found = self.second(hidden)
            hidden.zero_()
            return found.sum(1)
        elif self.way == "twice":
            hidden = self.first(hidden.tanh())
        elif self.way == "sequence first":
            hidden = hidden.transpose(0, 1).flatten(0, 1)
            return self.second(hidden.tanh()).view(3, -1, 4).sum(0)
        elif self.way == "windows":
            hidden = hidden.flatten(0, 1)
            return self.second(hidden.tanh()).view(-1, 3, 4).sum(1)
        elif self.way == "frozen":
            hidden = hidden.detach()
        elif self.way == "by count" and len(inputs) > 1:
            hidden = functional.linear(hidden, self.second.weight)
        return self.second(hidden.tanh()).sum(1)


WAYS = {
    "plain": {"first", "second"},
    "transposed": {"first.bias", "second"},
    "through a gelu": {"first.weight", "second"},
    "as an input": {"first.bias", "second.bias"},
    "normalised": {"first.bias", "second.weight"},
    "overwritten": {"second"},
    "input overwritten": {"first"},
    "twice": {"first", "second"},
    "sequence first": {"first", "second"},
    "windows": {"first", "second"},
    "frozen": {"first", "second"},
    "by count": set(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [3, 2])  # three is also the length of the sequence
def test_what_is_not_understood_is_not_given(way, count):
    torch.manual_seed(0)
    module = Odd(way).double().requires_grad_(False)
    weights = dict(module.named_parameters())
    inputs, direction = torch.randn(count, 3, 4, dtype=torch.float64), torch.randn(count, 4, dtype=torch.float64)
    layers = SampleLayers(lambda each: functional_call(module, weights, (each,)), inputs, weights, {})
    seen = {name for name in weights if name.startswith(tuple(WAYS[way]))}
    assert layers.names == seen
    found = {name: torch.zeros(count, weights[name].numel(), dtype=torch.float64) for name in seen}
    for name, rows in layers.gradients(direction):
        found[name] += rows
    for n in range(count if seen else 0):
        leaves = {name: value.clone().requires_grad_(name in seen) for name, value in weights.items()}
        embedding = functional_call(module, leaves, (inputs[n : n + 1],))[0]
        names = sorted(seen)
        expected = torch.autograd.grad(
            embedding, [leaves[name] for name in names], direction[n], allow_unused=True, materialize_grads=True
        )
        for name, one in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][n], one.flatten(), rtol=1e-10, atol=1e-12)


class Attends(nn.Module):
    """Attention between the parts of an image, in ways that torch has for it."""

    def __init__(self, way):
        super().__init__()
        widths = {"kdim": 3, "vdim": 2} if way == "narrow keys" else {}
        self.layer, self.way = nn.MultiheadAttention(4, 2, batch_first=True, **widths), way
        self.masks = torch.randn(3 * 2, 5, 5, dtype=torch.float64)
        if way == "a weight as a mask":
            self.between = nn.Linear(5, 5)

    def forward(self, inputs):  # (n, 5, 4)
        told = {"attn_mask": self.masks[: 2 * len(inputs)]} if self.way == "each head's mask" else {}
        if self.way == "a weight as a mask":
            inputs, told = self.between(inputs.mT).mT, {"attn_mask": self.between.weight}
        keys, values = inputs, inputs
        if self.way == "other keys":
            keys, values = inputs.flip(1), inputs.tanh()
        elif self.way == "narrow keys":
            keys, values = inputs[..., :3], inputs[..., :2]
        mixed = self.layer(inputs, keys, values, need_weights=self.way == "with weights", **told)[0]
        return functional.gelu(mixed, approximate="tanh").sum(1)


@pytest.mark.parametrize(
    ("way", "hidden"),
    [
        ("plain", set()),
        ("other keys", set()),
        ("narrow keys", {"layer.in_proj_bias"}),
        ("each head's mask", set()),
        ("a weight as a mask", {"between.weight"}),
        ("with weights", {f"layer.{name}" for name, _ in nn.MultiheadAttention(4, 2).named_parameters()}),
    ],
)
def test_layers_within_attention_are_seen(way, hidden):
    torch.manual_seed(0)
    module = Attends(way).double().eval().requires_grad_(False)
    weights = dict(module.named_parameters())
    inputs, direction = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    layers = SampleLayers(lambda each: functional_call(module, weights, (each,)), inputs, weights, {})
    assert layers.names == set(weights) - hidden
    for _ in range(2 if layers.names else 0):  # passes
        found = {name: torch.zeros(3, weights[name].numel(), dtype=torch.float64) for name in layers.names}
        for name, rows in layers.gradients(direction):
            found[name] += rows
        for name, rows in found.items():
            leaf = weights[name].clone().requires_grad_()
            embeddings = functional_call(module, weights | {name: leaf}, (inputs,))
            for n in range(3):
                expected = torch.autograd.grad(embeddings[n] @ direction[n], leaf, retain_graph=True)[0]
                torch.testing.assert_close(rows[n], expected.flatten())
