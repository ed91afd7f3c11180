"""Parts that the operators' forms and placements share."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fiftyone.operators.types as types
from fiftyone import ViewField

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.checkpoint_file import check_checkpoint_file, weights_file
from fiftyone_ecif.models.libraries import MODEL_LIBRARIES, library_of, model_names
from fiftyone_ecif.models.model_library import unknown_model
from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.option import Settings
from fiftyone_ecif.store.files import bare, looks_like_a_path, user_path
from fiftyone_ecif.store.keys import digest

from .memory import entered_before
from .view_fields import fields_of_runs
from .wording import in_words

S = TypeVar("S", bound=Settings)
OWN_EMBEDDINGS = "own_embeddings"
_EMBEDDINGS_OF = ("image_embeddings", "caption_embeddings")
MISSING = [name for name in ("torch", "open_clip", "h5py") if importlib.util.find_spec(name) is None]
#: What is chosen for validation pairs that are yet to be drawn, and the tag that they get.
HOLD_OUT, HELD_OUT_TAG = "hold out", "held_out"
_CAPTIONS = ("caption", "description", "prompt", "text", "sentence", "title")  # in names of fields, the likeliest first
_LOOKED_AT = 50  # samples whose texts are compared
_MOSTLY = 0.5  # of the samples, fewer texts than which are worth a word


def dropdown(inputs: Any, name: str, choices: Iterable[str], default: str | None = None, **options: Any) -> Any:
    """A choice among texts, or keys with a label each; the default is taken only if it is one of them."""
    view = types.DropdownView()
    for choice in choices:
        view.add_choice(choice, label=choices[choice] if isinstance(choices, Mapping) else choice)
    default = default if default in view.values() else None
    return inputs.enum(name, view.values(), default=default, view=view, **{"required": True, **options})


def refuse(prop: Any, message: str) -> None:
    """Marks an input as wrong, which keeps the form from being run."""
    prop.invalid, prop.error_message = True, in_words(message)


def warning(inputs: Any, name: str, message: str) -> None:
    """Shows a warning in the form."""
    inputs.view(name, types.Warning(label=in_words(message)))


def blocked(inputs: Any, name: str, message: str) -> None:
    """Shows an error in the form and keeps it from being run."""
    prop = inputs.view(name, types.Error(label=in_words(message)))
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


def ask_caption_field(inputs: Any, ctx: Any, samples: Any) -> Any:
    """Asks where the captions of samples are, and warns of a field that is mostly empty; None if there can be none.

    The fields that runs write are not offered, and the likeliest of the others is chosen.
    """
    from fiftyone_ecif.samples.pairs import advice_on_captions, caption_fields

    ours = fields_of_runs(ctx.dataset)
    fields = [name for name in caption_fields(ctx.dataset) if name not in ours]
    if not fields:
        blocked(inputs, "no_captions", f"No string field could hold captions. {advice_on_captions(ctx.dataset)}")
        return None
    before = entered_before(ctx).get("caption_field")
    default = before if before in fields else likely_caption_field(ctx.dataset, fields)
    choice = dropdown(
        inputs, "caption_field", fields, default, label="Caption field", description="The text of each pair"
    )
    field = ctx.params.get("caption_field")
    if field in fields and samples.has_sample_field(field):
        text = ViewField(field)
        full = samples.match((text != None) & (text != "")).count()  # noqa: E711
        if full < _MOSTLY * len(samples):
            warning(inputs, "empty", f"Only {full:,} of {len(samples):,} samples have a text in {field!r}")
    return choice


def likely_caption_field(dataset: Any, fields: Sequence[str]) -> str:
    """The field that most likely holds captions: by its name, else the one with the longest texts."""
    named = sorted(
        (_CAPTIONS.index(word), name) for name in fields for word in _CAPTIONS if word in name.lower().split(".")[-1]
    )
    if named:
        return named[0][1]
    texts = zip(*every_sample(dataset).limit(_LOOKED_AT).values(list(fields), unwind=False), strict=True)
    words = [sum(len(str(text or "").split()) for text in row) for row in zip(*texts, strict=True)]
    return max(zip(words, fields, strict=True), key=lambda found: found[0])[1] if words else fields[0]


def pairs_to_act_on(ctx: Any) -> Any:
    """The samples that a form is about: of grouped data the slice that the App shows, of a ``group_by`` all samples."""
    samples = ctx.target_view()
    return samples.flatten() if samples._is_dynamic_groups else _in_shown_slice(ctx, samples)


def _in_shown_slice(ctx: Any, samples: Any) -> Any:
    """Those of some samples that are in the slice that the App shows, or in any of images if that has none."""
    dataset = ctx.dataset
    if dataset.media_type != "group":
        return samples
    shown = ctx.group_slice or dataset.default_group_slice
    is_of_images = dataset.group_media_types.get(shown) == "image"
    if samples.media_type == "group":
        chosen = {"slices": shown} if is_of_images else {"media_type": "image"}
        return samples.select_group_slices(**chosen)
    return samples.match(ViewField(f"{dataset.group_field}.name") == shown) if is_of_images else samples


def ask_pairs(inputs: Any, ctx: Any) -> Any:
    """Asks which pairs to score and where their captions are; returns them, or None if there can be none."""
    from fiftyone_ecif.samples.pairs import check_collection

    inputs.view_target(ctx, action_description="Score")
    samples = pairs_to_act_on(ctx)
    choice = ask_caption_field(inputs, ctx, samples)
    if choice is None:
        return None
    if field := ctx.params.get("caption_field"):
        try:
            check_collection(samples, field)
        except EcifError as error:
            refuse(choice, str(error))
    if len(samples) == 1:
        blocked(
            inputs, "one_pair", "Scoring needs at least 2 pairs, and 1 is selected. Select more, or take the whole view"
        )
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
    target_pairs, _ = _ask_target(inputs, ctx, target_names(ctx.dataset))
    if target_pairs is not None and (shared := _shared(samples, target_pairs)):
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


def ask_split(inputs: Any, ctx: Any, samples: Any) -> tuple[int, int] | None:
    """Asks for validation pairs, or for a share of the samples to hold out, and whether those are scored too.

    Returns:
        how many pairs will be scored, and how many are the target, once that is known
    """
    offered = {name: name for name in target_names(ctx.dataset)}
    offered[HOLD_OUT] = f"A share of these pairs, to be held out and tagged {HELD_OUT_TAG!r}"
    target_pairs, asked = _ask_target(inputs, ctx, offered)
    if ctx.params.get("target") == HOLD_OUT:
        ask_percent(inputs, ctx, "held_out", "Per cent of the pairs to hold out")
        inputs.int(
            "held_out_seed", default=0, label="Seed of the draw", description="The same one draws the same pairs"
        )
        held = _count_held_out(ctx, len(samples))
        if held < 2 or len(samples) - held < 2:
            refuse(asked, f"That would hold out {held:,} of {len(samples):,} pairs: at least 2 are needed on each side")
        return len(samples) - held, held
    if target_pairs is None:
        return None
    shared = _shared(samples, target_pairs)
    if shared:
        inputs.bool(
            "leave_out",
            default=True,
            label=f"Leave out the {shared:,} of these that are validation pairs",
            description="A pair that is scored towards itself looks valuable",
            view=types.CheckboxView(),
        )
    left_out = shared if ctx.params.get("leave_out", True) else 0
    if shared and len(samples) - left_out < 2:
        refuse(asked, "All of these are validation pairs. Show training pairs, or choose other validation pairs")
    return len(samples) - left_out, len(target_pairs)


def split(ctx: Any, samples: Any) -> tuple[Any, Any]:
    """What to score and towards what, as answered to :func:`ask_split`: what is held out is drawn and tagged.

    Raises:
        EcifError: if there is no such target
    """
    name = ctx.params["target"]
    if name == HOLD_OUT:
        ids = sorted(samples.values("id"))
        count = _count_held_out(ctx, len(ids))
        drawn = random.Random(ctx.params.get("held_out_seed") or 0).sample(ids, count)
        every_sample(ctx.dataset).match_tags(HELD_OUT_TAG).untag_samples(HELD_OUT_TAG)
        every_sample(ctx.dataset).select(drawn).tag_samples(HELD_OUT_TAG)
        name = f"tag: {HELD_OUT_TAG}"
    target_pairs = _in_shown_slice(ctx, target_view(ctx.dataset, name))
    if ctx.params.get("leave_out", True) and _shared(samples, target_pairs):
        kind, _, tag = name.partition(": ")
        # by the tag where there is one, as a view that names many samples one by one cannot be recorded
        samples = samples.match_tags(tag, bool=False) if kind == "tag" else samples.exclude(target_pairs.values("id"))
    return samples, target_pairs


def _count_held_out(ctx: Any, pairs: int) -> int:
    return math.ceil((ctx.params.get("held_out") or 10.0) / 100 * pairs)


def _shared(samples: Any, target_pairs: Any) -> int:
    return len(set(samples.values("id")) & set(target_pairs.values("id")))


def _ask_target(inputs: Any, ctx: Any, offered: Iterable[str]) -> tuple[Any, Any]:
    """Asks for validation pairs; returns them once they are chosen, and the input."""
    offered = offered if isinstance(offered, Mapping) else {name: name for name in offered}
    before, usual = entered_before(ctx).get("target"), "tag: val"
    target = dropdown(
        inputs,
        "target",
        offered,
        next((name for name in (before, usual, next(iter(offered), None)) if name in offered), None),
        label="Validation pairs",
        description="Influence is measured on the loss of these pairs",
    )
    chosen = ctx.params.get("target")
    if chosen not in offered or chosen == HOLD_OUT:
        return None, target
    target_pairs = _in_shown_slice(ctx, target_view(ctx.dataset, chosen))
    if len(target_pairs) < 2:
        refuse(target, f"The target needs at least 2 pairs, it has {len(target_pairs)}")
    return target_pairs, target


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


def ask_new_file(
    inputs: Any, ctx: Any, default: str, suffixes: Sequence[str], source: str | None = None, **options: Any
) -> None:
    """Asks for a file to write, and whether to replace one that is there.

    Args:
        inputs: the form.
        ctx: its context.
        default: a name for it, in the user's home.
        suffixes: what it may end in.
        source (None): a file that is never written over.
        **options: of the input.
    """
    asked = inputs.str("path", required=True, default=f"~/{default}", **options)
    if not ctx.params.get("path"):
        return
    path = new_file(ctx)
    if not path.is_absolute():  # the App's server runs in a folder of FiftyOne's own
        refuse(asked, f"Give the whole path, such as {Path('~').expanduser() / path}")
    elif path.is_dir():
        refuse(asked, f"{path} is a folder. Add the name of a file")
    elif path.suffix not in suffixes:
        refuse(asked, f"Must end in {' or '.join(suffixes)}")
    elif not path.parent.is_dir():
        refuse(asked, f"There is no folder {path.parent}. Choose one that exists")
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        refuse(asked, f"{path if path.exists() else path.parent} cannot be written. Choose another place")
    elif source and path.exists() and os.path.exists(source) and os.path.samefile(path, source):
        refuse(asked, f"{path} is the checkpoint that the run was made from. Choose another name")
    elif path.exists() and not ask_to_replace(inputs, ctx, str(path), "Replace the file"):
        refuse(asked, f"There is a file {path} already. Replace it, or choose another name")


def new_file(ctx: Any) -> Path:
    """The answer to :func:`ask_new_file`."""
    return user_path(ctx.params["path"])


def ask_to_replace(inputs: Any, ctx: Any, what: str, label: str) -> bool:
    """Asks whether to replace something that is there, and returns the answer; a tick is for that one thing."""
    if not ctx.params.get("overwrite"):
        inputs.bool(_tick(what), default=False, label=label, view=types.CheckboxView())
    return may_replace(ctx, what)


def may_replace(ctx: Any, what: str) -> bool:
    """Whether something that is there may be replaced, as ticked in the form, or said from Python."""
    return bool(ctx.params.get("overwrite") or ctx.params.get(_tick(what)))


def _tick(what: str) -> str:
    return f"replace_{digest(what)[:12]}"


def ask_key(inputs: Any, ctx: Any, default: str, description: str, config: Any) -> None:
    """Asks for the key of a run, and whether to replace one that is there.

    Args:
        inputs: the form.
        ctx: its context.
        default: the key, with a number where it is taken.
        description: what it names.
        config: of such a run.
    """
    from fiftyone_ecif.runs.base import check_key

    free = next(name for name in _numbered(default) if _is_free(ctx.dataset, name, config))
    key = inputs.str("brain_key", required=True, default=free, label="Key", description=description)
    name = ctx.params.get("brain_key")
    if not name:
        return
    try:
        check_key(ctx.dataset, name, True, config)
    except EcifError as error:
        refuse(key, str(error))
        return
    if ctx.dataset.has_brain_run(name) and not ask_to_replace(inputs, ctx, name, f"Replace the run {name!r}"):
        refuse(key, f"There is a run {name!r} already. Replace it, or choose another key")


def _numbered(key: str) -> Iterator[str]:
    yield key
    yield from (f"{key}{number}" for number in itertools.count(2))


def _is_free(dataset: Any, key: str, config: Any) -> bool:
    from fiftyone_ecif.runs.base import check_key

    try:
        check_key(dataset, key, False, config)
    except EcifError:
        return False
    return True


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
        **shown: what the form says otherwise than the table, such as a ``default``, or ``choices`` with a text each.
    """
    known, default = table.options()[name], shown.pop("default", getattr(table, name))
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


def ask_percent(inputs: Any, ctx: Any, name: str = "percent", label: str = "Per cent of the pairs") -> Any:
    """Asks for a share of the pairs, in per cent."""
    asked = inputs.float(name, required=True, default=10.0, label=label)
    percent = ctx.params.get(name)
    if percent is not None and not 0 < percent <= 100:
        refuse(asked, "Must be more than 0 and at most 100")
    return asked


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
