"""Scopes inside the towers: names, similarity, adapters, and influence by brute force through the model."""

import re

import open_clip
import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models import tower_scope
from fiftyone_ecif.models.tower_scope import TowerScope

VIT = {"layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
MODELS = {"vit": (VIT, {}), "resnet": (RESNET, {}), "sigmoid": (VIT, {"init_logit_bias": -2.0})}
PAIRS = 5

BARE = {
    "vit": r"^visual.*resblocks\.1\.attn\.in_proj_weight$",
    "resnet": r"^transformer\.resblocks\.1\.attn\.in_proj_weight$",
    "sigmoid": r"^transformer\.resblocks\.0\.attn\.in_proj_weight$",
}
PROJECTION = {"vit": r"^visual\.proj$", "resnet": r"^visual\.attnpool\.c_proj", "sigmoid": r"^visual\.proj$"}
SCOPES = ["bare", "projection", "^text_projection$", "^logit_scale$", "blocks:1", "lora:2", "lora:2:1", "."]
each_model = pytest.mark.parametrize("name", MODELS)
each_scope = pytest.mark.parametrize("text", SCOPES)

BLOCK = {
    "ln_1.weight",
    "ln_1.bias",
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
}
MATRICES = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
POOL = {f"visual.attnpool.{part}_proj.weight" for part in "qkvc"}


def make_model(name, seed=0):
    torch.manual_seed(seed)
    vision, options = MODELS[name]
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg={"image_size": 32, **vision}, text_cfg=text, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # none of them zero or one, and attention that is not flat
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().double().requires_grad_(False)


def make_batch(pairs=PAIRS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(pairs, 3, 32, 32, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(1, 20, (pairs, 8), generator=generator)


def scope_parameters(model, choice):
    pixels, tokens = make_batch(2)
    return tower_scope.scope_parameters(model, choice, (pixels.to(model.logit_scale.dtype), tokens))


def choose(name, text):
    return parse_scope({"bare": BARE[name], "projection": PROJECTION[name]}.get(text, text))


def make_scope(model, name, text, **options):
    choice = choose(name, text)
    loss = SigmoidLoss() if name == "sigmoid" else SoftmaxLoss()
    return TowerScope(model, scope_parameters(model, choice), loss, choice.rank, **options)


def varied(scope, size=0.1, seed=1):
    """Other parameters; the B of every adapter is not zero there."""
    return scope.start + size * torch.randn(len(scope.start), generator=torch.Generator().manual_seed(seed)).double()


def run_model(model, batch):
    """The logits as open_clip's own code computes them."""
    images, texts, scale, *bias = model(*batch)
    return scale * images @ texts.T + (bias[0] if bias else 0)


def put(model, values):
    """Overwrites parameters in place: the plain way to change a model."""
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)


def in_blocks(parts, *blocks):
    return {f"{block}.{part}" for block in blocks for part in parts}


@each_model
def test_a_pattern_means_the_parameters_that_it_is_found_in(name):
    model = make_model(name)
    names = [key for key, _ in model.named_parameters()]
    assert len(scope_parameters(model, choose(name, "bare"))) == 1
    for text in ("^text_projection$", "^logit_scale$"):
        assert scope_parameters(model, parse_scope(text)) == [text.strip("^$")]
    assert scope_parameters(model, parse_scope(".")) == names
    assert set(scope_parameters(model, parse_scope("ln_1"))) == {key for key in names if "ln_1" in key}
    expected = ["visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias"] if name == "resnet" else ["visual.proj"]
    assert scope_parameters(model, choose(name, "projection")) == expected
    assert ("logit_bias" in names) == (name == "sigmoid")


@each_model
def test_blocks_are_the_last_of_both_towers(name):
    model = make_model(name)
    found = scope_parameters(model, parse_scope("blocks:1"))
    text = in_blocks(BLOCK, "transformer.resblocks.1")
    if name == "resnet":
        image = {key for key, _ in model.named_parameters() if key.startswith("visual.layer4.0.")}
        assert len(image) > 10
    else:
        image = in_blocks(BLOCK, "visual.transformer.resblocks.1")
    assert set(found) == image | text
    assert len(found) == len(set(found))
    both = set(scope_parameters(model, parse_scope("blocks:2")))
    assert both > set(found)
    assert in_blocks(BLOCK, "transformer.resblocks.0", "transformer.resblocks.1") < both
    assert not any("layer1" in key or "layer2" in key for key in both)


@each_model
def test_adapters_are_on_the_matrices_of_attention_and_mlp(name):
    model = make_model(name)
    text = [f"transformer.resblocks.{number}" for number in range(2)]
    image = [f"visual.{block}" for block in text]
    every, last = (in_blocks(MATRICES, *text), in_blocks(MATRICES, text[-1]))
    if name == "resnet":  # convolutions have no adapter, the attention pool has
        every, last = every | POOL, last | POOL
    else:
        every, last = every | in_blocks(MATRICES, *image), last | in_blocks(MATRICES, image[-1])
    assert set(scope_parameters(model, parse_scope("lora:2"))) == every
    assert set(scope_parameters(model, parse_scope("lora"))) == every
    assert set(scope_parameters(model, parse_scope("lora:2:1"))) == last


@each_model
@each_scope
def test_the_start_is_the_model_as_it_is(name, text):
    model, batch = make_model(name), make_batch()
    scope = make_scope(model, name, text)
    expected = run_model(model, batch)
    torch.testing.assert_close(scope.similarity(scope.start, batch), expected, rtol=1e-10, atol=1e-10)
    for key, value in scope.parameters(scope.start).items():
        torch.testing.assert_close(value, model.get_parameter(key))
    assert not torch.allclose(scope.similarity(varied(scope), batch), expected, rtol=1e-4)


@each_model
@each_scope
def test_other_parameters_are_the_model_overwritten(name, text):
    """Adapters too: with a B that is not zero they equal the model with B A merged in by hand."""
    model, batch = make_model(name), make_batch()
    scope = make_scope(model, name, text)
    theta = varied(scope)
    found = scope.similarity(theta, batch)
    merged = make_model(name)
    if scope.rank is None:
        pieces, start = {}, 0
        for key, value in model.named_parameters():
            if key in scope.names:
                pieces[key] = theta[start : start + value.numel()].view(value.shape)
                start += value.numel()
    else:
        assert set(scope.adapters(theta)) == set(scope.names)
        pieces = {}
        for key, (a, b) in scope.adapters(theta).items():
            assert (a.shape[0], b.shape[1]) == (2, 2)
            assert b.abs().max() > 0
            pieces[key] = model.get_parameter(key) + torch.einsum("ir,rj->ij", b, a)
    put(merged, pieces)
    torch.testing.assert_close(found, run_model(merged, batch), rtol=1e-10, atol=1e-10)
    for key, value in make_model(name).state_dict().items():  # and the scope's own model stays as it was
        assert torch.equal(value, model.state_dict()[key])


def central_difference(function, theta, direction, step=1e-5):
    return (function(theta + step * direction) - function(theta - step * direction)) / (2 * step)


@each_model
@each_scope
def test_direct_mode_equals_per_pair_autograd_through_the_model(name, text):
    """Each pair is taken out for real: what changes is differentiated by autograd."""
    scope = make_scope(make_model(name), name, text)
    batch = make_batch()
    start = varied(scope, 0.02)
    direction = torch.randn(len(start), generator=torch.Generator().manual_seed(2)).double()
    positive, negative = batch_influence(scope, start, batch, direction, pairs=17)

    theta = start.clone().requires_grad_()
    every = scope.similarity(theta, batch)
    size = (positive.abs() + negative.abs()).max().item()
    assert size > 0
    assert negative.abs().max() > 1e-6 * size
    for n in range(PAIRS):
        keep = [k for k in range(PAIRS) if k != n]
        rest = scope.similarity(theta, tuple(part[keep] for part in batch))
        removal = scope.loss.pair_losses(every).sum() - scope.loss.pair_losses(rest).sum()
        total = torch.autograd.grad(removal, theta, retain_graph=True)[0].dot(direction).item() / 17
        if name == "sigmoid":
            own = torch.nn.functional.softplus(-every[n, n])
        else:
            own = -every[n].log_softmax(0)[n] - every[:, n].log_softmax(0)[n]
        own = torch.autograd.grad(own, theta, retain_graph=True)[0].dot(direction).item() / 17
        assert positive[n].item() == pytest.approx(own, rel=1e-7, abs=1e-9 * size)
        assert (positive + negative)[n].item() == pytest.approx(total, rel=1e-7, abs=1e-9 * size)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_direct_mode_holds_in_single_precision_and_against_differences(name):
    """Not by autograd but by moving the weights, and in the precision of a loaded model."""
    model, batch = make_model(name), make_batch()
    scope = make_scope(model, name, "lora:2")
    theta = varied(scope, 0.02)
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(2)).double()
    direction = direction / direction.norm()
    positive, negative = batch_influence(scope, theta, batch, direction, pairs=PAIRS)

    def removal(at, n):
        keep = [k for k in range(PAIRS) if k != n]
        similarity = scope.similarity(at, batch)
        return scope.loss.pair_losses(similarity).sum() - scope.loss.pair_losses(similarity[keep][:, keep]).sum()

    size = (positive + negative).abs().max().item()
    for n in range(PAIRS):
        expected = central_difference(lambda at, n=n: removal(at, n), theta, direction).item() / PAIRS
        assert (positive + negative)[n].item() == pytest.approx(expected, rel=1e-4, abs=1e-5 * size)

    rough = make_scope(make_model(name).float(), name, "lora:2")
    found = batch_influence(rough, theta.float(), (batch[0].float(), batch[1]), direction.float(), pairs=PAIRS)
    assert found[0].dtype == torch.float32
    for part, expected in zip(found, (positive, negative), strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=1e-3, atol=1e-3 * size)


@each_model
def test_new_adapters_change_nothing_and_depend_on_the_seed(name):
    model = make_model(name)
    starts = [make_scope(model, name, "lora:2", seed=seed).start for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    scope = make_scope(model, name, "lora:2")
    for key, (a, b) in scope.adapters(scope.start).items():
        assert b.abs().max() == 0
        assert a.shape == (2, model.get_parameter(key).shape[1])
        assert b.shape == (model.get_parameter(key).shape[0], 2)
        assert a.norm(dim=1).mean().item() == pytest.approx(1, abs=0.5)  # unit output variance


@each_model
def test_adapters_that_are_part_of_the_weights(name):
    """The same similarity at the start, and the weights without the adapters as their base."""
    original, batch = make_model(name), make_batch()
    fitted = make_scope(original, name, "lora:2")
    theta = varied(fitted)
    model = make_model(name)
    put(model, fitted.parameters(theta))
    scope = make_scope(model, name, "lora:2", adapters=fitted.adapters(theta))
    torch.testing.assert_close(scope.start, theta, rtol=0, atol=0)
    torch.testing.assert_close(scope.similarity(scope.start, batch), run_model(model, batch), rtol=1e-9, atol=1e-9)
    base = scope.parameters(torch.zeros_like(theta))
    assert set(base) == set(scope.names)
    for key, value in base.items():
        torch.testing.assert_close(value, original.get_parameter(key), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        scope.similarity(torch.zeros_like(theta), batch), run_model(original, batch), rtol=1e-9, atol=1e-9
    )
    other = varied(fitted, seed=5)
    torch.testing.assert_close(scope.similarity(other, batch), fitted.similarity(other, batch), rtol=1e-9, atol=1e-9)


class Hidden(torch.nn.Module):
    """A model that hides from Python what its image tower multiplies with."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Linear(4, 3, dtype=torch.float64)
        self.text = torch.nn.Linear(4, 3, dtype=torch.float64)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def encode_image(self, images, normalize):
        with torch._C.DisableTorchFunction():
            return self.visual(images)

    def encode_text(self, texts, normalize):
        return self.text(texts)


def test_an_adapter_on_a_weight_whose_use_is_not_seen_is_merged():
    model = Hidden().requires_grad_(False)
    scope = TowerScope(model, ["visual.weight", "text.weight"], SoftmaxLoss(), 2)
    theta, batch = varied(scope), (torch.randn(3, 4).double(), torch.randn(3, 4).double())
    for _ in range(2):
        found = scope.embed(theta, batch)
        expected = [
            batch[0] @ scope.parameters(theta)["visual.weight"].T + model.visual.bias,
            batch[1] @ scope.parameters(theta)["text.weight"].T + model.text.bias,
        ]
        for part, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(part, wanted)


def test_the_temperature_and_the_bias_are_parameters_like_others():
    model, batch = make_model("sigmoid"), make_batch()
    scope = make_scope(model, "sigmoid", "^logit_")
    assert scope.names == ["logit_scale", "logit_bias"]
    assert scope.start.shape == (2,)
    cosine = (run_model(model, batch) - model.logit_bias) / model.logit_scale.exp()
    theta = torch.tensor([0.7, -3.0], dtype=torch.float64)
    expected = theta[0].exp() * cosine - 3.0
    torch.testing.assert_close(scope.similarity(theta, batch), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vit", "blocks:3", "asks for 3 blocks, but the image tower has 2"),
        ("resnet", "blocks:5", "asks for 5 blocks, but the image tower has 4"),
        ("resnet", "blocks:3", "asks for 3 blocks, but the text tower has 2"),
        ("vit", "lora:2:3", "asks for 3 blocks, but the image tower has 2"),
        ("vit", "nothing", "matches none of the model's parameters"),
        ("vit", r"^visual\.attnpool", "matches none of the model's parameters"),
    ],
)
def test_scopes_that_a_model_does_not_have_are_refused(name, text, message):
    with pytest.raises(EcifError, match=message):
        scope_parameters(make_model(name), parse_scope(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visual.(proj", "no regular expression"),
        ("*", "no regular expression"),
        ("lora:0", "not known"),
        ("lora:", "not known"),
        ("lora:4:0", "not known"),
        ("lora:x", "not known"),
        ("blocks", "not known"),
        ("blocks:0", "not known"),
        ("blocks:-1", "not known"),
        ("heads+bias", "not known"),
        ("", "not known"),
    ],
)
def test_words_that_mean_no_scope_are_refused(text, message):
    with pytest.raises(EcifError, match=message) as caught:
        parse_scope(text)
    assert re.search(re.escape(repr(text)), str(caught.value))


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("heads", (True, False, None, None, None)),
        ("heads+logit_scale", (True, True, None, None, None)),
        ("lora", (False, False, 4, None, None)),
        ("lora:16", (False, False, 16, None, None)),
        ("lora:3:12", (False, False, 3, 12, None)),
        ("blocks:2", (False, False, None, 2, None)),
        (r"resblocks\.1\.", (False, False, None, None, r"resblocks\.1\.")),
        ("visual.proj|text_projection", (False, False, None, None, "visual.proj|text_projection")),
    ],
)
def test_scopes_are_read_from_text(text, meaning):
    choice = parse_scope(text)
    assert (choice.heads, choice.with_scale, choice.rank, choice.blocks, choice.pattern) == meaning
    assert choice.text == text
