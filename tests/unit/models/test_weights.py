"""Checkpoints that other programs wrote are loaded as what they are, or refused in a sentence."""

import argparse
import collections
import json
import os
import pathlib

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.models.weights import in_short

WIDTH, VOCABULARY, CONTEXT = 32, 49408, 8
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2, "layers": 2}
CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "patch_size": 8, "head_width": 12},
    "text_cfg": TEXT,
}
SIGLIP = {
    "embed_dim": 768,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Two small models, by name."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in (("ecif-weights-clip", CLIP), ("ecif-weights-sigmoid", SIGLIP)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "ecif-weights-clip", "ecif-weights-sigmoid"


@pytest.fixture(scope="module")
def state(names):
    torch.manual_seed(0)
    return open_clip.create_model(names[0]).state_dict()


def load(name, path):
    return OpenClipEncoder(name, str(path), "cpu")


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED = {
    "plain": lambda state: state,
    "ordered": collections.OrderedDict,
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "ddp": lambda state: {"epoch": 3, "state_dict": prefixed(state, "module.")},
    "ddp of compiled": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "compiled ddp": lambda state: prefixed(state, "_orig_mod.module."),
    "model": lambda state: prefixed(state, "model."),
    "clip": lambda state: {"model": prefixed(state, "clip.")},
    "nested": lambda state: {"model": {"state_dict": prefixed(state, "net.clip_model.")}},
    "a compiled tower": lambda state: {
        name.replace("visual.", "visual._orig_mod."): value for name, value in state.items()
    },
    "lightning": lambda state: {
        "epoch": 1,
        "global_step": 10,
        "hyper_parameters": argparse.Namespace(lr=np.float64(1e-3), path=pathlib.PurePosixPath("a")),
        "callbacks": {"best": np.arange(3)},
        "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(3)},
    },
    "beside a teacher": lambda state: prefixed(state, "student.") | {"teacher.logit_scale": torch.zeros(())},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_checkpoint_is_loaded(kind, names, state, tmp_path):
    torch.save(WRAPPED[kind](state), tmp_path / "model.ckpt")
    found = load(names[0], tmp_path / "model.ckpt").model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["plain", "compiled", "model"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_safetensors_is_known_by_its_content(kind, name, names, state, tmp_path):
    save_file(WRAPPED[kind](state), tmp_path / name)
    found = load(names[0], tmp_path / name).model.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_folder_of_several_files_is_loaded(names, state, tmp_path):
    rows = list(state.items())
    parts = {"model-1-of-2.safetensors": dict(rows[:10]), "model-2-of-2.safetensors": dict(rows[10:])}
    for part, weights in parts.items():
        save_file(weights, tmp_path / part)
    index = {"weight_map": {name: part for part, weights in parts.items() for name in weights}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load(names[0], tmp_path).model.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(EcifError, match=r"lacks its file model-2-of-2\.safetensors"):
        load(names[0], tmp_path)


class Evil:
    """What would run something when it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo evil",)


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"\x80\x04\x95\x00", "cannot be read"),
        (b"<!DOCTYPE html><html>", "is no checkpoint"),
        ({"state_dict": Evil()}, r"holds objects of Python \(\w+.system\), which are not loaded. Save its weights"),
        (torch.ones(3), "holds no weights by name"),
        ([torch.ones(3)], "holds no weights by name"),
        ({"epoch": 3}, "holds no weights by name"),
        ({"a.weight": torch.ones(3)}, r"it lacks \d+ weights, such as .*; 1 of its weights are not the model's"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_a_sentence(content, message, names, tmp_path):
    path = tmp_path / "model.pt"
    write(path, content)
    with pytest.raises(EcifError, match=message) as refused:
        load(names[0], path)
    told = str(refused.value)
    assert len(told) < 500
    assert "\x1b" not in told
    assert "weights_only" not in told


def test_another_models_weights_are_refused_in_a_sentence(names, state, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(EcifError, match=r"it lacks \d+ weights, such as .* are not the model's, such as ") as refused:
        load(names[1], tmp_path / "model.pt")
    assert len(str(refused.value)) < 500
    narrow = state | {"ln_final.weight": torch.ones(3)}
    torch.save(narrow, tmp_path / "narrow.pt")
    with pytest.raises(EcifError, match=r"its ln_final.weight has the shape \[3\], the model's \[32\]"):
        load(names[0], tmp_path / "narrow.pt")


def test_a_torchscript_program_is_not_run(names, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(EcifError, match=r"TorchScript program, which is not run. Save its weights: torch\.save"):
        load(names[0], tmp_path / "model.pt")


def test_an_empty_folder_is_refused(names, tmp_path):
    with pytest.raises(EcifError, match=r"holds no weights. It needs one of open_clip_model.safetensors"):
        load(names[0], tmp_path)


def test_a_long_error_is_said_in_short():
    told = in_short(RuntimeError("\x1b[1m" + 1000 * "a word "))
    assert len(told) == 300
    assert told.startswith("a word a word")


# transformers


def images_and_tokens(size):
    torch.manual_seed(1)
    tokens = torch.randint(1, 1000, (3, CONTEXT))
    tokens[:, -1] = VOCABULARY - 1  # where CLIP looks: the greatest
    return torch.rand(3, 3, size, size), tokens


@pytest.mark.parametrize(("kind", "as_file"), [("clip", False), ("clip", True), ("siglip", False)])
def test_a_model_of_transformers_gives_its_own_embeddings(kind, as_file, names, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": CONTEXT,
        "projection_dim": 16,
        "hidden_act": "quick_gelu" if kind == "clip" else "gelu",
        "eos_token_id": VOCABULARY - 1,
    }
    size = 32 if kind == "clip" else 224
    vision = {"image_size": size, "num_channels": 3, "projection_dim": 16, "hidden_act": text["hidden_act"]}
    if kind == "clip":
        vision |= {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 8}, projection_dim=16)
        model = transformers.CLIPModel(config).eval()
    else:
        vision |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = transformers.SiglipConfig(
            text_config=text | {"projection_size": 768}, vision_config=vision | {"patch_size": 16}
        )
        model = transformers.SiglipModel(config).eval()
    for value in model.parameters():
        value.data += 0.02 * torch.randn_like(value)  # biases are not all zero then
    model.save_pretrained(tmp_path)
    images, tokens = images_and_tokens(size)
    encoder = load(names[kind == "siglip"], tmp_path / "model.safetensors" if as_file else tmp_path)
    with torch.no_grad():
        expected = model(input_ids=tokens, pixel_values=images)
        found = (encoder.model.encode_image(images, normalize=True), encoder.model.encode_text(tokens, normalize=True))
        torch.testing.assert_close(found[0], expected.image_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], expected.text_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.model.logit_scale, model.logit_scale.reshape(()))
        if kind == "siglip":
            torch.testing.assert_close(encoder.model.logit_bias, model.logit_bias.reshape(()))


def test_weights_of_another_activation_are_refused(state, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": {}}))
    torch.save(state, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(EcifError, match=r"trained with QuickGELU, .*Use model='ViT-B-32-quickgelu'"):
            load("ViT-B-32", path)


def test_another_model_of_transformers_is_refused(names, tmp_path):
    save_file({"text_model.embeddings.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(EcifError, match="neither a CLIPModel nor a SiglipModel"):
        load(names[0], tmp_path)
