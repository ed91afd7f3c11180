"""Model libraries and the other registries: what a name means, and that names come without what takes seconds."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.libraries import MODEL_LIBRARIES, library_of, load_encoder, model_names

LIGHT = [
    "errors",
    "influence.solvers",
    "influence.roles",
    "influence.scope_choice",
    "influence.target_losses",
    "misalignment.detectors",
    "models.libraries",
    "progress",
    "registry",
    "settings.fine_tuning",
    "settings.influence",
    "settings.misalignment",
]


@pytest.mark.parametrize("module", LIGHT)
def test_names_are_known_without_what_takes_seconds(module):
    """Forms and ``--help`` read them."""
    code = f"import sys, fiftyone_ecif.{module}; print(sorted({{'torch', 'open_clip', 'fiftyone'}} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_open_clips_models_and_ours_are_offered():
    assert {"ViT-B-32", "RN50", "ecif-digits", "ecif-tiny"} <= set(model_names())
    assert len(model_names()) == len(set(model_names()))
    assert all(library_of(name).name == "open_clip" for name in MODEL_LIBRARIES["open_clip"].model_names())


@pytest.mark.parametrize("schema", [HF_HUB_PREFIX, LOCAL_DIR_PREFIX])
def test_a_name_that_brings_its_weights(schema):
    name = f"{schema}somewhere"
    library = library_of(name)
    assert library.brings_weights(name)
    assert library.knows(name)
    library.check(name, None)
    with pytest.raises(EcifError, match="brings its own weights, so pretrained='openai' does not go with it"):
        library.check(name, "openai")
    with pytest.raises(EcifError, match=f"could not load model '{schema}'"):
        load_encoder(schema, device="cpu")


@pytest.mark.parametrize("name", ["ViT-B-23", "hf:ViT-B-23"])
def test_what_no_library_knows_is_said_with_what_is_like_it(name):
    assert not any(library.knows(name) for library in MODEL_LIBRARIES.values())
    assert not library_of(name).brings_weights(name)
    for refused in (library_of(name).check, load_encoder):
        with pytest.raises(EcifError, match=rf"open_clip has no model '{name}'\. Did you mean .*ViT-B-32"):
            refused(name, "openai")


@pytest.mark.parametrize(
    ("name", "part"), [("ViT-B-16-SigLIP", "tokenizer"), ("xlm-roberta-base-ViT-B-32", "text tower")]
)
def test_what_needs_transformers_says_so(name, part, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name))
    remedy = rf"{name} takes its {part} from transformers.*Run: pip install 'fiftyone-ecif\[transformers\]'"
    with pytest.raises(EcifError, match=remedy):
        library_of(name).check(name, "webli")
    assert "\ntransformers = [" in (Path(__file__).parents[3] / "pyproject.toml").read_text()  # the extra that is named
    library_of("ViT-B-32").check("ViT-B-32", "openai")
