"""Names that may be taken: a file to write, the key of a run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fiftyone.operators.types as types

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import user_path
from fiftyone_ecif.store.keys import digest

from .forms import refuse


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
