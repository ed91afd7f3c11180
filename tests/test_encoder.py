"""open_clip models: features, heads, fingerprints and refusals."""

import json

import open_clip
import pytest
import torch
from PIL import Image

from fiftyone_ecif.encoder import Encoder, choose_device
from fiftyone_ecif.errors import EcifError

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 48, "patch_size": 8, "head_width": 16}
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
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": TEXT,
    },
    "ecif-test-sigmoid": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "init_logit_bias": -10},
    "ecif-test-no-head": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "none",
        },
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
        return Encoder(name, str(path), "cpu")

    return run


@pytest.mark.parametrize("name", ["ecif-test-vit", "ecif-test-resnet", "ecif-test-custom", "ecif-test-timm"])
def test_features_times_heads_are_the_models_embeddings(name, load, tmp_path):
    encoder = load(name)
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.effect_noise((40, 40), 60 + number).convert("RGB").save(paths[-1])
    captions = ["a red seven", "two", "left of"]
    ((indices, images, failures),) = encoder.image_features(paths, 8, 0)
    (texts,) = encoder.text_features(captions, 8)
    assert indices == [0, 1, 2]
    assert not failures

    pixels = torch.stack([encoder.preprocess(Image.open(path)) for path in paths])
    tokens = encoder.tokenizer(captions)
    with torch.no_grad():
        embeddings = encoder.model.encode_image(pixels), encoder.model.encode_text(tokens)
        expected = encoder.model(pixels, tokens)
    scope = encoder.scope()
    for features, head, embedding in zip((images, texts), scope.split(scope.start), embeddings, strict=True):
        torch.testing.assert_close((features.double() @ head).float(), embedding, rtol=1e-4, atol=1e-5)
    similarity = scope.similarity(scope.start, (images.double(), texts.double()))
    torch.testing.assert_close(similarity.float(), expected[2] * expected[0] @ expected[1].T, rtol=1e-4, atol=1e-4)


def test_the_fingerprint_knows_the_weights(load):
    assert load("ecif-test-vit").fingerprint == load("ecif-test-vit").fingerprint
    assert load("ecif-test-vit").fingerprint != load("ecif-test-vit", seed=1).fingerprint


def test_the_fingerprint_knows_the_architecture(load, tmp_path):
    """The same weights, another activation."""
    encoder = load("ecif-test-vit")
    torch.save(encoder.model.state_dict(), tmp_path / "same.pt")
    other = Encoder("ecif-test-vit-quickgelu", str(tmp_path / "same.pt"), "cpu")
    assert other.fingerprint != encoder.fingerprint


def test_unreadable_images_cost_only_themselves(load, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (32, 32)).save(good)
    bad.write_bytes(good.read_bytes()[:60])
    ((indices, features, failures),) = load("ecif-test-vit").image_features([str(bad), str(good)], 8, 0)
    assert indices == [1]
    assert len(features) == 1
    assert list(failures) == [0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ecif-test-sigmoid", "sigmoid loss"),
        ("ecif-test-no-head", "image tower .* does not end in a linear projection"),
    ],
)
def test_models_that_do_not_fit_are_refused(name, message, load):
    with pytest.raises(EcifError, match=message):
        load(name)


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
        Encoder(model, pretrained)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(EcifError, match="could not load model 'ecif-digits'"):
        Encoder("ecif-digits", str(path))


def test_weights_that_are_not_finite_are_refused(load, tmp_path):
    model = load("ecif-test-vit").model
    with torch.no_grad():
        model.text_projection[0, 0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(EcifError, match="NaN"):
        Encoder("ecif-test-vit", str(tmp_path / "nan.pt"), "cpu").scope()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_said():
    with pytest.raises(EcifError, match="no GPU"):
        choose_device("cuda")
