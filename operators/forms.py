"""Parts that the operators' forms and placements share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fiftyone.operators.types as types

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.libraries import MODEL_LIBRARIES, library_of, model_names
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.option import Settings

S = TypeVar("S", bound=Settings)
OWN_EMBEDDINGS = "own_embeddings"
_EMBEDDINGS_OF = ("image_embeddings", "caption_embeddings")
MISSING = [name for name in ("torch", "open_clip", "h5py") if importlib.util.find_spec(name) is None]


def dropdown(inputs: Any, name: str, choices: Iterable[str], default: str | None = None, **options: Any) -> Any:
    """A choice among texts, or keys with a label each; the default is taken only if it is one of them."""
    view = types.DropdownView()
    for choice in choices:
        view.add_choice(choice, label=choices[choice] if isinstance(choices, Mapping) else choice)
    default = default if default in view.values() else None
    return inputs.enum(name, view.values(), default=default, view=view, **{"required": True, **options})


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


def looks_like_a_path(text: str) -> bool:
    """Whether a pretrained value can only be meant as a file."""
    return "/" in text or "\\" in text or Path(text).suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def ask_pairs(inputs: Any, ctx: Any) -> Any:
    """Asks which pairs to score and where their captions are; returns them, or None if there can be none."""
    from fiftyone_ecif.samples.pairs import caption_fields, check_collection

    inputs.view_target(ctx, action_description="Score")
    fields = caption_fields(ctx.dataset)
    if not fields:
        blocked(inputs, "no_captions", "This dataset has no string field that could hold captions")
        return None
    choice = dropdown(
        inputs, "caption_field", fields, "caption", label="Caption field", description="The text of each pair"
    )
    samples = ctx.target_view()
    if field := ctx.params.get("caption_field"):
        try:
            check_collection(samples, field)
        except EcifError as error:
            refuse(choice, str(error))
    return samples


def target_names(dataset: Any) -> list[str]:
    """What can serve as validation pairs: tags and saved views."""
    tags = [f"tag: {tag}" for tag in every_sample(dataset).distinct("tags")]
    return tags + [f"saved view: {name}" for name in dataset.list_saved_views()]


def target_view(dataset: Any, target: str) -> Any:
    """The validation pairs that one of :func:`target_names` means."""
    kind, _, name = target.partition(": ")
    if kind == "tag":
        return every_sample(dataset).match_tags(name)
    if kind == "saved view" and dataset.has_saved_view(name):
        return dataset.load_saved_view(name)
    raise EcifError(f"target={target!r} is neither 'tag: NAME' nor 'saved view: NAME' of this dataset")


def ask_target(inputs: Any, ctx: Any, samples: Any) -> Any:
    """Asks for validation pairs, and warns of those that are scored too; returns them once they are chosen."""
    names = target_names(ctx.dataset)
    target = dropdown(
        inputs,
        "target",
        names,
        "tag: val",
        label="Validation pairs",
        description="Influence is measured on the loss of these pairs",
    )
    chosen = ctx.params.get("target")
    if chosen not in names:
        return None
    target_pairs = target_view(ctx.dataset, chosen)
    if len(target_pairs) < 2:
        refuse(target, f"The target needs at least 2 pairs, it has {len(target_pairs)}")
    shared = len(set(samples.values("id")) & set(target_pairs.values("id")))
    if shared:
        warning(
            inputs,
            "shared",
            f"{shared:,} validation pairs are also scored. Show only training pairs to keep them apart",
        )
    return target_pairs


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
    """Asks for a model and its weights."""
    view = types.AutocompleteView(allow_user_input=True)
    for name in model_names():
        view.add_choice(name, label=name)
    model = inputs.str(
        "model",
        required=True,
        default=default,
        label="Model",
        description="A model of " + " or ".join(f"{one.name} ({one.says})" for one in MODEL_LIBRARIES.values()),
        view=view,
    )
    name = ctx.params.get("model") or ""
    library = library_of(name)
    if name and not library.knows(name):
        refuse(model, f"{library.name} has no model {name!r}")
    known = library.pretrained_tags(name)
    tags = types.AutocompleteView(allow_user_input=True)
    for tag in known or []:
        tags.add_choice(tag, label=tag)
    pretrained = inputs.str(
        "pretrained",
        required=not library.brings_weights(name),
        label="Pretrained",
        description="A pretrained tag of the model, or the path of a checkpoint on the machine that runs FiftyOne",
        view=tags,
    )
    weights = ctx.params.get("pretrained") or ""
    if looks_like_a_path(weights):
        if not Path(weights).exists():
            where = "" if Path(weights).is_absolute() else f" in {Path.cwd()}. Give its whole path"
            refuse(pretrained, f"There is no file {weights}{where}")
    elif weights and known is not None and weights not in known and not Path(weights).exists():
        offer = f"one of {', '.join(known)}, or a checkpoint" if known else "a checkpoint"
        refuse(pretrained, f"{weights!r} is neither a file nor a tag of {name}. Give {offer}")


def ask_new_file(inputs: Any, ctx: Any, default: str, suffixes: Sequence[str], **options: Any) -> None:
    """Asks for a file to write, and whether to replace one that is there.

    Args:
        inputs: the form.
        ctx: its context.
        default: a name for it, in the user's home.
        suffixes: what it may end in.
        **options: of the input.
    """
    asked = inputs.str("path", required=True, default=f"~/{default}", **options)
    if not ctx.params.get("path"):
        return
    path = Path(ctx.params["path"]).expanduser()
    if not path.is_absolute():  # the App's server runs in a folder of FiftyOne's own
        refuse(asked, f"Give the whole path, such as {Path('~').expanduser() / path}")
    elif path.is_dir():
        refuse(asked, f"{path} is a folder. Add the name of a file")
    elif path.suffix not in suffixes:
        refuse(asked, f"Must end in {' or '.join(suffixes)}")
    elif not path.parent.is_dir():
        refuse(asked, f"There is no folder {path.parent}. Choose one that exists")
    elif path.exists():
        inputs.bool("overwrite", default=False, label="Replace the file", view=types.CheckboxView())
        if not ctx.params.get("overwrite"):
            refuse(asked, f"There is a file {path} already. Replace it, or choose another name")


def new_file(ctx: Any) -> Path:
    """The answer to :func:`ask_new_file`."""
    return Path(ctx.params["path"]).expanduser()


def ask_key(inputs: Any, ctx: Any, default: str, description: str, config: Any) -> None:
    """Asks for the key of a run, and whether to replace one that is there.

    Args:
        inputs: the form.
        ctx: its context.
        default: the key.
        description: what it names.
        config: of such a run.
    """
    from fiftyone_ecif.runs.base import check_key

    key = inputs.str("brain_key", required=True, default=default, label="Key", description=description)
    name = ctx.params.get("brain_key")
    if not name:
        return
    try:
        check_key(ctx.dataset, name, True, config)
    except EcifError as error:
        refuse(key, str(error))
        return
    if ctx.dataset.has_brain_run(name):
        inputs.bool("overwrite", default=False, label=f"Replace the run {name!r}", view=types.CheckboxView())
        if not ctx.params.get("overwrite"):
            refuse(key, f"There is a run {name!r} already. Replace it, or choose another key")


def ask_background(inputs: Any) -> None:
    """Asks whether to wait for the job; :func:`operators.jobs.run_job` reads the answer."""
    inputs.bool(
        "background",
        default=True,
        label="Run in the background",
        description="The Influence panel shows how far it is, and can stop it. Otherwise the App waits for it",
        view=types.CheckboxView(),
    )


def advanced(inputs: Any, ctx: Any) -> bool:
    """A switch; whether it is on."""
    inputs.bool("advanced", default=False, label="Advanced settings", view=types.SwitchView())
    return bool(ctx.params.get("advanced"))


def is_from_form(params: Mapping[str, Any]) -> bool:
    """Whether parameters were entered in a form: it also holds what was entered before a choice was changed."""
    return "advanced" in params


def ask_option(inputs: Any, ctx: Any, table: type[Settings], name: str, **shown: Any) -> Any:
    """Asks for one option of a table, and judges the answer by what the table says of it.

    Args:
        inputs: the form.
        ctx: its context.
        table: of options.
        name: of the option.
        **shown: what the form says otherwise than the table, such as ``choices`` with a text each.
    """
    known, default = table.options()[name], getattr(table, name)
    text = known.help.removeprefix("whether to ")
    told = {"label": known.label, "description": f"{text[0].upper()}{text[1:]}"} | shown
    choices = told.pop("choices", known.choices and {each: each for each in known.choices()})
    if known.kind is bool:
        return inputs.bool(name, default=default, view=types.CheckboxView(), **told)
    if choices:
        return dropdown(inputs, name, choices, default, required=default is not None, **told)
    ask = {int: inputs.int, float: inputs.float, str: inputs.str}[known.kind]
    asked = ask(name, default=default, **told)
    value = ctx.params.get(name)
    if value is not None and (wrong := known.problem(value)):
        refuse(asked, wrong[0].upper() + wrong[1:])
    return asked


def ask_fit_and_batches(inputs: Any, ctx: Any, table: type[Settings]) -> None:
    """Advanced settings of all scoring: how the heads are fitted, which pairs compete, where it runs."""
    for name in ("proximal", "batch_size", "seed"):
        ask_option(inputs, ctx, table, name)
    for name in ("device", "skip_failures"):
        ask_option(inputs, ctx, JobSettings, name)


def chosen(ctx: Any, params: Mapping[str, Any], table: type[S]) -> tuple[S, JobSettings]:
    """The settings of a job by its parameters, whatever else is among them.

    Args:
        ctx: of the operator.
        params: of it, with the defaults.
        table: of its options.
    """
    given = {**params, "pretrained": params["pretrained"] or None, "device": params["device"] or None}
    if params.get(OWN_EMBEDDINGS):
        given |= {"embeddings": tuple(params[name] for name in _EMBEDDINGS_OF), "pretrained": None}
    elif is_from_form(params):
        given["embeddings"] = ()
    if not ctx.delegated:
        given["num_workers"] = 0  # the App's server must not fork
    return table.take(given), JobSettings.take(given)
