"""Parts that the operators' forms and placements share."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fiftyone.operators.types as types

MISSING = [name for name in ("torch", "open_clip", "h5py") if importlib.util.find_spec(name) is None]


def menu_button(label: str, icon: str) -> types.Placement:
    """A place for an operator above the sample grid."""
    return types.Placement(
        types.Places.SAMPLES_GRID_SECONDARY_ACTIONS, types.Button(label=label, icon=icon, prompt=True)
    )


def dropdown(inputs: Any, name: str, choices: Sequence[str], default: str | None = None, **options: Any) -> Any:
    """A required choice among texts; the default is taken only if it is one of them."""
    view = types.DropdownView()
    for choice in choices:
        view.add_choice(choice, label=choice)
    default = default if default in choices else None
    return inputs.enum(name, list(choices), required=True, default=default, view=view, **options)


def refuse(prop: Any, message: str) -> None:
    """Marks an input as wrong, which keeps the form from being run."""
    prop.invalid, prop.error_message = True, message


def warning(inputs: Any, name: str, message: str) -> None:
    """Shows a warning in the form."""
    inputs.view(name, types.Warning(label=message))


def blocked(inputs: Any, name: str, message: str) -> None:
    """Shows an error in the form and keeps it from being run."""
    prop = inputs.view(name, types.Error(label=message))
    refuse(prop, message)


def unusable(inputs: Any, ctx: Any) -> bool:
    """Blocks the form where no dataset is open or something is not installed."""
    if MISSING:
        blocked(inputs, "missing", f"{', '.join(MISSING)} cannot be imported. Run: pip install fiftyone-ecif")
    elif ctx.dataset is None:
        blocked(inputs, "no_dataset", "Open a dataset first")
    else:
        return False
    return True


def model_names() -> list[str]:
    """The models that open_clip and this plugin bring, read without importing open_clip."""
    folders = []
    for package in ("open_clip", "fiftyone_ecif"):
        spec = importlib.util.find_spec(package)
        folders += [Path(place) / "model_configs" for place in (spec.submodule_search_locations or [])] if spec else []
    return sorted(path.stem for folder in folders for path in folder.glob("*.json"))


def looks_like_a_path(text: str) -> bool:
    """Whether a pretrained value can only be meant as a file."""
    return "/" in text or "\\" in text or Path(text).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
