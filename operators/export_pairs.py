"""The operator that writes pairs and scores to a file."""

from __future__ import annotations

import os
from typing import Any

import fiftyone.operators as foo
import fiftyone.operators.types as types

from .forms import ask_new_file, blocked, dropdown, menu_button, new_file, unusable
from .jobs import call


class ExportPairs(foo.Operator):
    """Exports ids, paths, captions, tags and scores."""

    @property
    def config(self) -> foo.OperatorConfig:
        return foo.OperatorConfig(
            name="export_pairs",
            label="Export pairs",
            description="Write ids, paths, captions, tags and scores to a CSV or JSON file",
            icon="download",
            dynamic=True,
            allow_delegated_execution=True,
            risk_level="medium",
        )

    def resolve_placement(self, ctx: Any) -> types.Placement:
        return menu_button("Export pairs", "download")

    def resolve_input(self, ctx: Any) -> types.Property:
        inputs = types.Object()
        if unusable(inputs, ctx):
            return types.Property(inputs)
        from fiftyone_ecif.samples.export import EXPORT_FORMATS
        from fiftyone_ecif.samples.pairs import caption_fields

        inputs.view_target(ctx, action_description="Export")
        inputs.view("counts", types.Notice(label=f"{len(ctx.target_view()):,} pairs will be exported"))
        fields = caption_fields(ctx.dataset)
        if not fields:
            blocked(inputs, "no_captions", "This dataset has no string field that could hold captions")
            return types.Property(inputs)
        dropdown(inputs, "caption_field", fields, "caption", label="Caption field")
        ask_new_file(
            inputs,
            ctx,
            f"{ctx.dataset.slug}.csv",
            EXPORT_FORMATS,
            label="File",
            description="On the machine that runs FiftyOne; ends in .csv or .json",
        )
        return types.Property(inputs, view=types.View(label="Export pairs"))

    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.samples.export import export_pairs

        path = new_file(ctx)
        caption_field = ctx.params.get("caption_field", "caption")
        count = export_pairs(ctx.target_view(), path, caption_field, overwrite=ctx.params.get("overwrite", False))
        ctx.ops.notify(f"Exported {count:,} pairs to {path}", variant="success")
        return {"path": str(path), "count": count}

    def resolve_output(self, ctx: Any) -> types.Property:
        outputs = types.Object()
        outputs.str("path", label="File")
        outputs.int("count", label="Pairs exported")
        return types.Property(outputs)

    def __call__(self, samples: Any, path: str, **params: Any) -> Any:
        """Exports a dataset or view; the options are those of :func:`fiftyone_ecif.export_pairs`."""
        params = {"caption_field": "caption", "path": os.path.abspath(os.path.expanduser(path)), **params}
        return call(self.uri, samples, False, params)
