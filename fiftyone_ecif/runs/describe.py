"""A run in plain words."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fiftyone_ecif.misalignment.noise_rate import NoiseRate
from fiftyone_ecif.runs.cache import size_text
from fiftyone_ecif.runs.manage import find_config, read_entry, staleness
from fiftyone_ecif.runs.reading import read_results

#: What a run found, in plain words.
_DIAGNOSTICS = {
    "target_pairs": "Validation pairs",
    "shared_pairs": "Validation pairs that are also scored",
    "target_loss": "Loss on the validation pairs",
    "training_loss": "Loss on the scored pairs",
    "relative_gradient_norm": "Distance from a minimum (relative gradient norm, 0 is ideal)",
    "damping": "Damping that the curvature needed (0 is ideal)",
    "solve_residual": "Residual of the solve",
    "cached_correlation": "How well stored gradients reproduce the scores (1 is ideal)",
    "tagged": "Pairs tagged",
}


def describe_run(dataset: Any, key: str) -> str:
    """A run in plain words, as Markdown: what it is, what it was told, what tells how far to trust it.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run.

    Raises:
        EcifError: if there is no such run
    """
    config, results, run = find_config(dataset, key), read_results(dataset, key), read_entry(dataset, key)
    found, reviewed = {} if results is None else results.diagnostics, getattr(config.record, "reviewed", None)
    pairs = (
        "Stopped before its results were written"
        if run.scored is None
        else f"Pairs: {run.scored:,} scored, {run.skipped:,} skipped"
    )
    lines = [
        f"**{key}**: {run.kind} by {' '.join(filter(None, [run.model, run.pretrained]))}",
        "",
        f"- Made: {run.when:%Y-%m-%d %H:%M} UTC",
        *([f"- Reviewed: {datetime.fromisoformat(reviewed):%Y-%m-%d %H:%M} UTC"] if reviewed else []),
        f"- Since then: {staleness(dataset, key)!s}",
        f"- {pairs}",
        f"- Fields: {', '.join(run.fields) or 'none'}",
        f"- Cache: {size_text(run.cache_bytes)}",
    ]
    if "noise_rate" in found:
        lines.append(f"- {NoiseRate(*found['noise_rate'])}")
    options = config.settings.options()
    if not config.embeddings:
        options = {name: option for name, option in options.items() if name != "scale"}  # a model has its own
    settings = {option.label: getattr(config, name) for name, option in options.items()}
    diagnostics = {label: found.get(name) for name, label in _DIAGNOSTICS.items()}
    for title, values in (("Settings", settings), ("Diagnostics", diagnostics)):
        known = {label: value for label, value in values.items() if value not in (None, ())}
        if known:
            lines += ["", f"**{title}**", "", *(f"- {label}: {_plain(value)}" for label, value in known.items())]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
