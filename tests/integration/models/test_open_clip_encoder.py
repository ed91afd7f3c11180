"""open_clip models: features, heads, fingerprints and refusals."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.demo import training
from fiftyone_ecif.devices import choose_device
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.heads import FeatureBatches
from fiftyone_ecif.influence.linear_solve import solve, solving
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.checkpoint import save_checkpoint
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 48, "patch_size": 8, "head_width": 16}
TIMM = {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": ""}
CONFIGS = {
    "ecif-test-vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "ecif-test-vit-quickgelu": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "ecif-test-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "text_cfg": TEXT,
    },
    "ecif-test-custom": {
        "embed_dim": 16,
        "vision_cfg": VIT,
        "text_cfg": TEXT | {"proj_bias": True},
        "custom_text": True,
    },
    "ecif-test-timm": {
        "embed_dim": 16,
        "vision_cfg": TIMM | {"timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    # square projections: with a transpose too many or too few, shapes still fit
    "ecif-test-square": {"embed_dim": 32, "vision_cfg": VIT | {"width": 32}, "text_cfg": TEXT},
    "ecif-test-square-custom": {
        "embed_dim": 32,
        "vision_cfg": VIT | {"width": 32},
        "text_cfg": TEXT | {"proj_bias": True},
        "custom_text": True,
    },
    "ecif-test-square-timm": {
        "embed_dim": 64,
        "vision_cfg": TIMM | {"timm_proj": "linear"},
        "text_cfg": TEXT | {"width": 64},
    },
    "ecif-test-sigmoid": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "init_logit_bias": -10},
    "ecif-test-no-head": {
        "embed_dim": 64,
        "vision_cfg": TIMM | {"timm_pool": "avg", "timm_proj": "none"},
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture
def load(tmp_path):
    def run(name, seed=0):
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        path = tmp_path / f"{name}-{seed}.pt"
        torch.save(model.state_dict(), path)
        return OpenClipEncoder(name, str(path), "cpu")

    return run


WITH_HEADS = [name for name in CONFIGS if name != "ecif-test-no-head"]
CAPTIONS = ["a red seven", "two", "left of"]


@pytest.fixture
def paths(tmp_path):
    made = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, path in enumerate(made):
        Image.effect_noise((40, 40), 60 + number).convert("RGB").save(path)
    return made


def run_features(encoder, paths):
    ((indices, images, failures),) = encoder.image_features(paths, 8, 0)
    (texts,) = encoder.text_features(CAPTIONS, 8)
    assert indices == [0, 1, 2]
    assert not failures
    return images, texts


def run_model(model, encoder, paths):
    """The model's own embeddings before normalisation, and its similarity matrix."""
    pixels = encoder.finish(torch.stack([encoder.preprocess(Image.open(path)) for path in paths]))
    tokens = encoder.tokenizer(CAPTIONS)
    with torch.no_grad():
        images, texts, scale, *bias = model(pixels, tokens)
        similarity = scale * images @ texts.T + (bias[0] if bias else 0)
        return model.encode_image(pixels), model.encode_text(tokens), similarity


@pytest.mark.parametrize("name", WITH_HEADS)
def test_features_times_heads_are_the_models_embeddings(name, load, paths):
    encoder = load(name)
    features = run_features(encoder, paths)
    *embeddings, expected = run_model(encoder.model, encoder, paths)
    scope = encoder.scope(parse_scope("heads"))
    for part, head, embedding in zip(features, scope.split(scope.start), embeddings, strict=True):
        torch.testing.assert_close((part.double() @ head).float(), embedding, rtol=1e-4, atol=1e-5)
    similarity = scope.similarity(scope.start, tuple(part.double() for part in features))
    torch.testing.assert_close(similarity.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("ecif-test-vit", ["visual.proj", "text_projection"]),
        ("ecif-test-resnet", ["visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias", "text_projection"]),
        ("ecif-test-custom", ["visual.proj", "text.text_projection.weight", "text.text_projection.bias"]),
        ("ecif-test-timm", ["visual.head.proj.weight", "text_projection"]),
    ],
)
def test_the_heads_have_names(name, names, load):
    encoder = load(name)
    assert encoder.scope_names(parse_scope("heads")) == names
    assert encoder.scope_names(parse_scope("heads+logit_scale")) == [*names, "logit_scale"]
    size = sum(encoder.model.get_parameter(part).numel() for part in names)
    assert len(encoder.scope(parse_scope("heads")).start) == size
    assert len(encoder.scope(parse_scope("heads+logit_scale")).start) == size + 1


