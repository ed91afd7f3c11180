"""The operator that tags pairs by their scores."""

from __future__ import annotations

from typing import Any

import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import every_sample

from .base import FormOperator
from .forms import ask_percent, blocked, dropdown, refuse
from .jobs import call, set_thumbnails, thumbnails_of
from .pairs_input import pairs_to_act_on

_LIMITS = {"count": "A number of pairs", "share": "A share of the pairs", "threshold": "All beyond a score"}
_WHICH = {"harmful": "harmful: without them the model does better", "valuable": "valuable: without them it does worse"}


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
        from fiftyone_ecif.samples.selection import score_fields, select_by_influence

        inputs.view_target(ctx, action_description="Tag among")
        fields = score_fields(ctx.dataset)
        if not fields:
            blocked(inputs, "no_scores", "No scores yet: run Compute ECIF influence first")
            return
        ours = [field for end in ("_influence", "_misalignment") for field in fields if field.endswith(end)]
        default = (ours or fields)[0]
        dropdown(inputs, "field", fields, default, label="Score")
        field = ctx.params.get("field") or default
        if not _is_misalignment(field):
            dropdown(inputs, "direction", _WHICH, "harmful", label="Which pairs")
        choice = types.RadioGroup()
        for name, label in _LIMITS.items():
            choice.add_choice(name, label=label)
        inputs.enum("limit", choice.values(), required=True, default="count", label="How many", view=choice)
        limit = ctx.params.get("limit", "count")
        if limit == "count":
            value = inputs.int("count", required=True, default=100, label="Pairs")
        elif limit == "threshold":
            value = inputs.float("threshold", required=True, default=0.0, label="Score")
        elif ctx.params.get("share") is not None:  # from Python
            value = inputs.float("share")
        else:
            value = ask_percent(inputs, ctx)
        direction = _direction(ctx, field)
        tag = inputs.str("tag", label="Tag", description=f"{direction!r} if left empty")
        try:
            check_score_tag(ctx.params.get("tag"))
        except EcifError as error:
            refuse(tag, str(error))
        if (how_many := _limit(ctx)) is not None and not value.invalid:
            try:
                selected = select_by_influence(pairs_to_act_on(ctx), field, direction, **{limit: how_many})
            except EcifError as error:
                refuse(value, str(error))
            else:
                _say_how_many(inputs, ctx, field, direction, len(selected))

    @override
    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.samples.selection import DIRECTIONS, tag_by_influence

        field = ctx.params.get("field", "ecif_influence")
        direction = _direction(ctx, field)
        tag = (ctx.params.get("tag") or "").strip() or direction
        limit = ctx.params.get("limit", "count")
        view = tag_by_influence(pairs_to_act_on(ctx), field, tag, direction, **{limit: _limit(ctx)})
        count = len(view)
        ctx.ops.reload_dataset()
        set_thumbnails(ctx, *thumbnails_of(ctx.dataset, field))
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
        return call(self.uri, samples, False, {**defaults, **params})


def _is_misalignment(field: str) -> bool:
    return field.endswith("_misalignment")


def _direction(ctx: Any, field: str) -> str:
    """Which end of the score is taken: one of a choice that belongs to the field."""
    chosen: str = ctx.params.get("direction") or "harmful"
    return "suspicious" if _is_misalignment(field) else chosen


def _limit(ctx: Any) -> Any:
    """How many are taken, in the unit of the library; None while nothing is entered."""
    limit = ctx.params.get("limit", "count")
    if limit == "share" and ctx.params.get("share") is None:
        percent = ctx.params.get("percent")
        return None if percent is None else percent / 100
    return ctx.params.get(limit)


def _say_how_many(inputs: Any, ctx: Any, field: str, direction: str, taken: int) -> None:
    """Says how many will be tagged, and what keeps them from being as many as was asked for."""
    from fiftyone_ecif.samples.selection import select_by_influence

    among, everything = pairs_to_act_on(ctx), every_sample(ctx.dataset)
    scored = len(among.exists(field))
    right, right_of_all = (
        len(select_by_influence(view, field, direction, share=1.0)) if len(view.exists(field)) else 0
        for view in (among, everything)
    )
    wanted = ctx.params["count"] if ctx.params.get("limit", "count") == "count" else None
    said = f"{taken:,} pairs will be tagged"
    if wanted is not None and taken < wanted:
        said += f", not {wanted:,}: of the {len(among):,} samples to choose among, {scored:,} have this score"
        if direction != "suspicious":
            said += f", and {right:,} of those are {direction}"
        if right_of_all > right:
            said += f". The whole dataset has {right_of_all:,}: choose 'Entire dataset' at the top"
    inputs.view("preview", types.Notice(label=said))
