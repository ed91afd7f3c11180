"""The fields that the grid's view names, when runs are renamed or go: the view follows, and never shows nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What became of fields: their new name, None of those that are gone.
Fates = Mapping[str, "str | None"]
_GONE = object()


def fields_of_runs(dataset: Any) -> set[str]:
    """The fields that the runs on a dataset write."""
    runs = dataset.list_brain_runs(method="ecif")
    return {name for key in runs for name in dataset.get_brain_info(key).config.fields(key)}


def follow_fields(ctx: Any, fates: Fates) -> None:
    """Sets the grid's view anew where it names fields that have another name now or are gone, and so the thumbnails.

    A stage that names a field that is gone is left out, as it would match nothing.

    Args:
        ctx: of an operator or the panel.
        fates: what became of which fields.
    """
    shown = list(ctx.active_fields or [])
    kept = [name for name in (fates.get(name, name) for name in shown) if name is not None]
    if kept != shown:
        ctx.ops.set_active_fields(kept)
    if any(name in fates for name in ctx.request_params.get("filters") or {}):
        ctx.ops.clear_sidebar_filters()
    before: list[Any] = ctx.request_params.get("view") or []
    stages = [stage for stage in (_renamed(stage, fates) for stage in before) if stage is not _GONE]
    if stages != before:
        ctx.trigger("set_view", {"view": stages})


def _renamed(value: Any, fates: Fates) -> Any:
    """A part of a stage with the new names; :data:`_GONE` if it names a field that is gone."""
    if isinstance(value, str):
        sign = "$" * value.startswith("$")
        name, dot, rest = value.removeprefix(sign).partition(".")
        if name not in fates:
            return value
        return _GONE if fates[name] is None else f"{sign}{fates[name]}{dot}{rest}"
    if isinstance(value, Mapping):
        named = {name: _renamed(part, fates) for name, part in value.items()}
        return _GONE if _GONE in named.values() else named
    if isinstance(value, list | tuple):
        parts = [_renamed(part, fates) for part in value]
        return _GONE if _GONE in parts else parts
    return value