@pytest.mark.parametrize(("choice", "suffix"), [("heads", "pt"), ("heads+logit_scale", "safetensors")])
@pytest.mark.parametrize("name", WITH_HEADS)
def test_changed_heads_survive_a_checkpoint(name, choice, suffix, load, paths, tmp_path):
    """What is computed with a changed vector is what open_clip computes with the weights that are written."""
    encoder = load(name)
    scope = encoder.scope(parse_scope(choice))
    theta = scope.start + 0.1 * torch.randn(len(scope.start), generator=torch.Generator().manual_seed(1)).double()
    path = tmp_path / "changed" / f"model.{suffix}"
    save_checkpoint(path, encoder.changed_state(scope, theta))

    features = tuple(part.double() for part in run_features(encoder, paths))
    written = open_clip.create_model(name, pretrained=str(path)).eval()
    *embeddings, similarity = run_model(written, encoder, paths)
    for found, start, expected in zip(
        scope.embed(theta, features), scope.embed(scope.start, features), embeddings, strict=True
    ):
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, start, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(scope.similarity(theta, features).float(), similarity, rtol=1e-4, atol=1e-4)
    again = OpenClipEncoder(name, str(path), "cpu").scope(parse_scope(choice))
    torch.testing.assert_close(again.start, theta, rtol=1e-6, atol=1e-6)
    changed = set(encoder.scope_names(parse_scope(choice)))
    for key, value in written.state_dict().items():
        assert torch.equal(value, encoder.model.state_dict()[key]) == (key not in changed)


def test_a_changed_tower_survives_a_checkpoint(load, paths, tmp_path):
    encoder = load("ecif-test-vit")
    scope = encoder.scope(parse_scope("lora:2"))
    theta = scope.start + 0.1 * torch.randn(len(scope.start), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "adapted.pt"
    save_checkpoint(path, encoder.changed_state(scope, theta), scope.adapters(theta))
    written = open_clip.create_model("ecif-test-vit", pretrained=str(path)).eval()
    pixels = encoder.finish(torch.stack([encoder.preprocess(Image.open(path)) for path in paths]))
    similarity = scope.similarity(theta, (pixels, encoder.tokens(CAPTIONS)))
    torch.testing.assert_close(similarity, run_model(written, encoder, paths)[2], rtol=1e-3, atol=1e-3)

    again = OpenClipEncoder("ecif-test-vit", str(path), "cpu")
    found, expected = again.scope(parse_scope("lora:2")), scope.adapters(theta)
    assert set(found.names) == set(scope.names)
    assert found.names == again.scope_names(parse_scope("lora:2"))
    for key, pair in found.adapters(found.start).items():
        for part, other in zip(pair, expected[key], strict=True):
            assert torch.equal(part, other)
    found_similarity = found.similarity(found.start, (pixels, encoder.tokens(CAPTIONS)))
    torch.testing.assert_close(found_similarity, similarity, rtol=1e-3, atol=1e-3)
    assert again.scope_names(parse_scope("lora")) == found.names  # of whatever rank they are
    for text in ("lora:3", "lora:2:1"):
        with pytest.raises(EcifError, match=r"adapters have rank 2\. Use 'lora:2'"):
            again.scope(parse_scope(text))


def test_the_loss_is_the_one_that_the_model_is_made_for(load):
    assert isinstance(load("ecif-test-sigmoid").loss, SigmoidLoss)
    assert isinstance(load("ecif-test-vit").loss, SoftmaxLoss)


@pytest.mark.parametrize("choice", ["heads", "heads+logit_scale"])
def test_a_model_without_a_linear_head_gets_an_identity_map(choice, load, paths, tmp_path):
    encoder = load("ecif-test-no-head")
    (note,) = encoder.notes
    assert note.startswith("The image tower of ecif-test-no-head ends in no linear map, so scope='heads' attributes an")
    images, captions = run_features(encoder, paths)
    expected_images, _, similarity = run_model(encoder.model, encoder, paths)
    torch.testing.assert_close(images, expected_images)
    scope = encoder.scope(parse_scope(choice))
    assert torch.equal(scope.split(scope.start)[0], torch.eye(64, dtype=torch.float64))
    found = scope.similarity(scope.start, (images.double(), captions.double()))
    torch.testing.assert_close(found.float(), similarity, rtol=1e-4, atol=1e-4)

    with pytest.raises(
        EcifError, match=r"a checkpoint has no place for a changed one\. Use a run with scope='blocks:1'"
    ):
        encoder.check_saves(parse_scope(choice))
    encoder.check_saves(parse_scope("blocks:1"))
    scope = encoder.scope(parse_scope("blocks:1"))
    pixels = encoder.finish(torch.stack([encoder.preprocess(Image.open(path)) for path in paths]))
    found = scope.similarity(scope.start, (pixels, encoder.tokens(CAPTIONS)))
    torch.testing.assert_close(found, similarity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "after",
    [torch.tanh, lambda x: x + 1, lambda x: torch.nn.functional.layer_norm(x, x.shape[1:])],
    ids=["tanh", "shift", "norm"],
)
def test_a_projection_with_something_after_it_is_no_head(after, load, paths, monkeypatch):
    encode = open_clip.CLIP.encode_image
    monkeypatch.setattr(open_clip.CLIP, "encode_image", lambda self, *args, **kwargs: after(encode(self, *args)))
    encoder = load("ecif-test-vit")
    assert encoder.heads["image"].weight is None
    assert encoder.heads["text"].weight == "text_projection"
    images, _ = run_features(encoder, paths)
    torch.testing.assert_close(images, run_model(encoder.model, encoder, paths)[0])


@pytest.mark.parametrize(("name", "weights_are_quick"), [("ecif-test-vit", True), ("ecif-test-vit-quickgelu", False)])
def test_weights_of_another_activation_are_noted(name, weights_are_quick, load, tmp_path, monkeypatch):
    """What open_clip only warns of while it loads: with the wrong activation every embedding is off."""
    load(name)
    path = str(tmp_path / f"{name}-0.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: path)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"other": {"url": "", "quick_gelu": weights_are_quick}})
    (note,) = OpenClipEncoder(name, "other", "cpu").notes
    assert note.startswith("open_clip warns: QuickGELU mismatch")
    other = {"ecif-test-vit": "ecif-test-vit-quickgelu", "ecif-test-vit-quickgelu": "ecif-test-vit"}[name]
    assert note.endswith(f". Use model={other!r}")
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, name, {"same": {"url": "", "quick_gelu": not weights_are_quick}}
    )
    assert OpenClipEncoder(name, "same", "cpu").notes == []


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIGS["ecif-test-vit"], "preprocess_cfg": {}})
    )
    with pytest.raises(EcifError, match=r"could not load model 'local-dir:.*could not be loaded"):
        OpenClipEncoder(f"local-dir:{tmp_path}", None, "cpu")


