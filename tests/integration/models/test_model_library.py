"""A model library of one's own: one class, registered, and every job runs with its models."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import fiftyone.operators.types as types
import numpy as np
import pytest
import torch

from fiftyone_ecif import EcifError, compute_misalignment, edit_model, fit_model
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import solve, solving
from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.models.dual_encoder import DualEncoder
from fiftyone_ecif.models.libraries import MODEL_LIBRARIES, library_of, load_encoder, model_names
from fiftyone_ecif.models.model_library import ModelLibrary
from fiftyone_ecif.progress import result_of
from operators.model_input import ask_model

MODEL = "toy:letters"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GRID, WIDTH = 4, 6


class ToyEncoder(DualEncoder):
    """Linear towers on the mean colours of an image's tiles and on the counts of a caption's letters."""

    def __init__(self, name, pretrained):
        self.name, self.device, self.loss = name, "cpu", SoftmaxLoss()
        draw = torch.Generator().manual_seed(0)
        shapes = {"colours.weight": (3 * GRID**2, WIDTH), "letters.weight": (len(LETTERS), WIDTH)}
        self.weights = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
        self.weights["tiles"] = torch.tensor(GRID)
        if pretrained:
            self.weights = torch.load(pretrained, weights_only=True)
        parts = b"".join(value.numpy().tobytes() for value in self.weights.values())
        self.fingerprint = hashlib.blake2b(parts, digest_size=16).hexdigest()

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image.convert("RGB").resize((GRID, GRID)), dtype=np.float32) / 255)

    def tokens(self, captions):
        return torch.tensor([[caption.lower().count(letter) for letter in LETTERS] for caption in captions])

    def features(self, tower, inputs):
        return inputs.flatten(1).float()

    def scope(self, choice, seed=0):
        return HeadScope(*(self.weights[name] for name in self.scope_names(choice)), 5.0, loss=self.loss)

    def scope_names(self, choice):
        if choice.text != "heads":
            raise EcifError(f"scope={choice.text!r} does not fit {self.name}. Use scope='heads'")
        return ["colours.weight", "letters.weight"]

    def parameter_names(self):
        return list(self.weights)

    def save(self, path, scope, theta):
        heads = dict(zip(["colours.weight", "letters.weight"], scope.split(theta.float()), strict=True))
        torch.save(self.weights | {name: head.clone() for name, head in heads.items()}, path)


class ToyLibrary(ModelLibrary):
    name = "toy"
    says = "for tests"

    def model_names(self):
        return [MODEL]

    def knows(self, model):
        return model.startswith("toy:")

    def brings_weights(self, model):
        return True

    def pretrained_tags(self, model):
        return []

    def multiplications(self, model):
        return 1e9

    def check(self, model, pretrained):
        if model != MODEL:
            raise EcifError(f"There is no toy {model!r}. Use {MODEL!r}")
        if pretrained and not Path(pretrained).is_file():
            raise EcifError(f"There is no toy in {pretrained!r}")

    def load(self, model, pretrained=None, device=None):
        return ToyEncoder(model, pretrained)


@pytest.fixture
def toy():
    MODEL_LIBRARIES.register(ToyLibrary)
    yield
    MODEL_LIBRARIES.withdraw("toy")


@pytest.fixture
def views(dataset):
    return dataset.match_tags("train"), dataset.match_tags("val")


def form(**params):
    """The questions after the model, when something is entered."""
    inputs = types.Object()
    nothing = SimpleNamespace(get=lambda key: None)  # was entered before
    ctx = SimpleNamespace(
        params=params, store=lambda name: nothing, dataset=SimpleNamespace(list_brain_runs=lambda method: [])
    )
    ask_model(inputs, ctx, "ViT-B-32")
    return inputs.properties


def test_its_models_are_offered(toy):
    assert "open_clip" in MODEL_LIBRARIES
    assert {MODEL, "ViT-B-32"} <= set(model_names())
    assert library_of(MODEL).name == "toy"
    assert library_of("ViT-B-32").name == "open_clip"
    asked = form(model=MODEL)
    assert MODEL in {choice.value for choice in asked["model"].view.choices}
    assert "or toy (for tests)" in asked["model"].view.description
    assert not asked["model"].invalid
    assert not asked["pretrained"].required
    assert form(model="ViT-B-32")["pretrained"].required


def test_withdrawn_it_is_not_known(views, score):
    assert MODEL not in model_names()
    assert form(model=MODEL)["model"].invalid
    train, val = views
    with pytest.raises(EcifError, match=f"open_clip has no model '{MODEL}'"):
        score(train, val, model=MODEL, pretrained=None)


def test_its_influence_is_that_of_its_heads_on_its_features(toy, views, score):
    train, val = views
    results = score(train, val, model=MODEL, pretrained=None, batch_size=len(train), proximal=0.5)
    assert results.diagnostics["attributed"] == ["colours.weight", "letters.weight"]
    assert results.diagnostics["held_fixed"] == ["tiles"]
    assert results.config.encoder == load_encoder(MODEL).fingerprint

    encoder = load_encoder(MODEL)
    scope = HeadScope(encoder.weights["colours.weight"], encoder.weights["letters.weight"], 5.0)
    parts = []
    for view in (train, val):
        paths, captions = view.sort_by("id").values(["filepath", "caption"])
        ((_, images, _),) = encoder.image_features(paths, 128, 0)
        (texts,) = encoder.text_features(captions, 128)
        parts.append(FeatureBatches(images, texts, random_partition(len(images), len(train), 0)))
    objective = ContrastiveLoss(scope, parts[0], len(train), 0.5)
    gradient = ContrastiveLoss(scope, parts[1], len(val)).gradient_and_value(scope.start)[0]
    steps = solve(lambda v: objective.hessian_product(scope.start, v), gradient)
    vector = result_of(solving(steps)).vector
    expected = np.empty(len(train))
    expected[parts[0].partition[0]] = sum(batch_influence(scope, scope.start, parts[0][0], vector, len(train)))
    found = train.sort_by("id").values("ecif_influence")
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_its_misaligned_pairs_are_found(toy, views):
    train, _ = views
    results = compute_misalignment(train, model=MODEL, batch_size=24, num_workers=0)
    assert 0.5 < results.diagnostics["power"]["random"] <= 1
    probability = train.values("audit_misalignment")
    assert 0 <= min(probability) < max(probability) <= 1


def test_its_edited_weights_can_be_loaded(toy, views, score, tmp_path):
    train, val = views
    options = {"model": MODEL, "pretrained": None, "fit": True}
    results = score(train, val, **options)
    edit = edit_model(results, results.ids[:5], str(tmp_path / "toy.pt"))
    assert edit.removed == 5
    again = score(train, val, brain_key="again", **options | {"pretrained": edit.checkpoint, "fit": False})
    assert again.config.encoder != results.config.encoder
    assert again.diagnostics["target_loss"] == pytest.approx(edit.target_loss_after, rel=1e-4)


def test_what_it_refuses_is_said(toy, views, score, tmp_path):
    train, val = views
    for options, message in (
        ({"model": "toy:words", "pretrained": None}, "There is no toy 'toy:words'. Use 'toy:letters'"),
        ({"model": MODEL, "pretrained": "gone.pt"}, "There is no toy in 'gone.pt'"),
        ({"model": MODEL, "pretrained": None, "scope": "blocks:1"}, r"does not fit toy:letters\. Use scope='heads'"),
    ):
        with pytest.raises(EcifError, match=message):
            score(train, val, **options)
    with pytest.raises(EcifError, match=r"scope='lora' does not fit toy:letters\. Use scope='heads'"):
        fit_model(train, tmp_path / "tuned.pt", model=MODEL)
