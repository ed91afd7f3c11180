"""Weights as other programs save them: read without running anything in them, under the names of open_clip."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.checkpoint_file import weights_file
from fiftyone_ecif.models.transformers_weights import from_transformers

_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "module", "weights", "params")
#: What compiling, sharding and checkpointing activations put between the names of modules.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Packages whose objects stand beside weights, as options and counts. They are not made, something empty is instead.
_BESIDE = {"argparse", "datetime", "easydict", "numpy", "omegaconf", "pathlib", "lightning", "pytorch_lightning"}
_OWN_NUMPY = (".npz", ".npy")  # of big_vision, which open_clip reads itself


def check_weights(pretrained: str) -> None:
    """Checks without loading that a path may hold weights.

    Raises:
        EcifError: if it is an empty file, a Git LFS pointer, or a folder without weights
    """
    path = Path(pretrained)
    for file in _parts(weights_file(path)):
        if not file.is_file():
            raise EcifError(f"The checkpoint {path} lacks its file {file.name}. Copy all of it")
        with file.open("rb") as opened:
            start = opened.read(64)
        if not start:
            raise EcifError(f"The checkpoint {file} is empty. Give another one")
        if start.startswith(b"version https://git-lfs"):
            raise EcifError(f"The checkpoint {file} is a Git LFS pointer, not the weights. Run git lfs pull")


@contextlib.contextmanager
def open_clip_weights(pretrained: str | None) -> Iterator[str | None]:
    """A checkpoint as open_clip loads it: the file itself, or a temporary one with the same weights under its names.

    Known are state dicts alone or in a training state; names with what DDP, FSDP, ``torch.compile``, Lightning or
    another module around the model put before them; CLIP and SigLIP of transformers, whole folders too.

    Args:
        pretrained: a path; what is none, such as a tag, is given back.

    Raises:
        EcifError: if there are no such weights in it, or it holds objects that are not loaded
    """
    if pretrained is None or not Path(pretrained).exists():
        yield pretrained
        return
    check_weights(pretrained)
    file = weights_file(Path(pretrained))
    if file.suffix in _OWN_NUMPY:
        yield str(file)
        return
    found, whole = _read(file)
    state = _state_dict(file, found)
    named = from_transformers(_bare(state), file)
    if whole and named is state:
        yield str(file)
        return
    with tempfile.TemporaryDirectory(prefix="ecif-weights-") as folder:
        path = Path(folder) / "model.safetensors"
        save_file({name: value.detach().clone().contiguous() for name, value in named.items()}, path)
        yield str(path)


def in_short(error: Exception, most: int = 300) -> str:
    """What an error of torch or open_clip says, without escapes, without lists of hundreds of weights."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    missing, unexpected = (
        re.findall(r'"([^"]+)"', "".join(re.findall(rf"{kind} key\(s\) in state_dict: (.*)", text)))
        for kind in ("Missing", "Unexpected")
    )
    shapes = re.findall(r"size mismatch for ([^:\s]+):.*?Size\((.*?)\) from checkpoint.*?Size\((.*?)\)", text, re.S)
    said = [f"it lacks {len(missing)} weights, such as {name}" for name in missing[:1]]
    said += [f"{len(unexpected)} of its weights are not the model's, such as {name}" for name in unexpected[:1]]
    said += [f"its {name} has the shape {found}, the model's {own}" for name, found, own in shapes[:1]]
    return "; ".join(said) or " ".join(text.split())[:most]


def _parts(file: Path) -> list[Path]:
    """A file, or those that an index says weights are spread over."""
    if not file.name.endswith(".index.json"):
        return [file]
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EcifError(f"The index {file} of a checkpoint cannot be read ({error})") from error
    return [file.with_name(name) for name in sorted(names)]


def _read(file: Path) -> tuple[Any, bool]:
    """What a checkpoint holds, and whether open_clip can read it too."""
    parts = _parts(file)
    if parts != [file]:
        joined: dict[str, Any] = {}
        for part in parts:
            joined |= _read(part)[0]
        return joined, False
    with file.open("rb") as opened:
        start = opened.read(9)
    try:
        if file.suffix == ".safetensors" or start[8:] == b"{":
            return load_file(file), file.suffix == ".safetensors"
        return _load(file)
    except EcifError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds
        raise EcifError(
            f"The checkpoint {file} cannot be read: it is damaged, no checkpoint, or holds objects of Python, which "
            "are not loaded. Save weights alone: torch.save(model.state_dict(), path)"
        ) from error  # whose own text may advise to run what is in the file


def _load(file: Path) -> tuple[Any, bool]:
    beside: set[str] = set()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as opened:
            if any(name.endswith("constants.pkl") for name in opened.namelist()):
                raise EcifError(
                    f"The checkpoint {file} is a TorchScript program, which is not run. Save its weights: "
                    "torch.save(torch.jit.load(path).state_dict(), other)"
                )
        beside = set(get_unsafe_globals_in_checkpoint(str(file)))
        foreign = sorted(name for name in beside if name.split(".")[0] not in _BESIDE)
        if foreign:
            raise EcifError(
                f"The checkpoint {file} holds objects of Python ({foreign[0]}), which are not loaded. Save its "
                "weights alone: torch.save(model.state_dict(), path)"
            )
    with safe_globals([(_Nothing, name) for name in beside]):
        return torch.load(file, map_location="cpu", weights_only=True), not beside


class _Nothing:
    """Stands for an object that is not made."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _state_dict(file: Path, found: Any) -> dict[str, Tensor]:
    """The weights in what a checkpoint holds."""
    for _ in _NESTS:
        if not isinstance(found, Mapping):
            break
        nested = next((found[name] for name in _NESTS if isinstance(found.get(name), Mapping)), None)
        if nested is None:
            break
        found = nested
    tensors = (
        {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise EcifError(
            f"The checkpoint {file} holds no weights by name. Save them: torch.save(model.state_dict(), path)"
        )
    return tensors


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without what wraps the model put before their names; those of other modules are left out.

    Every model that compares images and texts has a ``logit_scale``: what stands before it is the wrappers'.
    """
    clean = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    prefixes = [name.removesuffix("logit_scale") for name in clean if re.search(r"(^|\.)logit_scale$", name)]
    counts = Counter({prefix: sum(name.startswith(prefix) for name in clean) for prefix in prefixes})
    if not counts or "" in counts:
        return state if clean.keys() == state.keys() else clean
    prefix = counts.most_common(1)[0][0]
    return {name.removeprefix(prefix): value for name, value in clean.items() if name.startswith(prefix)}