def test_the_fingerprint_knows_the_weights(load):
    assert load("ecif-test-vit").fingerprint == load("ecif-test-vit").fingerprint
    assert load("ecif-test-vit").fingerprint != load("ecif-test-vit", seed=1).fingerprint


def test_the_fingerprint_knows_the_architecture(load, tmp_path):
    """The same weights, another activation."""
    encoder = load("ecif-test-vit")
    torch.save(encoder.model.state_dict(), tmp_path / "same.pt")
    other = OpenClipEncoder("ecif-test-vit-quickgelu", str(tmp_path / "same.pt"), "cpu")
    assert other.fingerprint != encoder.fingerprint


def test_unreadable_images_cost_only_themselves(load, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (32, 32)).save(good)
    bad.write_bytes(good.read_bytes()[:60])
    ((indices, features, failures),) = load("ecif-test-vit").image_features([str(bad), str(good)], 8, 0)
    assert indices == [1]
    assert len(features) == 1
    assert list(failures) == [0]


@pytest.mark.parametrize("name", ["ecif-test-vit", "ecif-test-custom", "ecif-test-sigmoid"])
def test_captions_are_encoded_at_their_own_length(name, load):
    encoder = load(name)
    tokens = encoder.tokens(CAPTIONS)
    whole = encoder.tokenizer(CAPTIONS)
    assert tokens.shape[1] == 5  # start, three words, end
    assert whole.shape[1] == 8
    assert torch.equal(whole[:, :5], tokens)
    assert not whole[:, 5:].any()
    (found,) = encoder.text_features(CAPTIONS, 8)
    encoder._ignores_padding = False
    (expected,) = encoder.text_features(CAPTIONS, 8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(encoder.tokens(["long " * 100])[0]) == 8


def test_a_text_tower_that_looks_ahead_gets_its_padding(load, monkeypatch):
    """Without the causal mask a caption's features depend on what stands behind it."""
    build = open_clip.transformer.TextTransformer.build_causal_mask
    monkeypatch.setattr(
        open_clip.transformer.TextTransformer, "build_causal_mask", lambda self: torch.zeros_like(build(self))
    )
    encoder = load("ecif-test-vit")
    assert encoder.tokens(CAPTIONS).shape[1] == 8


def test_a_batch_is_begun_before_the_one_ahead_of_it_is_waited_for(load, paths, monkeypatch):
    encoder, events = load("ecif-test-vit"), []
    expected = run_features(encoder, paths)

    def start(tower, inputs):
        number = sum(event == "begun" for event in events)
        events.append("begun")

        def give():
            events.append(f"{number} given")
            return encoder.features(tower, inputs)

        return give

    monkeypatch.setattr(encoder, "start", start)
    found = torch.cat([rows for _, rows, _ in encoder.image_features(paths, 1, 0)])
    assert events == ["begun", "begun", "0 given", "begun", "1 given", "2 given"]
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    events.clear()
    found = torch.cat(list(encoder.text_features(CAPTIONS, 1)))
    assert events[:3] == ["begun", "begun", "0 given"]
    torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_costs_smaller_batches_only(load, paths, monkeypatch):
    encoder = load("ecif-test-vit")
    expected = run_features(encoder, paths)
    run, sizes = OpenClipEncoder._run, []

    def cramped(self, tower, inputs, head):
        sizes.append(len(inputs))
        if len(inputs) > 1:
            raise torch.OutOfMemoryError("full")
        return run(self, tower, inputs, head)

    monkeypatch.setattr(OpenClipEncoder, "_run", cramped)
    for found, same in zip(run_features(encoder, paths), expected, strict=True):
        torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-5)
    assert sizes == [3, 1, 1, 1, 1, 1, 1]  # what did not fit once is not tried again


