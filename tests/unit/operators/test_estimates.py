"""What the forms say of how long a job takes."""

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fiftyone_ecif.models.open_clip_library import OpenClipLibrary
from fiftyone_ecif.progress import Progress
from operators import estimates


def test_what_the_next_run_takes(monkeypatch, tmp_path):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    watch = estimates.Watch()
    watch.seconds = {"Loading the model": 4.0, "Encoding images": 10.0, "Encoding captions": 5.0, "Scoring": 2.0}
    watch.encoded = 50
    estimates.remember("kind", 100, watch)
    assert estimates.estimate("kind", 300, "RN50", "heads").startswith("Takes about 10 s, and up to 90 s more")
    watch.encoded, watch.seconds = 0, {"Scoring": 600.0}
    estimates.remember("kind", 100, watch)
    assert estimates.estimate("kind", 100, "RN50", "heads").startswith("Takes about 10 min, and up to 30 s more")
    (tmp_path / "estimates.json").write_text("{")
    assert "No such run ended on this machine" in estimates.estimate("kind", 100, "RN50", "heads")


def test_the_first_guess_goes_by_the_size_of_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(estimates, "_multiplications_a_second", lambda: 1.25e10)  # of which towers reach 1e10
    assert "about 12 min. No such run" in estimates.estimate("kind", 1000, "ViT-B-32", "heads")
    assert "about 40.4 h" in estimates.estimate("kind", 1000, "ViT-B-32", "lora:4")
    assert "not known yet" in estimates.estimate("kind", 1000, "convnext_base", "heads")
    assert "not known yet" in estimates.estimate("kind", 1000, "no such model", "heads")


@pytest.mark.parametrize("model", ["ViT-B-32", "RN50"])
def test_multiplications_are_those_of_the_towers(model):
    towers = open_clip.create_model(model).eval()
    with FlopCounterMode(display=False) as counter:
        towers.encode_image(torch.zeros(1, 3, 224, 224))
        towers.encode_text(torch.ones(1, 77, dtype=torch.long))
    assert OpenClipLibrary().multiplications(model) == pytest.approx(counter.get_total_flops() / 2, rel=0.3)


def test_a_watch_times_stages(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(estimates.time, "monotonic", lambda: next(now))
    watch = estimates.Watch()
    for stage, total in (("Reading pairs", 1), ("Encoding images", 40), ("Scoring", 1)):
        watch.see(Progress(stage, 0, total))
    assert watch.seconds == {"Reading pairs": 3.0, "Encoding images": 4.0}
    assert watch.encoded == 40
