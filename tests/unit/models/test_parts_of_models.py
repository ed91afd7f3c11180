"""Which parameters a scope means in models of other families, and that no other has to do with the loss."""

import open_clip
import pytest
import torch

from fiftyone_ecif.bench.models.small import small_model
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.tower_scope import TowerScope, scope_parameters
from fiftyone_ecif.models.used_parameters import used_parameters

TEXT = "transformer.resblocks.1."
LAST = {
    "ViT-B-16-SigLIP": ("visual.trunk.blocks.1.", "text." + TEXT),
    "coca_ViT-B-32": ("visual.transformer.resblocks.1.", "text." + TEXT),  # and not the decoder of captions
    "convnext_base": ("visual.trunk.stages.3.blocks.1.", TEXT),
    "swin_base_patch4_window7_224": ("visual.trunk.layers.3.blocks.1.", TEXT),  # and not a whole stage
    "MobileCLIP-S1": ("visual.trunk.stages.3.blocks.1.", "text." + TEXT),
    "mt5-base-ViT-B-32": ("visual.transformer.resblocks.1.", "text.transformer.block.1."),  # both halves
    "nllb-clip-base": ("visual.transformer.resblocks.1.", "text.transformer.layers.1."),
    "roberta-ViT-B-32": ("visual.transformer.resblocks.1.", "text.transformer.encoder.layer.1."),
}
OF_TRANSFORMERS = ("mt5-base-ViT-B-32", "nllb-clip-base", "roberta-ViT-B-32")
each_family = pytest.mark.parametrize("name", LAST)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    models = {}

    def run(name):
        if name in OF_TRANSFORMERS:
            pytest.importorskip("transformers")
        if name not in models:
            small, weights = small_model(name, folder)
            model = open_clip.create_model(small, pretrained=str(weights)).eval().double().requires_grad_(False)
            size = model.visual.image_size
            draw = torch.Generator().manual_seed(0)
            pixels = torch.rand(3, 3, *(size if isinstance(size, tuple) else (size, size)), generator=draw).double()
            models[name] = model, (pixels, torch.randint(3, 20, (3, 12), generator=draw))
        return models[name]

    return run


def logits(model, probe):
    """As open_clip computes them."""
    images, texts = model.encode_image(probe[0], normalize=True), model.encode_text(probe[1], normalize=True)
    bias = getattr(model, "logit_bias", None)
    return model.logit_scale.exp() * images @ texts.T + (0 if bias is None else bias)


@each_family
def test_the_last_block_of_both_towers(name, make):
    model, probe = make(name)
    found = scope_parameters(model, parse_scope("blocks:1"), probe)
    assert set(found) == {key for key, _ in model.named_parameters() if key.startswith(LAST[name])}
    assert all(any(key.startswith(part) for key in found) for part in LAST[name])


@each_family
def test_what_is_left_out_does_not_change_the_loss(name, make):
    model, probe = make(name)
    used = used_parameters(model, probe)
    unused = {key: value for key, value in model.named_parameters() if key not in used}
    assert bool(unused) == name.startswith("coca")
    before = logits(model, probe)
    kept = {key: value.clone() for key, value in unused.items()}
    with torch.no_grad():
        for value in unused.values():
            value.mul_(2).add_(1)
        after = logits(model, probe)
        for key, value in unused.items():
            value.copy_(kept[key])
    assert torch.equal(before, after)
    assert set(scope_parameters(model, parse_scope("."), probe)) == used


def test_a_pattern_of_what_is_not_used_is_refused(make):
    model, probe = make("coca_ViT-B-32")
    with pytest.raises(EcifError, match=r"only parameters that the loss does not depend on, such as text_decoder"):
        scope_parameters(model, parse_scope("^text_decoder"), probe)


@each_family
def test_adapters_are_on_layers_of_attention_and_mlp(name, make):
    model, probe = make(name)
    names = scope_parameters(model, parse_scope("lora:2:1"), probe)
    assert names
    assert not any(
        word in key for key in names for word in ("bias_table", "query", "norm", "embed") if "self" not in key
    )
    scope = TowerScope(model, names, SigmoidLoss() if "SigLIP" in name else SoftmaxLoss(), 2)
    theta = scope.start + 0.1 * torch.randn(len(scope.start), generator=torch.Generator().manual_seed(1)).double()
    found = scope.similarity(theta, probe)
    kept = {key: model.get_parameter(key).clone() for key in names}
    with torch.no_grad():
        for key, value in scope.parameters(theta).items():
            a, b = scope.adapters(theta)[key]
            assert (len(a), b.shape[1]) == (2, 2)
            torch.testing.assert_close(value.flatten(1), kept[key].flatten(1) + b @ a)
            model.get_parameter(key).copy_(value)
        expected = logits(model, probe)
        for key, value in kept.items():
            model.get_parameter(key).copy_(value)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("MobileCLIP-S1", {"token_mixer.qkv", "token_mixer.proj", "mlp.fc1", "mlp.fc2"}),  # an MLP of convolutions
        ("swin_base_patch4_window7_224", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),  # not its table of biases
    ],
)
def test_what_adapters_are_on_in_the_image_tower(name, matrices, make):
    model, probe = make(name)
    found = scope_parameters(model, parse_scope("lora:2:1"), probe)
    assert {key for key in found if key.startswith("visual.")} == {f"{LAST[name][0]}{end}.weight" for end in matrices}


def test_pool_queries_have_no_adapter(make):
    model, probe = make("coca_ViT-B-32")
    found = scope_parameters(model, parse_scope("lora:2:1"), probe)
    pool = {key for key in found if "attn_pool" in key}
    assert pool
    assert not any(key.endswith("query") for key in pool)
