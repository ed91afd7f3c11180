"""The operator that tags pairs by their scores."""

from __future__ import annotations

from typing import Any

import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import every_sample

from .base import FormOperator
from .forms import blocked, dropdown, refuse, warning
from .jobs import call

_LIMITS = {"count": "A number of pairs", "share": "A share of the pairs", "threshold": "All beyond a score"}


class TagByInfluence(FormOperator):
    """Tags the most harmful or the most valuable pairs."""

    identifier = "tag_by_influence"
    title = "Tag by influence"
    about = "Tag the most harmful or the most valuable pairs"
    icon = "sell"
    delegable = True

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        from fiftyone_ecif.samples.review_tags import check_score_tag
        from fiftyone_ecif.samples.selection import DIRECTIONS, score_fields, select_by_influence

        inputs.view_target(ctx, action_description="Tag among")
        fields = score_fields(ctx.dataset)
        if not fields:
            blocked(inputs, "no_scores", "No scores yet: run Compute ECIF influence first")
            return
        ours = [field for end in ("_influence", "_misalignment") for field in fields if field.endswith(end)]
        default = (ours or fields)[0]
        dropdown(inputs, "field", fields, default, label="Score")
        is_misalignment = (ctx.params.get("field") or default).endswith("_misalignment")
        dropdown(
            inputs, "direction", list(DIRECTIONS), "suspicious" if is_misalignment else "harmful", label="Which end"
        )
        if is_misalignment and DIRECTIONS.get(ctx.params.get("direction")) == "lowest":
            warning(inputs, "end", "The lowest scores of misalignment are those of the least suspicious pairs")
        choice = types.RadioGroup()
        for name, label in _LIMITS.items():
            choice.add_choice(name, label=label)
        inputs.enum("limit", choice.values(), required=True, default="count", label="How many", view=choice)
        limit = ctx.params.get("limit", "count")
        if limit == "count":
            value = inputs.int("count", required=True, default=100, label="Pairs")
        elif limit == "share":
            value = inputs.float("share", required=True, default=0.1, label="Share, from 0 to 1")
        else:
            value = inputs.float("threshold", required=True, default=0.0, label="Score")
        tag = inputs.str("tag", required=True, default=ctx.params.get("direction", "harmful"), label="Tag")
        try:
            check_score_tag(ctx.params.get("tag"))
        except EcifError as error:
            refuse(tag, str(error))
        if ctx.params.get(limit) is not None and ctx.params.get("field") and ctx.params.get("direction"):
            try:
                selected = select_by_influence(
                    ctx.target_view(), ctx.params["field"], ctx.params["direction"], **{limit: ctx.params[limit]}
                )
                inputs.view("preview", types.Notice(label=f"{len(selected):,} pairs will be tagged"))
            except EcifError as error:
                refuse(value, str(error))

    @override
    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.samples.selection import DIRECTIONS, tag_by_influence

        direction = ctx.params.get("direction", "harmful")
        tag = ctx.params.get("tag") or direction
        limit = ctx.params.get("limit", "count")
        field = ctx.params.get("field", "ecif_influence")
        view = tag_by_influence(ctx.target_view(), field, tag, direction, **{limit: ctx.params.get(limit)})
        count = len(view)
        ctx.ops.reload_dataset()
        tagged = every_sample(ctx.dataset).match_tags(tag).exists(field)
        ctx.ops.set_view(view=tagged.sort_by(field, reverse=DIRECTIONS[direction] == "highest"))
        ctx.ops.notify(f"Tagged {count:,} pairs {tag!r}", variant="success")
        return {"tag": tag, "count": count}

    @override
    def resolve_output(self, ctx: Any) -> types.Property:
        outputs = types.Object()
        outputs.str("tag", label="Tag")
        outputs.int("count", label="Pairs tagged")
        return types.Property(outputs)

    def __call__(self, samples: Any, **params: Any) -> Any:
        """Tags pairs of a dataset or view; the options are those of :func:`fiftyone_ecif.tag_by_influence`."""
        given = [name for name in _LIMITS if params.get(name) is not None]
        defaults = {"field": "ecif_influence", "direction": "harmful", "limit": given[0] if given else "count"}
        params = {**defaults, "tag": params.get("direction", "harmful"), **params}
        return call(self.uri, samples, False, params)