def test_a_model_that_fits_no_input_is_refused(load, paths, monkeypatch):
    encoder = load("ecif-test-vit")

    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(OpenClipEncoder, "_run", full)
    with pytest.raises(EcifError, match="image tower of ecif-test-vit does not fit into the memory of cpu"):
        run_features(encoder, paths)


def test_half_precision_keeps_the_rank_order(made, monkeypatch):
    """Of influence on a trained model, with the towers in float16 as on a GPU."""
    dataset, checkpoint = made
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    encoder = OpenClipEncoder(training.MODEL, checkpoint, "cpu")
    assert not encoder._half
    scope = encoder.scope(parse_scope("heads"))

    def influence():
        prepared = []
        for view in (train, val):
            ((_, images, _),) = encoder.image_features(view.values("filepath"), 128, 0)
            (texts,) = encoder.text_features(view.values("caption"), 128)
            prepared.append(FeatureBatches(images, texts, [torch.arange(len(images))]))
        objective = ContrastiveLoss(scope, prepared[0], len(train), 1.0)
        gradient = ContrastiveLoss(scope, prepared[1], len(val)).gradient_and_value(scope.start)[0]
        steps = solve(lambda v: objective.hessian_product(scope.start, v), gradient)
        solution = follow(solving(steps), False).vector
        return sum(batch_influence(scope, scope.start, prepared[0][0], solution, len(train)))

    exact = influence()
    monkeypatch.setattr(encoder, "_half", True)
    half = influence()
    assert not torch.equal(exact, half)
    assert spearmanr(exact, half).statistic > 0.999


def test_what_is_too_large_for_half_precision_is_not_lost(load):
    encoder = load("ecif-test-vit")
    encoder.model.ln_final.weight.mul_(1e6)
    (expected,) = encoder.text_features(CAPTIONS, 8)
    encoder._half = True
    (found,) = encoder.text_features(CAPTIONS, 8)
    assert expected.abs().max() > 65504
    assert torch.equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_a_gpu_encodes_as_the_cpu_does(load, paths, tmp_path):
    expected = run_features(load("ecif-test-vit"), paths)
    encoder = OpenClipEncoder("ecif-test-vit", str(tmp_path / "ecif-test-vit-0.pt"), "cuda")
    assert encoder._half
    for found, same in zip(run_features(encoder, paths), expected, strict=True):
        torch.testing.assert_close(found, same, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-23", "openai", "no model 'ViT-B-23'. Did you mean .*ViT-B-32"),
        ("ViT-B-32", None, "pretrained is needed .*openai"),
        ("ViT-B-32", "opnai", "neither a file nor a tag of ViT-B-32.*openai"),
        ("ecif-digits", "no/such.pt", "neither a file nor a tag"),
    ],
)
def test_names_are_checked_before_anything_is_loaded(model, pretrained, message):
    with pytest.raises(EcifError, match=message):
        OpenClipEncoder(model, pretrained)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(EcifError, match=r"model\.pt is no checkpoint"):
        OpenClipEncoder("ecif-digits", str(path))


def test_weights_that_are_not_finite_are_refused(load, tmp_path):
    model = load("ecif-test-vit").model
    with torch.no_grad():
        model.text_projection[0, 0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(EcifError, match="NaN"):
        OpenClipEncoder("ecif-test-vit", str(tmp_path / "nan.pt"), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_said():
    with pytest.raises(EcifError, match="no GPU"):
        choose_device("cuda")
