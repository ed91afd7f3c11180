"""The names that open_clip knows, this plugin's own models among them, and what can be checked of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.checkpoint_file import check_checkpoint_file
from fiftyone_ecif.models.model_library import unknown_model
from fiftyone_ecif.models.transformers_weights import uses_quick_gelu
from fiftyone_ecif.models.weights import check_weights

INSTALL_TRANSFORMERS = "pip install 'fiftyone-ecif[transformers]'"

open_clip.add_model_config(Path(__file__).parent / "configs")


def brings_weights(model: str) -> bool:
    """Whether a model name says where its weights are: ``local-dir:…`` or ``hf-hub:…``."""
    return model.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX))


def needs_transformers(config: dict[str, Any] | None) -> str | None:
    """What a model of open_clip lacks if transformers is not installed, with the remedy, or None.

    Args:
        config: of the model; None if it is not known.
    """
    text = (config or {}).get("text_cfg", {})
    part = "text tower" if text.get("hf_model_name") else "tokenizer" if text.get("hf_tokenizer_name") else None
    if part is None or importlib.util.find_spec("transformers") is not None:
        return None
    return f"takes its {part} from transformers, which is not installed. Run: {INSTALL_TRANSFORMERS}"


def check_names(model: str, pretrained: str | None) -> None:
    """Checks a model name and its weights without loading anything.

    Args:
        model: the name.
        pretrained: a pretrained tag, the path of a checkpoint, or None for a name that brings its weights.

    Raises:
        EcifError: if open_clip does not know the model, or ``pretrained`` is
            neither a tag of it nor a file or folder that may hold weights,
            or they are known to be of another activation
    """
    if brings_weights(model):
        if pretrained:
            raise EcifError(f"{model} brings its own weights, so pretrained={pretrained!r} does not go with it")
        return
    known = open_clip.list_models()
    if model not in known:
        raise EcifError(unknown_model("open_clip", model, known))
    if lacking := needs_transformers(open_clip.get_model_config(model)):
        raise EcifError(f"{model} {lacking}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    offer = f"one of its tags ({', '.join(tags)})" if tags else "(open_clip has no tags for it)"
    if not pretrained:
        raise EcifError(f"pretrained is needed for {model}: {offer} or the path of a checkpoint")
    if pretrained in tags:
        return
    if not Path(pretrained).exists():
        raise EcifError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model}. Give {offer} or a checkpoint"
        )
    check_weights(pretrained)
    if Path(pretrained).is_file():
        check_checkpoint_file(pretrained)
    quick = uses_quick_gelu(Path(pretrained) if Path(pretrained).is_dir() else Path(pretrained).parent)
    if quick is not None and quick != bool((open_clip.get_model_config(model) or {}).get("quick_gelu")):
        other = f"{model}-quickgelu" if quick else model.removesuffix("-quickgelu")
        raise EcifError(
            f"The weights in {pretrained} were trained with {'QuickGELU' if quick else 'GELU'}, and {model} computes "
            f"with another activation. Use {f'model={other!r}' if other in known else 'a model that has it'}"
        )
