"""The names that open_clip knows, this plugin's own models among them, and what can be checked of them."""

from __future__ import annotations

import difflib
from pathlib import Path

import open_clip
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.checkpoint_file import check_checkpoint_file

open_clip.add_model_config(Path(__file__).parent / "configs")


def brings_weights(model: str) -> bool:
    """Whether a model name says where its weights are: ``local-dir:…`` or ``hf-hub:…``."""
    return model.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX))


def check_names(model: str, pretrained: str | None) -> None:
    """Checks a model name and its weights without loading anything.

    Args:
        model: the name.
        pretrained: a pretrained tag, the path of a checkpoint, or None for a name that brings its weights.

    Raises:
        EcifError: if open_clip does not know the model, or ``pretrained`` is
            neither a tag of it nor a checkpoint
    """
    if brings_weights(model):
        if pretrained:
            raise EcifError(f"{model} brings its own weights, so pretrained={pretrained!r} does not go with it")
        return
    known = open_clip.list_models()
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
        raise EcifError(f"open_clip has no model {model!r}." + (f" Did you mean {' or '.join(near)}?" if near else ""))
    tags = open_clip.list_pretrained_tags_by_model(model)
    offer = f"one of its tags ({', '.join(tags)})" if tags else "(open_clip has no tags for it)"
    if not pretrained:
        raise EcifError(f"pretrained is needed for {model}: {offer} or the path of a checkpoint")
    if pretrained in tags:
        return
    if not Path(pretrained).is_file():
        raise EcifError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model}. Give {offer} or a checkpoint"
        )
    check_checkpoint_file(pretrained)
