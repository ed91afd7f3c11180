"""The last block of a tower, computed for the token that is read: embeddings and derivatives are open_clip's."""

import open_clip
import pytest
import torch
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

from fiftyone_ecif.models.last_block import LastBlock, last_of_image, last_of_text
from fiftyone_ecif.models.towers import Tower, differentiable_attention

END = 49
VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
VISIONS = {
    "one layer": {"layers": 1},
    "scaled layers": {"ls_init_value": 0.3},
    "norm after the pool": {"final_ln_after_pool": True},
}
TEXTS = {
    "largest": {},
    "one layer": {"layers": 1},
    "end": {"pool_type": "eos", "eos_id": END, "no_causal_mask": True},
    "first": {"pool_type": "first", "no_causal_mask": True},
    "last": {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
    "causal last": {"pool_type": "last"},
}
OTHER_VISIONS = {
    "mean": {"pool_type": "avg"},
    "attention": {"attentional_pool": True, "attn_pooler_heads": 2},
    "tokens too": {"output_tokens": True},
    "another kind of block": {"block_type": "custom"},
    "residual network": {"layers": [1, 1, 1, 1], "width": 8},
}
OTHER_TEXTS = {
    "a token of its own": {"embed_cls": True},
    "tokens too": {"output_tokens": True},
    "another kind of block": {"block_type": "custom"},
}


def make(kind, vision=None, text=None):
    torch.manual_seed(0)
    model = kind(embed_dim=16, vision_cfg=VISION | (vision or {}), text_cfg=TEXT | (text or {}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # none of them zero or one
    return model.eval().double().requires_grad_(False)


def inputs_of(tower):
    if tower == "image":
        return torch.randn(3, 3, 32, 32, dtype=torch.float64)
    tokens = torch.randint(1, END, (3, 8))
    tokens[range(3), [4, 7, 2]] = END
    return tokens


def plain(model, tower, inputs):
    encode = model.encode_image if tower == "image" else model.encode_text
    return encode(inputs, normalize=False)


KNOWN = [
    *((open_clip.CLIP, "image", {"vision": each}) for each in VISIONS.values()),
    *((kind, "text", {"text": each}) for kind in (open_clip.CLIP, open_clip.CustomTextCLIP) for each in TEXTS.values()),
]
NAMES = [*VISIONS, *TEXTS, *(f"custom, {name}" for name in TEXTS)]


@pytest.mark.parametrize(("kind", "tower", "config"), KNOWN, ids=NAMES)
def test_embeddings_and_derivatives_are_those_of_the_whole_block(kind, tower, config):
    if "eos_id" in config.get("text", {}) and not hasattr(open_clip.CLIPTextCfg, "eos_id"):
        pytest.skip("this open_clip has no pool at a token of the end")
    model = make(kind, **config)
    inputs = inputs_of(tower)
    part = model.visual if tower == "image" else getattr(model, "text", model)
    replaced = (last_of_image if tower == "image" else last_of_text)(part, inputs)
    assert [type(each) for each in replaced.values() if not isinstance(each, str)] == [LastBlock]
    weights = {name: value for name, value in model.named_parameters() if not name.startswith("logit")}
    moves = {name: torch.randn_like(value) for name, value in weights.items()}

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return plain(self.model, tower, inputs)

    def run(module, weights):
        return functional_call(module, {f"model.{name}": value for name, value in weights.items()}, (inputs,))

    with differentiable_attention():
        expected = jvp(lambda at: run(Plain(), at), (weights,), (moves,))
        found = jvp(lambda at: run(Tower(model, tower), at), (weights,), (moves,))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        slopes = torch.randn_like(expected[0])
        gradients = [
            torch.autograd.grad(run(module, leaves), list(leaves.values()), slopes, allow_unused=True)
            for module in (Plain(), Tower(model, tower))
        ]
    assert sum(each is not None for each in gradients[0]) > 10
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plain(model, tower, inputs), expected[0])  # the model is as it was


@pytest.mark.parametrize("config", OTHER_VISIONS.values(), ids=OTHER_VISIONS)
def test_an_image_tower_that_reads_more_is_run_as_it_is(config):
    model = make(open_clip.CLIP, vision=config)
    inputs = inputs_of("image")
    assert last_of_image(model.visual, inputs) == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.visual, "output_tokens", False, raising=False)
        torch.testing.assert_close(Tower(model, "image")(inputs), plain(model, "image", inputs))


@pytest.mark.parametrize("config", OTHER_TEXTS.values(), ids=OTHER_TEXTS)
def test_a_text_tower_that_reads_more_is_run_as_it_is(config):
    model = make(open_clip.CustomTextCLIP, text=config)
    assert last_of_text(model.text, inputs_of("text")) == {}


def test_nor_is_one_with_a_mask_of_padding():
    model = make(open_clip.CustomTextCLIP, text={"no_causal_mask": True})
    assert last_of_text(model.text, inputs_of("text"))
    model.text.use_pad_mask = True  # what no configuration of open_clip asks for
    assert last_of_text(model.text, inputs_of("text")) == {}


def test_the_last_block_costs_next_to_nothing():
    """Keys and values of all tokens and the rest of one: less than a fifth of the block."""
    one, two = (make(open_clip.CLIP, vision={"layers": layers, "patch_size": 4}) for layers in (1, 2))
    counts = {}
    for name, run in {
        "one": lambda inputs: plain(one, "image", inputs),
        "two": lambda inputs: plain(two, "image", inputs),
        "found": lambda inputs: Tower(two, "image")(inputs),
    }.items():
        with FlopCounterMode(display=False) as counted, differentiable_attention():
            run(inputs_of("image"))
        counts[name] = counted.get_total_flops()
    block = counts["two"] - counts["one"]
    assert counts["found"] - (counts["two"] - block) < block / 5
