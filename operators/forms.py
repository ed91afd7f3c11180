"""Parts that the operators' forms and placements share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import fiftyone.operators.types as types

from fiftyone_ecif.settings.option import Settings

from .wording import in_words

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


def ask_percent(inputs: Any, ctx: Any, name: str = "percent", label: str = "Per cent of the pairs") -> Any:
    """Asks for a share of the pairs, in per cent."""
    asked = inputs.float(name, required=True, default=10.0, label=label)
    percent = ctx.params.get(name)
    if percent is not None and not 0 < percent <= 100:
        refuse(asked, "Must be more than 0 and at most 100")
    return asked
