"""Layers of towers as forward mode does them fastest: what they compute is what torch computes, in fewer products."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

from fiftyone_ecif.bench.speed import passes
from fiftyone_ecif.models.flat_layers import FlatLayers
from fiftyone_ecif.models.tangents import LayerNorm, Linear, Softmax
from fiftyone_ecif.models.towers import differentiable_attention

WIDTH, TOKENS, PAIRS = 8, 5, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moving(*shape, seed=0):
    return random(*shape, seed=seed).requires_grad_()


WEIGHTS = {
    "all": (moving(4, 6), moving(7, 6, seed=1), moving(7, seed=2), moving(2, 6, seed=3), moving(7, 2, seed=4)),
    "without an adapter": (moving(4, 6), moving(7, 6, seed=1), moving(7, seed=2), None, None),
    "without a bias": (moving(4, 6), moving(7, 6, seed=1), None, None, None),
    "an adapter alone": (random(4, 6), random(7, 6, seed=1), None, moving(2, 6, seed=3), moving(7, 2, seed=4)),
    "a bias alone": (random(4, 6), random(7, 6, seed=1), moving(7, seed=2), None, None),
    "inputs alone": (moving(4, 6), random(7, 6, seed=1), random(7, seed=2), random(2, 6, seed=3), random(7, 2, seed=4)),
    "A alone": (random(4, 6), random(7, 6, seed=1), None, moving(2, 6, seed=3), random(7, 2, seed=4)),
}


@pytest.mark.parametrize("inputs", WEIGHTS.values(), ids=WEIGHTS)
def test_a_linear_layer_has_the_derivatives_of_what_it_computes(inputs):
    x, weight, bias, a, b = inputs
    expected = nn.functional.linear(x, weight if a is None else weight + b @ a, bias)
    torch.testing.assert_close(Linear.apply(*inputs), expected)
    assert gradcheck(Linear.apply, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(Linear.apply, inputs, check_fwd_over_rev=True)


def test_a_softmax_has_its_derivatives():
    scores = moving(2, 3, 4)
    torch.testing.assert_close(Softmax.apply(scores), scores.softmax(-1))
    assert gradcheck(Softmax.apply, scores, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(Softmax.apply, scores, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (moving(2, 3, 4), None, None),
        (moving(2, 3, 4), random(4, seed=1), random(4, seed=2)),
        (moving(2, 3, 4), moving(4, seed=1), moving(4, seed=2)),
        (random(2, 3, 4), moving(4, seed=1), random(4, seed=2)),
        (random(2, 3, 4), random(4, seed=1), moving(4, seed=2)),
    ],
)
def test_a_layer_norm_has_its_derivatives(x, weight, bias):
    inputs = x, [4], weight, bias, 1e-5
    torch.testing.assert_close(LayerNorm.apply(*inputs), nn.functional.layer_norm(*inputs))
    assert gradcheck(LayerNorm.apply, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(LayerNorm.apply, inputs, check_fwd_over_rev=True)


CAUSAL = torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)
PADDED = torch.arange(TOKENS) >= torch.tensor([TOKENS, TOKENS - 1, TOKENS - 2])[:, None]
EACH_HEADS = random(2 * PAIRS, TOKENS, TOKENS, seed=7)
ATTENTION = {
    "plain": ({}, {}),
    "causal": ({}, {"attn_mask": CAUSAL}),
    "a mask of bools": ({}, {"attn_mask": CAUSAL < 0}),
    "a mask for each head": ({}, {"attn_mask": EACH_HEADS}),
    "padding": ({}, {"key_padding_mask": PADDED}),
    "weights": ({}, {"need_weights": True}),
    "tokens first": ({"batch_first": False}, {}),
    "no bias": ({"bias": False}, {}),
    "a bias of keys": ({"add_bias_kv": True}, {}),
    "zero attention": ({"add_zero_attn": True}, {}),
}


@pytest.mark.parametrize(("made", "called"), ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("others", ["itself", "others", "other widths"])
def test_attention_with_adapters_is_torchs_with_merged_weights(made, called, others):
    torch.manual_seed(0)
    if others == "other widths":
        made = made | {"kdim": WIDTH + 1, "vdim": WIDTH + 2}
    layer = nn.MultiheadAttention(WIDTH, 2, **({"batch_first": True} | made)).double().eval().requires_grad_(False)
    x = random(PAIRS, TOKENS, WIDTH, seed=1) if layer.batch_first else random(TOKENS, PAIRS, WIDTH, seed=1)
    inputs = (x, x, x)
    if others != "itself":
        key, value = (1, 2) if others == "other widths" else (0, 0)
        inputs = x, random(*x.shape[:2], WIDTH + key, seed=2), random(*x.shape[:2], WIDTH + value, seed=3)
    called = {"need_weights": False} | called
    weights = {name: value for name, value in layer.named_parameters() if name.endswith("weight")}
    adapters = {
        name: (random(2, value.shape[1], seed=4), random(len(value), 2, seed=5)) for name, value in weights.items()
    }

    def apart(*inputs):
        with differentiable_attention(), FlatLayers(weights, adapters) as layers:
            outputs = functional_call(layer, weights, inputs, called)[0]
        assert not layers.unused
        return outputs

    merged = {name: value + adapters[name][1] @ adapters[name][0] for name, value in weights.items()}

    def together(*inputs):
        with differentiable_attention():
            return functional_call(layer, merged, inputs, called)[0]

    moves = tuple(random(*each.shape, seed=6) for each in inputs)
    for found, expected in zip(jvp(apart, inputs, moves), jvp(together, inputs, moves), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_weight_that_is_used_in_another_way_has_its_adapter_too():
    weight, a, b = random(6, 6), random(2, 6, seed=1), random(6, 2, seed=2)
    merged = weight + b @ a
    with FlatLayers({"w": weight}, {"w": (a, b)}) as layers:
        assert weight.shape == (6, 6)
        assert layers.unused == {"w"}
        torch.testing.assert_close(weight.T @ weight, merged.T @ merged)
        torch.testing.assert_close(torch.cat([weight, weight]), torch.cat([merged, merged]))
        torch.testing.assert_close(torch.add(1, other=weight), 1 + merged)
        assert not layers.unused


@pytest.mark.parametrize(("text", "most"), [("lora:2", 2.1), (".", 3.01)])
def test_a_derivative_takes_no_products_that_are_zero(text, most):
    """One more product a layer where adapters vary, two where weights do; attention takes two in any case."""
    scope, batch, _ = passes.problem(text, 8, 128, 2)
    with FlopCounterMode(display=False) as once:
        scope.similarity(scope.start, batch)
    with FlopCounterMode(display=False) as moved:
        scope.similarity_and_tangent(scope.start, batch, scope.start)
    assert moved.get_total_flops() <= most * once.get_total_flops()
