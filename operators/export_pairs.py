"""The operator that writes pairs and scores to a file."""

from __future__ import annotations

import os
from typing import Any

import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.store.files import user_path

from .base import FormOperator
from .jobs import call
from .name_input import ask_new_file, may_replace, new_file
from .pairs_input import ask_caption_field, pairs_to_act_on


class ExportPairs(FormOperator):
    """Exports ids, paths, captions, tags and scores."""

    identifier = "export_pairs"
    title = "Export pairs"
    about = "Write ids, paths, captions, tags and scores to a CSV or JSON file"
    icon = "download"
    delegable = True

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        from fiftyone_ecif.samples.export import EXPORT_FORMATS

        inputs.view_target(ctx, action_description="Export")
        inputs.view("counts", types.Notice(label=f"{len(pairs_to_act_on(ctx)):,} pairs will be exported"))
        if ask_caption_field(inputs, ctx, pairs_to_act_on(ctx)) is None:
            return
        ask_new_file(
            inputs,
            ctx,
            f"{ctx.dataset.slug}.csv",
            EXPORT_FORMATS,
            label="File",
            description="On the machine that runs FiftyOne; ends in .csv or .json",
        )

    @override
    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.samples.export import export_pairs

        path = new_file(ctx)
        caption_field = ctx.params.get("caption_field", "caption")
        count = export_pairs(pairs_to_act_on(ctx), path, caption_field, overwrite=may_replace(ctx, str(path)))
        ctx.ops.notify(f"Exported {count:,} pairs to {path}", variant="success")
        return {"path": str(path), "count": count}

    @override
    def resolve_output(self, ctx: Any) -> types.Property:
        outputs = types.Object()
        outputs.str("path", label="File")
        outputs.int("count", label="Pairs exported")
        return types.Property(outputs)

    def __call__(self, samples: Any, path: str, **params: Any) -> Any:
        """Exports a dataset or view; the options are those of :func:`fiftyone_ecif.export_pairs`."""
        params = {"caption_field": "caption", "path": os.path.abspath(user_path(path)), **params}
        return call(self.uri, samples, False, params)
