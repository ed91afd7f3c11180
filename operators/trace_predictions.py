"""The operator that finds the training pairs behind mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fiftyone.operators.types as types
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import pairs_now

from .base import FormOperator
from .forms import blocked, dropdown, refuse, warning
from .jobs import call, show
from .memory import keep_trace, wish

if TYPE_CHECKING:
    from fiftyone_ecif.api.tracing import Trace

_KEY, _COUNT, _LIMIT = "ecif", 5, 5


class TracePredictions(FormOperator):
    """Shows mistakes of a model on validation pairs beside the training pairs behind them."""

    identifier = "trace_predictions"
    title = "Trace predictions"
    about = "Which training pairs are behind a mistake, and which help against it"
    icon = "troubleshoot"

    def ask(self, inputs: Any, ctx: Any) -> None:
        """Fills the form."""
        runs = ctx.dataset.list_brain_runs(type="influence", method="ecif", keep_gradients=True)
        if not runs:
            any_run = ctx.dataset.list_brain_runs(type="influence", method="ecif")
            blocked(
                inputs,
                "no_run",
                f"Run {any_run[0]!r} kept no gradients: run Compute ECIF influence with scope 'heads'"
                if any_run
                else "Nothing to trace with yet: run Compute ECIF influence first",
            )
            return
        default = _KEY if _KEY in runs else runs[-1]
        run = dropdown(inputs, "brain_key", runs, default, label="Run")
        key = ctx.params.get("brain_key") or default
        if key in runs:
            _ask_queries(inputs, ctx, key, run)
        count = inputs.int("count", required=True, default=_COUNT, label="Pairs that harm, and that help, for each")
        _at_least_one(ctx, "count", count)

    @override
    def execute(self, ctx: Any) -> dict[str, Any]:
        from fiftyone_ecif.api.tracing import mark_traces, trace
        from fiftyone_ecif.runs.manage import load_run
        from fiftyone_ecif.runs.sidebar import show_fields

        key = ctx.params.get("brain_key", _KEY)
        results = load_run(ctx.dataset, key)
        queries = _chosen(ctx)
        limit = None if queries else ctx.params.get("limit", _LIMIT)
        traces = trace(results, queries or None, ctx.params.get("count", _COUNT), limit=limit, progress=False)
        view = mark_traces(results, traces)
        show_fields(ctx.dataset, key, [f"{key}_trace"])  # in a colour that says neither harmful nor helpful
        keep_trace(ctx, str(ctx.dataset._doc.brain_methods[key].id), traces)
        wish(ctx, key, "trace")
        ctx.ops.open_panel("influence_panel", layout="horizontal")
        caption_field = results.config.caption_field
        for _ in show(ctx, view, caption_field, f"{key}_trace"):
            pass
        harm, help_ = ({pair.id for one in traces for pair in getattr(one, side)} for side in ("culprits", "helpers"))
        ctx.ops.notify(
            f"Traced {len(traces):,} validation pairs: {len(harm):,} training pairs harm them, {len(help_):,} help. "
            "Each is followed by those that harm it, the worst first, then by those that help",
            variant="success",
        )
        pairs = pairs_now(ctx.dataset, caption_field, view.values("id"))
        return {"pairs": _rows(traces, {sample: caption for sample, (_, caption) in pairs.items()})}

    def __call__(
        self, samples: Any, queries: Any = None, brain_key: str = _KEY, count: int = _COUNT, limit: int = _LIMIT
    ) -> Any:
        """Traces validation pairs of a run of a dataset; a view stands for its dataset.

        Args:
            samples: the dataset.
            queries (None): a view or ids of validation pairs; by default the mistakes.
            brain_key ("ecif"): the run.
            count (5): pairs of each kind to show for each.
            limit (5): mistakes to trace at most, the worst.
        """
        params = {"brain_key": brain_key, "count": count, "limit": limit, "queries": "mistakes"}
        if queries is not None:
            ids = list(queries if isinstance(queries, list | tuple) else queries.values("id"))
            if not ids:
                raise EcifError("No validation pairs were given to trace. Leave queries out for the mistakes")
            params |= {"queries": "chosen", "ids": ids}
        return call(self.uri, samples, False, params)


def _chosen(ctx: Any) -> list[str]:
    """Ids of the samples to trace; none stands for the mistakes."""
    if ctx.params.get("queries", "chosen") == "mistakes":
        return []
    ids: list[str] = ctx.params.get("ids") or ctx.selected
    return ids


def _ask_queries(inputs: Any, ctx: Any, key: str, run: Any) -> None:
    from fiftyone_ecif.api.tracing import count_mistakes
    from fiftyone_ecif.runs.manage import load_run

    try:
        results = load_run(ctx.dataset, key)
        mistakes = count_mistakes(key, results.config)
    except EcifError as error:
        refuse(run, str(error))
        return
    target_pairs = {sample for ids in results.target_ids.values() for sample in ids}
    worst = f"The worst of the {mistakes:,} mistakes on {len(target_pairs):,} validation pairs"
    offered = ctx.params.get("ids") or ctx.selected
    if offered:
        choice = types.RadioGroup()
        choice.add_choice("chosen", label=f"The {len(offered):,} selected samples")
        choice.add_choice("mistakes", label=worst)
        asked = inputs.enum("queries", choice.values(), default="chosen", label="What to trace", view=choice)
    else:
        asked = inputs.view(
            "mistakes", types.Notice(label=f"{worst} will be traced. Select some of them to trace others")
        )
    ids = _chosen(ctx)
    outside = [sample for sample in ids if sample not in target_pairs]
    if outside:
        refuse(
            asked,
            f"{len(outside):,} of the {len(ids):,} samples are not validation pairs of run {key!r}; the first is "
            f"{outside[0]}. Deselect them, or score towards pairs that hold them",
        )
    if not ids:
        if not mistakes:
            refuse(asked, "The model makes no mistakes on these pairs. Select some of them to trace")
        limit = inputs.int("limit", required=True, default=_LIMIT, label="Mistakes to trace at most")
        _at_least_one(ctx, "limit", limit)
    home = results.target_dataset()
    if home is not ctx.dataset:
        name = results.config.target["dataset"] if home is None else home.name
        warning(
            inputs, "elsewhere", f"The validation pairs are in dataset {name!r}: here you see the pairs behind them"
        )


def _at_least_one(ctx: Any, name: str, prop: Any) -> None:
    if ctx.params.get(name) is not None and ctx.params[name] < 1:
        refuse(prop, "Must be at least 1")


def _rows(traces: list[Trace], captions: dict[str, str]) -> list[dict[str, Any]]:
    """What came of it, for Python: each query, then what harms and what helps it."""
    rows: list[dict[str, Any]] = []
    numbers = {sample: number for number, sample in enumerate(dict.fromkeys(one.id for one in traces), start=1)}
    for one in traces:
        number = numbers[one.id]
        what = "mistake" if one.mistake else "no mistake"
        rows.append({"query": number, "effect": f"{what}, loss {one.loss:.2f}", "relative_influence": "", "id": one.id})
        for effect, pairs in (("harms", one.culprits), ("helps", one.helpers)):
            rows += [
                {"query": number, "effect": effect, "relative_influence": f"{p.relative_influence:.2e}", "id": p.id}
                for p in pairs
            ]
    return [row | {"caption": captions.get(row["id"])} for row in rows]
