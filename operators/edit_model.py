"""The operator that takes pairs out of a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.samples.pairs import every_sample
from fiftyone_ecif.store.files import user_path

from .base import JobOperator
from .estimates import Plan
from .forms import ask_background, blocked, dropdown, refuse, warning
from .jobs import Job, call, report, with_progress
from .memory import wish
from .name_input import ask_new_file, may_replace, new_file
from .target_input import target_names, target_view

_KEY, _SELECTION = "ecif", "selection"
_HARMFUL = "tag: harmful"  # what Tag by influence and the panel give
_FORMATS = (".pt", ".pth", ".safetensors")


class EditModel(JobOperator):
    """Writes the model of a run as if some of its pairs had never been trained on."""

    identifier = "edit_model"
    title = "Edit model"
    about = "The model of a run as if chosen pairs had never been trained on, without retraining"
    icon = "auto_fix_high"

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        runs = ctx.dataset.list_brain_runs(type="influence", method="ecif")
        if not runs:
            blocked(inputs, "no_run", "No run to edit the model of yet: run Compute ECIF influence first")
            return
        default = _KEY if _KEY in runs else runs[-1]
        dropdown(inputs, "brain_key", runs, default, label="Run", description="Whose model to edit")
        key = ctx.params.get("brain_key") or default
        _ask_removed(inputs, ctx, key if key in runs else default)
        ask_new_file(
            inputs,
            ctx,
            "edited.pt",
            _FORMATS,
            ctx.dataset.get_brain_info(key if key in runs else default).config.pretrained,
            label="Checkpoint",
            description=f"A file to write on the machine that runs FiftyOne; ends in {' or '.join(_FORMATS)}",
        )
        ask_background(inputs)

    @override
    def resolve_run_name(self, ctx: Any) -> str:
        return f"Model edit, run {ctx.params.get('brain_key', _KEY)!r}"

    def work(self, ctx: Any, job: Job) -> Iterator[Any]:
        """Edits the model."""
        from fiftyone_ecif.api.editing import edit_steps
        from fiftyone_ecif.runs.manage import load_run

        key = ctx.params.get("brain_key", _KEY)
        removed = _removed(ctx, ctx.params["remove"]).exists(f"{key}_influence").values("id")
        results = load_run(ctx.dataset, key)
        config, path = results.config, new_file(ctx)
        work = edit_steps(results, removed, str(path), overwrite=may_replace(ctx, str(path)))
        plan = Plan(f"edit {config.model} {config.scope}", len(results.ids), config.model, config.scope)
        edit = yield from with_progress(ctx, job, plan, work)
        yield report(ctx, str(edit), 1.0)
        if not ctx.delegated:
            yield ctx.ops.notify(str(edit), variant="success")
            wish(ctx, key, "run")

    def __call__(
        self,
        samples: Any,
        remove: str,
        path: str,
        brain_key: str = _KEY,
        overwrite: bool = False,
        delegate: bool = False,
    ) -> Any:
        """Edits the model of a run of a dataset; a view stands for its dataset.

        ``remove`` is ``"tag: NAME"`` or ``"saved view: NAME"``. The other options are
        those of :func:`fiftyone_ecif.edit_model`, and so are the errors. What the edit
        did is in the run's ``diagnostics["edit"]``, and on the panel's Run page.
        """
        params = {
            "remove": remove,
            "path": os.path.abspath(user_path(path)),
            "brain_key": brain_key,
            "overwrite": overwrite,
        }
        return call(self.uri, samples, delegate, params)


def _ask_removed(inputs: Any, ctx: Any, key: str) -> None:
    offered = {name: name for name in target_names(ctx.dataset)}
    if ctx.selected:
        offered = {_SELECTION: f"The {len(ctx.selected):,} selected samples", **offered}
    removed = dropdown(
        inputs,
        "remove",
        offered,
        _SELECTION if ctx.selected else _HARMFUL,
        label="Pairs to remove",
        description="The model will be as if it had never been trained on them",
    )
    chosen = ctx.params.get("remove")
    if not ctx.dataset.has_sample_field(f"{key}_influence"):
        refuse(removed, f"The field {key}_influence is no longer there. Make the run again, or choose another one")
    elif chosen in offered:
        view, scored = _removed(ctx, chosen), every_sample(ctx.dataset).count(f"{key}_influence")
        count = view.count(f"{key}_influence")
        if count == 0:
            refuse(removed, f"None of these {len(view):,} samples was scored by run {key!r}")
        elif scored - count < 2:
            refuse(removed, f"Removing {count:,} of {scored:,} pairs leaves no pairs to learn from")
        else:
            left_out = f"; the other {len(view) - count:,} were not scored by it" * (count < len(view))
            said = f"{count:,} of the {scored:,} pairs of run {key!r} will be removed{left_out}"
            inputs.view("counts", types.Notice(label=said))
    if not ctx.dataset.get_brain_info(key).config.fit:
        warning(
            inputs,
            "not_fitted",
            f"Run {key!r} did not fit the model to its pairs first, so it may not be at a minimum of their loss, and "
            "the edit is a rougher estimate. For a better one, make a run with that box ticked",
        )


def _removed(ctx: Any, remove: str) -> Any:
    return every_sample(ctx.dataset).select(ctx.selected) if remove == _SELECTION else target_view(ctx.dataset, remove)
