"""What can be checked of a model and a device before anything is loaded."""

from __future__ import annotations

import difflib
from pathlib import Path

import open_clip
import torch
from open_clip.factory import parse_model_name

from fiftyone_ecif.errors import EcifError


def choose_device(device: str | None) -> str:
    """The device to compute on.

    Raises:
        EcifError: if a GPU is asked for and there is none
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EcifError(f"device={device!r} was asked for, but torch finds no GPU here. Use device='cpu'")
    return device


def check_names(model: str, pretrained: str | None) -> None:
    """Checks a model name and its weights without loading anything.

    Raises:
        EcifError: if open_clip does not know the model, or ``pretrained`` is
            neither a tag of it nor a file
    """
    if parse_model_name(model)[0]:
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
    if pretrained not in tags and not Path(pretrained).is_file():
        raise EcifError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model}. Give {offer} or a checkpoint"
        )
