"""Small models of the same structure as open_clip's: the same layers in the same order, narrower and fewer.

Towers of timm become models that are registered there, tokenizers and text
towers of transformers become local folders, so that plain open_clip makes the
small models by their names and nothing is downloaded.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch

PREFIX = "small-"
_WIDTH, _SIZE = 48, 32  # of towers, and of embeddings
_DEPTH, _HEADS = 2, 2
#: What small tokenizers know, what marks the ends first.
WORDS = (
    *("<s>", "<pad>", "</s>", "<unk>", "<cls>", "<mask>"),
    *("a", "b", "red", "blue", "left", "right", "of", "the", "one", "two", "three", "four", "five", "six", "seven"),
)
_STAGES: dict[str, dict[str, Any]] = {
    "convnext": {"depths": (1, 1, 1, 2), "dims": (8, 16, 24, _WIDTH)},
    "swin": {"depths": (1, 1, 1, 2), "embed_dim": 8, "num_heads": (1, 1, 2, 2), "img_size": 64},
}


def small_model(name: str, folder: Path, make_pretrained: bool = True) -> tuple[str, Path | None]:
    """Makes a small model of the structure of one of open_clip's, and random weights of it.

    Args:
        name: of one of open_clip's configurations.
        folder: for what is written.
        make_pretrained (True): whether to write weights.

    Returns:
        its name, which open_clip then knows, and the path of its weights
    """
    small = PREFIX + name
    config = small_config(name, folder)
    (folder / f"{small}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{small}.json")
    if not make_pretrained:
        return small, None
    torch.manual_seed(0)
    model = open_clip.create_model(small, pretrained_text=False)
    with torch.no_grad():
        for parameter in model.parameters():  # none of them zero or one, and attention that is not flat
            parameter.nan_to_num_(0, 0, 0).clamp_(-10, 10)  # some are not initialised
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = folder / f"{small}.pt"
    torch.save(model.state_dict(), weights)
    return small, weights


def small_config(name: str, folder: Path) -> dict[str, Any]:
    """The configuration of a small model; what it refers to is registered or written.

    Args:
        name: of one of open_clip's configurations.
        folder: for tokenizers and text towers.
    """
    config: dict[str, Any] = copy.deepcopy(open_clip.get_model_config(name))
    vision, text, size = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    config["embed_dim"] = _SIZE
    if "timm_model_name" in vision:
        width = _SIZE if vision.get("timm_proj") == "none" else _WIDTH
        vision["timm_model_name"], vision["image_size"] = _small_trunk(vision["timm_model_name"], width)
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 2], "width": 8, "image_size": 64, "head_width": 16}
    else:
        width = _SIZE if vision.get("width", 768) == size else _WIDTH
        vision |= {"layers": _DEPTH, "width": width, "head_width": width // _HEADS}
        vision["image_size"] = 2 * vision["patch_size"]
    words = len(WORDS)
    width = _SIZE if text.get("width", 512) == size else _WIDTH
    if text.get("hf_tokenizer_name"):
        if importlib.util.find_spec("transformers"):
            text["hf_tokenizer_name"], text["vocab_size"] = str(_small_tokenizer(folder)), words
        else:  # the tower is the same with open_clip's own
            text["hf_tokenizer_name"], text["vocab_size"], text["tokenizer_kwargs"] = None, 49408, {}
    if text.get("hf_model_name"):
        text["hf_model_name"] = str(_small_text_tower(text["hf_model_name"], width, words, folder))
        text.setdefault("context_length", 12)
    text |= {
        "width": width,
        "layers": _DEPTH,
        "heads": _HEADS,
        "context_length": min(text.get("context_length", 77), 12),
    }
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {
            "width": width,
            "layers": _DEPTH,
            "heads": _HEADS,
            "vocab_size": text.get("vocab_size", 49408),
            "context_length": 12,
        }
    return config


def _small_trunk(name: str, width: int) -> tuple[str, int]:
    """The name of a small model that is registered with timm, and the size of its images."""
    small = f"small_{name}_{width}"
    patch = next((int(part[5:]) for part in name.split("_") if part.startswith("patch")), 16)
    family, image = name.split("_")[0], 64
    if family in _STAGES:
        changes = _STAGES[family]
    elif family == "fastvit":
        stages = 5 if name in ("fastvit_mci3", "fastvit_mci4") else 4
        changes = {"layers": (1,) * (stages - 1) + (2,), "embed_dims": (8, 16, 32, 64, 128)[:stages]}
    elif family == "vitamin":
        changes = {
            "embed_dim": width,
            "depth": _DEPTH,
            "num_heads": _HEADS,
            "img_size": image,
            "embed_cfg": _stem(width),
        }
    else:
        image = 2 * patch
        changes = {"embed_dim": width, "depth": _DEPTH, "num_heads": _HEADS, "img_size": image}
        if "mci" in name:
            del changes["embed_dim"]  # its convolutions before the first block are as wide
        if "pe_core" in name:
            changes["attn_pool_num_heads"] = _HEADS
    if not timm.is_model(small):
        make: Callable[..., Any] = timm.model_entrypoint(name)

        def entry(pretrained: bool = False, **options: Any) -> Any:
            return make(pretrained=False, **{**changes, **options})

        entry.__name__ = small
        timm.models.register_model(entry)
    return small, image


def _stem(width: int) -> Any:
    """The convolutions that a small ViTamin starts with."""
    from timm.models.vitamin import VitCfg, VitConvCfg

    convolution = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    return VitCfg(embed_dim=(8, 16, width), depths=(1, 1, 1), stem_width=8, conv_cfg=convolution, head_type="1d")


def _small_tokenizer(folder: Path) -> Path:
    """The folder of a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    home = folder / "tokenizer"
    if not home.exists():
        vocabulary = {word: place for place, word in enumerate(WORDS)}
        made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = Whitespace()
        ends = [(word, vocabulary[word]) for word in ("<s>", "</s>")]
        made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(
            tokenizer_object=made, **special, sep_token="</s>", cls_token="<cls>", mask_token="<mask>"
        ).save_pretrained(home)
    return home


def _small_text_tower(name: str, width: int, words: int, folder: Path) -> Path:
    """The folder of the configuration of a small text tower."""
    import transformers

    both = {"vocab_size": words, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    wide = {"d_model": width, "decoder_layers": 1}
    if "roberta" in name:
        kind = transformers.XLMRobertaConfig if name.startswith("xlm") else transformers.RobertaConfig
        made = kind(
            hidden_size=width,
            num_hidden_layers=_DEPTH,
            num_attention_heads=_HEADS,
            intermediate_size=2 * width,
            max_position_embeddings=20,
            **both,
        )
    elif "mt5" in name:
        made = transformers.MT5Config(
            d_model=width, d_kv=8, d_ff=64, num_layers=_DEPTH, num_decoder_layers=1, num_heads=_HEADS, **both
        )
    else:
        made = transformers.M2M100Config(
            encoder_layers=_DEPTH,
            encoder_attention_heads=_HEADS,
            decoder_attention_heads=_HEADS,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
            **wide,
            **both,
        )
    home = folder / f"{name.replace('/', '-')}-{width}"
    made.save_pretrained(home)
    return home
