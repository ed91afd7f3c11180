"""A handful of families through everything; all of open_clip's models: fiftyone-ecif bench models."""

import pytest

from fiftyone_ecif.bench.models import report
from fiftyone_ecif.bench.models.sweep import examine, lacking, model_names
from fiftyone_ecif.misalignment.detectors import DETECTORS

FAMILIES = [
    "ViT-B-32-quickgelu",
    "RN50",
    "ViT-B-16-SigLIP2",
    "ViT-SO400M-16-SigLIP-i18n-256",
    "coca_ViT-B-32",
    "MobileCLIP-S1",
    "PE-Core-T-16-384",
    "EVA02-B-16",
    "convnext_large_d",
    "swin_base_patch4_window7_224",
    "mt5-base-ViT-B-32",
    "nllb-clip-base-siglip",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_works_with_a_model_and_is_right(name, tmp_path):
    if needed := lacking(name):
        pytest.skip(f"needs {needed}")
    found = examine(name, tmp_path)
    assert found["errors"].keys() == {"heads", "heads+logit_scale", "blocks:1", "lora:2:1"}
    assert found["worst"] < 1e-5  # of the heads, whose features are in float32
    assert found["errors"]["blocks:1"] < 1e-7  # in float64, but for norms of mT5
    assert found["errors"]["lora:2:1"] < 1e-7
    assert found["fit"] <= 1e-5
    assert abs(found["edit"]) < 3e-6
    untrained = [name for name, one in DETECTORS.items() if not (one.needs_target or one.needs_training)]
    assert found["detectors"] >= len(untrained)


def test_the_families_are_open_clips():
    assert set(FAMILIES) <= set(model_names())
    assert len(model_names()) > 100


def test_the_table_has_a_row_for_each_model_and_says_what_failed(monkeypatch):
    found = report.run(["RN50"], lambda _: None)
    monkeypatch.setattr(report, "examine", lambda name, folder: 1 / 0)
    monkeypatch.setattr(report, "lacking", lambda name: "transformers" if name == "RN101" else None)
    found["models"] |= report.run(["RN101", "RN50x4"], lambda _: None)["models"]
    page = report.markdown(found)
    assert "| `RN50` | `visual.attnpool.c_proj` | `text_projection` | `visual.layer4.1`" in page
    assert "| `RN101` | needs transformers |" in page
    assert "| `RN50x4` | ZeroDivisionError: division by zero |" in page
    assert "1 went through all of it" in page
