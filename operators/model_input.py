"""The model that a form asks for, or the embeddings in its place, and how a job runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import fiftyone.operators.types as types

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.checkpoint_file import check_checkpoint_file, weights_file
from fiftyone_ecif.models.libraries import MODEL_LIBRARIES, library_of, model_names
from fiftyone_ecif.models.model_library import unknown_model
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.option import Settings
from fiftyone_ecif.store.files import bare, looks_like_a_path, user_path

from .forms import ask_option, dropdown, is_from_form, refuse, warning
from .memory import entered_before
from .name_input import may_replace

S = TypeVar("S", bound=Settings)
OWN_EMBEDDINGS = "own_embeddings"
_EMBEDDINGS_OF = ("image_embeddings", "caption_embeddings")


def embedding_fields(dataset: Any) -> list[str]:
    """The fields of a dataset that can hold embeddings."""
    import fiftyone.core.fields as fof

    return [
        name
        for name, field in dataset.get_field_schema(flat=True).items()
        if isinstance(field, fof.VectorField | fof.ArrayField)
        or (isinstance(field, fof.ListField) and isinstance(field.field, fof.FloatField))
    ]


def ask_embeddings(inputs: Any, ctx: Any, table: type[Settings]) -> bool:
    """Asks whether two fields of embeddings take the place of a model, where there are such, and which; whether so."""
    fields = embedding_fields(ctx.dataset)
    if len(fields) < 2:
        return False
    inputs.bool(
        OWN_EMBEDDINGS,
        default=False,
        label="Use embeddings instead of a model",
        description="Of images and captions, in fields, made by any model that can compare the two",
        view=types.SwitchView(),
    )
    if not ctx.params.get(OWN_EMBEDDINGS):
        return False
    for name, what in zip(_EMBEDDINGS_OF, ("images", "captions"), strict=True):
        dropdown(inputs, name, fields, label=f"Embeddings of {what}")
    if len(_fields_of(ctx.params)) == 1:
        warning(inputs, "one_field", "Both embeddings are in one field. Those of images and of captions are in two")
    ask_option(inputs, ctx, table, "scale")
    return True


def _fields_of(params: Mapping[str, Any]) -> set[str]:
    return {params[name] for name in _EMBEDDINGS_OF if params.get(name)}


def ask_model(inputs: Any, ctx: Any, default: str) -> None:
    """Asks for a model and its weights, at first those of the last job."""
    view = types.AutocompleteView(allow_user_input=True)
    for name in model_names():
        view.add_choice(name, label=name)
    model = inputs.str(
        "model",
        required=True,
        default=entered_before(ctx).get("model", default),
        label="Model",
        description="A model of " + " or ".join(f"{one.name} ({one.says})" for one in MODEL_LIBRARIES.values()),
        view=view,
    )
    name = ctx.params.get("model") or ""
    library = library_of(name)
    if name and not library.knows(name):
        refuse(model, unknown_model(library.name, name, library.model_names()))
    known = library.pretrained_tags(name)
    tags = types.AutocompleteView(allow_user_input=True)
    for tag in known or []:
        tags.add_choice(tag, label=tag)
    pretrained = inputs.str(
        "pretrained",
        required=not library.brings_weights(name),
        default=entered_before(ctx).get("pretrained"),
        label="Pretrained",
        description="A pretrained tag of the model, or the path of a checkpoint on the machine that runs FiftyOne",
        view=tags,
    )
    weights = bare(ctx.params.get("pretrained") or "")
    if looks_like_a_path(weights):
        path = user_path(weights)
        if not path.exists():
            where = "" if path.is_absolute() else f" in {Path.cwd()}. Give its whole path"
            refuse(pretrained, f"There is no file {path}{where}")
        else:
            try:
                if weights_file(path) == path:
                    check_checkpoint_file(path)
            except EcifError as error:
                refuse(pretrained, str(error))
    elif weights and known is not None and weights not in known and not Path(weights).exists():
        offer = f"one of {', '.join(known)}, or a checkpoint" if known else "a checkpoint"
        refuse(pretrained, f"{weights!r} is neither a file nor a tag of {name}. Give {offer}")


def ask_fit_and_batches(inputs: Any, ctx: Any, table: type[Settings], pairs: int) -> None:
    """Advanced settings of all scoring: how the heads are fitted, which pairs compete, where it runs.

    Args:
        inputs: the form.
        ctx: its context.
        table: of the options.
        pairs: how many are scored, which bounds a batch.
    """
    ask_option(inputs, ctx, table, "proximal")
    batch_size = ask_option(inputs, ctx, table, "batch_size")
    if (ctx.params.get("batch_size") or 0) > pairs:
        refuse(batch_size, f"There are {pairs:,} pairs. Use at most {pairs}, or leave it empty")
    ask_option(inputs, ctx, table, "seed")
    device = ask_option(inputs, ctx, JobSettings, "device")
    if wrong := _problem_of_device(ctx.params.get("device")):
        refuse(device, wrong)
    ask_option(inputs, ctx, JobSettings, "skip_failures")


def _problem_of_device(device: str | None) -> str | None:
    """What is wrong with a device, as far as can be told without importing torch, which takes seconds."""
    if not device:
        return None
    if not hasattr(sys.modules.get("torch"), "cuda"):  # else it is being imported
        known = re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device)
        return None if known else f"{device!r} is none that torch knows. Use 'cpu', or 'cuda' for a GPU"
    from fiftyone_ecif.devices import choose_device

    try:
        choose_device(device)
    except EcifError as error:
        return str(error)
    return None


def chosen(ctx: Any, params: Mapping[str, Any], table: type[S]) -> tuple[S, JobSettings]:
    """The settings of a job by its parameters, whatever else is among them.

    Args:
        ctx: of the operator.
        params: of it, with the defaults.
        table: of its options.
    """
    given = {**params, "pretrained": params["pretrained"] or None, "device": params["device"] or None}
    given["overwrite"] = may_replace(ctx, params["brain_key"])
    if params.get(OWN_EMBEDDINGS):
        given |= {"embeddings": tuple(params[name] for name in _EMBEDDINGS_OF), "pretrained": None}
    elif is_from_form(params):
        given["embeddings"] = ()
    return table.take(given), JobSettings.take(given)
