"""The operator that lists, describes, renames and deletes runs, and clears the cache of what nothing uses."""

from __future__ import annotations

import functools
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import fiftyone as fo
import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.errors import EcifError

from .base import FormOperator
from .forms import blocked, dropdown, refuse, warning
from .jobs import call
from .view_fields import follow_fields
from .wording import in_words

if TYPE_CHECKING:
    from fiftyone_ecif.runs.manage import RunEntry, Stale

_ACTIONS = {"describe": "Describe", "rename": "Rename", "delete": "Delete", "free": "Free disk"}
_CONFIRMED = "delete_"  # what the name of a tick starts with
_REMEMBERED = 20  # seconds


class ManageInfluenceRuns(FormOperator):
    """Describes, renames and deletes runs, and frees disk."""

    identifier = "manage_influence_runs"
    title = "Manage influence runs"
    about = "Describe, rename and delete runs, see what changed since, free disk"
    icon = "inventory_2"
    risk = "high"

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        choice = types.RadioGroup(orientation="horizontal")
        for name, label in _ACTIONS.items():
            choice.add_choice(name, label=label)
        inputs.enum("action", choice.values(), required=True, default="describe", label="What to do", view=choice)
        action = ctx.params.get("action", "describe")
        if action == "free":
            _say_what_is_freed(inputs)
            return
        from fiftyone_ecif.runs.describe import describe_run
        from fiftyone_ecif.runs.manage import list_runs

        runs = {run.key: run for run in list_runs(ctx.dataset)}
        if not runs:
            blocked(inputs, "no_run", "No runs yet: run Compute ECIF influence or Detect misaligned pairs first")
            return
        labels = {key: _label(ctx.dataset, run) for key, run in runs.items()}
        chosen = dropdown(inputs, "brain_key", labels, next(iter(labels)), label="Run")
        run = runs.get(ctx.params.get("brain_key"))
        if run is None:
            if key := ctx.params.get("brain_key"):
                refuse(chosen, f"There is no run {key!r}. Runs: {', '.join(runs)}")
        elif action == "describe":
            about = in_words(describe_run(ctx.dataset, run.key))
            inputs.md(about, name=f"about_{run.key}")  # the App keeps the text that a name had first
        elif action == "rename":
            _ask_new_key(inputs, ctx, run)
        else:
            _ask_consent(inputs, ctx, run)

    @override
    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.runs.cache import free_disk, size_text
        from fiftyone_ecif.runs.describe import describe_run
        from fiftyone_ecif.runs.manage import delete_run, rename_run

        action, key, dataset = ctx.params.get("action", "describe"), ctx.params.get("brain_key"), ctx.dataset
        if action == "describe":
            return {"about": in_words(describe_run(dataset, key))}
        fates: dict[str, str | None] = {}
        if action == "rename":
            new_key = ctx.params["new_key"]
            rename_run(dataset, key, new_key)
            config = dataset.get_brain_info(new_key).config
            fates = dict(zip(config.fields(key), config.fields(new_key), strict=True))
            result, said = {"brain_key": new_key}, f"The run {key!r} is now {new_key!r}"
        elif action == "delete":
            gone = delete_run(dataset, key)
            fates = dict.fromkeys(gone.fields)
            result, said = gone._asdict(), f"Deleted the run {key!r}, with {gone}"
        else:
            freed = free_disk()
            result, said = {"cache_bytes": freed}, f"Freed {size_text(freed)}"
        follow_fields(ctx, fates)
        ctx.ops.reload_dataset()
        ctx.ops.notify(said, variant="success")
        return {**result, "about": said}

    @override
    def resolve_output(self, ctx: Any) -> types.Property:
        outputs = types.Object()
        outputs.md(ctx.results["about"], name="about")
        return types.Property(outputs, view=types.View(label=self.title))

    def __call__(
        self, samples: Any, action: str = "describe", brain_key: str | None = None, new_key: str | None = None
    ) -> Any:
        """Manages the runs of a dataset; a view stands for its dataset. Nobody is asked before a run is deleted."""
        params = {"action": action, "brain_key": brain_key, "new_key": new_key, f"{_CONFIRMED}{brain_key}": True}
        return call(self.uri, samples, False, params)


def _say_what_is_freed(inputs: Any) -> None:
    from fiftyone_ecif.runs.cache import cache_size, size_text, unused_size

    inputs.view(
        "unused",
        types.Notice(
            label=f"The cache takes {size_text(cache_size())}. {size_text(unused_size())} of it will be freed: caches "
            "of datasets that are gone, and tables that stopped jobs left more than a day ago. What a run uses stays"
        ),
    )


def _ask_new_key(inputs: Any, ctx: Any, run: RunEntry) -> None:
    from fiftyone_ecif.runs.manage import check_rename

    asked = inputs.str(
        "new_key",
        required=True,
        label="New key",
        description="The run's fields are renamed with it; saved views that name them are not",
    )
    if new_key := ctx.params.get("new_key"):
        try:
            check_rename(ctx.dataset, run.key, new_key)
        except EcifError as error:
            refuse(asked, str(error))


def _ask_consent(inputs: Any, ctx: Any, run: RunEntry) -> None:
    from fiftyone_ecif.runs.manage import removal

    warning(inputs, "goes", f"The run will be deleted, with {removal(ctx.dataset, run.key)}")
    name = _CONFIRMED + run.key  # a tick is for one run: it stays when another is chosen
    tick = inputs.bool(name, default=False, label="Yes, delete", view=types.CheckboxView())
    if not ctx.params.get(name):
        refuse(tick, f"Tick to delete the run {run.key!r}")


def _label(dataset: Any, run: RunEntry) -> str:
    stale = _stale(dataset.name, run.key, run.when, int(time.monotonic() / _REMEMBERED))
    return f"{run} (stale: {stale})" if stale else str(run)


@functools.lru_cache(maxsize=64)
def _stale(name: str, key: str, when: datetime, period: int) -> Stale:
    """What changed since a run. That takes seconds where pairs are many, and a form asks at every keystroke."""
    from fiftyone_ecif.runs.manage import staleness

    return staleness(fo.load_dataset(name), key)
