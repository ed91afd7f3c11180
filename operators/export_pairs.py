"""The operator that writes pairs and scores to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fiftyone.operators as foo
import fiftyone.operators.types as types

from .forms import blocked, dropdown, menu_button, refuse, unusable
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
        from fiftyone_ecif.curation import EXPORT_FORMATS
        from fiftyone_ecif.samples import caption_fields

        inputs.view_target(ctx, action_description="Export")
        inputs.view("counts", types.Notice(label=f"{len(ctx.target_view()):,} pairs will be exported"))
        fields = caption_fields(ctx.dataset)
        if not fields:
            blocked(inputs, "no_captions", "This dataset has no string field that could hold captions")
            return types.Property(inputs)
        dropdown(inputs, "caption_field", fields, "caption", label="Caption field")
        path = inputs.str(
            "path",
            required=True,
            label="File",
            description="On the machine that runs FiftyOne; ends in .csv or .json",
        )
        chosen = ctx.params.get("path")
        if chosen and Path(chosen).suffix not in EXPORT_FORMATS:
            refuse(path, f"Must end in {' or '.join(EXPORT_FORMATS)}")
        elif chosen and Path(chosen).expanduser().exists():
            inputs.bool("overwrite", default=False, label="Replace the file", view=types.CheckboxView())
            if not ctx.params.get("overwrite"):
                refuse(path, "There is such a file already")
        return types.Property(inputs, view=types.View(label="Export pairs"))

    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.curation import export_pairs

        path = Path(ctx.params["path"]).expanduser().absolute()
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
        params = {"caption_field": "caption", "path": str(path), **params}
        return call(self.uri, samples, False, params)
