"""A module with other parts, and the module itself as it was."""

import torch
from torch import nn

from fiftyone_ecif.models.replaced import replaced


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.register_buffer("shift", torch.ones(2))
        self.power = 1

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs**self.power + self.shift


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, inputs):
        return 2 * self.inner(inputs)


def test_parts_of_every_kind_are_replaced_and_the_rest_is_shared():
    torch.manual_seed(0)
    module, inputs = Outer(), torch.randn(3, 2)
    before = module(inputs)
    bias, shift = torch.randn(2), torch.randn(2)
    parts = {"inner.layers.0": nn.Identity(), "inner.layers.1.bias": bias, "inner.shift": shift, "inner.power": 3}
    view = replaced(module, parts)
    last = module.inner.layers[1]
    torch.testing.assert_close(view(inputs), 2 * ((inputs @ last.weight.T + bias) ** 3 + shift))
    torch.testing.assert_close(module(inputs), before)
    assert view.inner.layers[1].weight is last.weight
    with torch.no_grad():
        last.weight.zero_()
    torch.testing.assert_close(view(inputs), (2 * (bias**3 + shift)).expand(3, -1))


def test_without_parts_it_is_the_same():
    module, inputs = Outer(), torch.randn(3, 2)
    torch.testing.assert_close(replaced(module, {})(inputs), module(inputs))
