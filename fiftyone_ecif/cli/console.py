"""What every command shares: results to stdout, messages to stderr, errors in one line."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

from fiftyone_ecif.errors import EcifError

if TYPE_CHECKING:
    from fiftyone_ecif.distributed import ProcessGroup

SLICE = click.option("--slice", help="Of grouped data: the slice that holds the images.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@functools.cache
def _messages() -> TextIO:
    """A second stream to stderr, for what FiftyOne prints.

    Not stderr itself: FiftyOne's progress bars take over every log handler of
    the stream that they draw on. Never closed: FiftyOne's log keeps it.
    """
    return open(os.dup(2), "w", buffering=1)


@contextlib.contextmanager
def job(shared: bool = False) -> Iterator[None]:
    """Keeps stdout for results and turns the library's errors into one line and exit code 1.

    Args:
        shared: whether several processes can share the job.
    """
    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    logging.getLogger("fiftyone_ecif").setLevel(logging.INFO)
    with contextlib.redirect_stdout(_messages()):
        try:
            if not shared and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise EcifError("Only score and misalignment can be shared by processes. Run this without torchrun")
            yield
        except EcifError as error:
            raise click.ClickException(str(error)) from error


def print_result(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """One JSON object, or what ``text`` makes of it."""
    click.echo(json.dumps(result) if as_json else text(result))


def load_dataset(name: str) -> Any:
    """A FiftyOne dataset.

    Raises:
        EcifError: if there is none of that name, with those that are
    """
    import fiftyone as fo

    if not fo.dataset_exists(name):
        known = ", ".join(fo.list_datasets()) or "none"
        raise EcifError(f"There is no dataset {name!r}. Datasets here: {known}")
    return fo.load_dataset(name)


def load_dataset_in_turn(name: str, processes: ProcessGroup) -> Any:
    """As :func:`load_dataset`, in the first process first: it starts FiftyOne's database, which the others join."""
    if not processes.first:
        logging.getLogger("fiftyone_ecif").setLevel(logging.ERROR)
        processes.wait()
    found = load_dataset(name)
    if processes.first:
        processes.wait()
    return found


def narrow(dataset: Any, tags: tuple[str, ...], view: str | None, slice: str | None = None) -> Any:
    """The samples of a dataset that have a tag, of all or of a saved view, of a slice of grouped data.

    Args:
        dataset: a FiftyOne dataset.
        tags: at least one of which they have; all samples where none is given.
        view: the name of a saved view, or None.
        slice: the name of a slice of images, or None.

    Raises:
        EcifError: if there is no such view or slice, with those that are
    """
    if view is not None and not dataset.has_saved_view(view):
        known = ", ".join(dataset.list_saved_views()) or "none"
        raise EcifError(f"{dataset.name!r} has no saved view {view!r}. Saved views: {known}")
    samples = dataset.load_saved_view(view) if view else dataset.view()
    if slice is not None:
        slices = dataset.group_slices or []
        if slice not in slices:
            raise EcifError(f"{dataset.name!r} has no slice {slice!r}. Slices: {', '.join(slices) or 'none'}")
        samples = samples.select_group_slices(slice)
    return samples.match_tags(list(tags)) if tags else samples
