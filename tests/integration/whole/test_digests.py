"""Names that earlier versions gave to what they stored: the same things must be found under them again."""

import os
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from fiftyone_ecif.api import fine_tuning, misalignment, preparation
from fiftyone_ecif.bench.fidelity import world
from fiftyone_ecif.bench.misalignment.frozen_towers import frozen_features
from fiftyone_ecif.demo import demo
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.models.projection_heads import Head
from fiftyone_ecif.settings.fine_tuning import FitSettings
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.store.keys import PairKey, digest, pair_key

KEYS = [PairKey("a" * 32, "b" * 32), PairKey("c" * 32, "d" * 32)]
SCOPE = SimpleNamespace(start=torch.arange(3, dtype=torch.float64))


def test_of_pairs(monkeypatch):
    stat = SimpleNamespace(st_size=7, st_mtime_ns=1234567890123456789)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path: stat)
        key = pair_key("/images/ü.png", "a bird \ud800 紅")
    assert key == ("04090f54326b4a2d36d67dc81a7fcd4f", "cacb204130ca2c17832ba9bf5c5e53dd")


@pytest.mark.parametrize(
    ("keep_gradients", "heads", "name"),
    [
        (True, True, "run-eb774eb36c7a6cc128482fae10e4509a"),
        (True, False, "run-7c2807b49a4ecc3fe74af8dd82ad7854"),
    ],
)
def test_of_the_store_of_a_partition(keep_gradients, heads, name):
    prepared = SimpleNamespace(
        settings=InfluenceSettings(fit=True, keep_gradients=keep_gradients, batch_size=24),
        targets={"target-1": None},
        keys=KEYS,
        twins=None,
        scope=SimpleNamespace(start=SCOPE.start, projection="kronecker" if heads else "basis"),
    )
    assert preparation.PreparedRun.run_name(prepared, 3) == name


def test_of_a_target():
    measured = "zero_shot", ["a photo of {}"], ["ball", "bird"], 3
    assert preparation._target_name("all", KEYS, measured) == "target-e4681c5de378d55399e2ed5043bbdcbe"


def test_of_the_evidence_of_an_audit():
    written = []
    store = SimpleNamespace(table=lambda name: SimpleNamespace(write=lambda *rows: written.append((name, *rows))))
    evidence = SimpleNamespace(names=("loaded:distance",), tables=lambda: {"pairs": {"fold": np.zeros(2)}})
    name = misalignment._write_evidence(store, SimpleNamespace(trained=True), evidence)
    assert name == "evidence-12ba97904625dec73eb8aeb12a29a523"
    assert [row[:2] for row in written] == [(name, "pairs")]


def test_of_the_state_of_a_fit(monkeypatch):
    settings = FitSettings(model="ecif-tiny", epochs=2)
    assert set(asdict(settings)) == {
        *("caption_field", "model", "pretrained", "scope", "epochs"),
        *("batch_size", "learning_rate", "weight_decay", "seed", "skip_failures", "spare_equal"),
    }
    monkeypatch.setattr(fine_tuning, "digest", lambda found: digest(found) if isinstance(found, list) else found * 32)
    fingerprint = partial(fine_tuning._fingerprint, ["a" * 32, "c" * 32], ["b", "d"])
    found = fingerprint(settings, SimpleNamespace(fingerprint="f"), SCOPE)
    assert found == "432c9288d41bfb389bfd4ea490419e91"
    assert fingerprint(replace(settings, spare_equal=True), SimpleNamespace(fingerprint="f"), SCOPE) != found


@pytest.mark.parametrize(
    ("half", "fingerprint"), [(False, "cebcdf6f62d4aa08f9bc84be8f666682"), (True, "ae5a23200d9b8459b7e20f75ad53c5aa")]
)
def test_of_a_model(half, fingerprint, monkeypatch):
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda model: {"size": 8})
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6).view(2, 3))
        model.bias.zero_()
    heads = {
        "image": Head("visual.proj", None, False, False, 2),
        "text": Head("text.text_projection.weight", "text.text_projection.bias", True, False, 2),
    }
    encoder = SimpleNamespace(model=model, heads=heads, tokenizer=SimpleNamespace(context_length=77), _half=half)
    assert OpenClipEncoder._fingerprint(encoder, "no model of open_clip") == fingerprint
    heads["image"] = Head("visual.trunk.head.weight", None, True, False, 2)  # of which the first version knew nothing
    assert OpenClipEncoder._fingerprint(encoder, "no model of open_clip") != fingerprint


def test_of_the_folders_of_the_demo_and_of_the_benchmarks(monkeypatch, tmp_path):
    def train(paths, captions, checkpoint, *arguments, **options):
        raise FileNotFoundError(checkpoint)

    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("inspect.getsource", lambda module: "source")
    monkeypatch.setattr(world.training, "train", train)
    assert demo.demo_folder(600, 0.2, 0) == tmp_path / "demo" / "d8368b217217442c"
    with pytest.raises(FileNotFoundError) as found:
        world.make_world(8, 2, steps=1)
    assert found.value.args == (tmp_path / "bench" / "3f300a90b235cfde" / "model.pt",)


def test_of_the_features_of_frozen_towers(monkeypatch, tmp_path):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os.path, "getsize", lambda path: 7)
    (tmp_path / "bench").mkdir()
    np.savez(
        tmp_path / "bench" / "towers-708b24409dcfb48b196767477c3cb347.npz",
        images=np.ones((2, 3)),
        texts=np.zeros((2, 4)),
    )
    images, texts = frozen_features(["/a.png", "/ü.png"], ["a bird", "a \ud800 ball"])
    assert images.shape == (2, 3)
    assert texts.shape == (2, 4)
