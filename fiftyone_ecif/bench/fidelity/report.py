"""What the fidelity benchmark found, as Markdown tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from fiftyone_ecif.bench.tables import Row, table

matplotlib.use("Agg")

TITLES = {
    "loo": "Leave-one-out: predicted against retrained",
    "lds": "Linear datamodelling score on half-subsets",
    "edit": "Editing against retraining",
    "curves": "Removing harmful, valuable or random pairs, retrained",
    "superposition": "Do effects add up?",
    "sensitivity": "What scores depend on",
    "cached": "Stored gradients of a deep scope",
}


def markdown(result: Mapping[str, Any]) -> str:
    """All tables, under a heading each."""
    parts = []
    for name, title in TITLES.items():
        parts.append(f"### {title}\n\n{table(_summary(name, result[name]))}\n")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    return "\n".join(parts) + f"\nSeconds: {seconds}.\n"


def plot(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the plots and says where they are.

    Args:
        result: of :func:`fiftyone_ecif.bench.fidelity.experiments.run`.
        folder: where to; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"loo": _plot_loo, "lds": _plot_lds, "curves": _plot_curves}
    paths = []
    for name, draw in drawn.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        draw(axes, result[name])
        axes.set_title(TITLES[name])
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _plot_loo(axes: Any, rows: Sequence[Row]) -> None:
    kept = sorted((row for row in rows if "pearson_low" in row), key=lambda row: row["pearson"])
    _bars(axes, [f"{row['role']} + {row['solver']}" for row in kept], kept, "pearson", "pearson_low", "pearson_high")
    axes.set_xlabel("Pearson correlation with retraining (95 % bootstrap interval)")


def _plot_lds(axes: Any, rows: Sequence[Row]) -> None:
    kept = sorted(rows, key=lambda row: (row["scope"], row["mean"]))
    _bars(axes, [f"{row['scope']}: {row['method']}" for row in kept], kept, "mean", "ci_low", "ci_high")
    axes.set_xlabel("Spearman correlation with retraining (95 % bootstrap interval)")


def _bars(axes: Any, labels: Sequence[str], rows: Sequence[Row], value: str, low: str, high: str) -> None:
    values = np.array([row[value] for row in rows])
    errors = np.array([[row[value] - row[low], row[high] - row[value]] for row in rows]).T
    axes.barh(
        labels, values, xerr=np.maximum(errors, 0), color=["C1" if "hessian" in name else "C0" for name in labels]
    )
    axes.tick_params(axis="y", labelsize=7)


def _plot_curves(axes: Any, rows: Sequence[Row]) -> None:
    for kind in ("random", "harmful", "valuable"):
        fractions = sorted({row["fraction"] for row in rows})
        losses = [[r["test_loss"] for r in rows if (r["kind"], r["fraction"]) == (kind, f)] for f in fractions]
        means, spreads = [np.mean(each) for each in losses], [np.std(each) for each in losses]
        axes.errorbar([100 * f for f in fractions], means, yerr=spreads, label=f"{kind} removed", marker="o")
    axes.set_xlabel("pairs removed (%)")
    axes.set_ylabel("loss on held-out pairs (nats)")
    axes.legend()


def _summary(name: str, rows: Sequence[Row]) -> Sequence[Row]:
    """The curves over seeds; everything else as it is."""
    if name != "curves":
        return rows
    keys = list(dict.fromkeys((row["kind"], row["fraction"]) for row in rows))
    found = []
    for kind, fraction in keys:
        each = [row for row in rows if (row["kind"], row["fraction"]) == (kind, fraction)]
        summary = {"kind": kind, "fraction": fraction, "seeds": len(each)}
        for column in ("target_loss", "target_accuracy", "test_loss", "test_accuracy"):
            values = [row[column] for row in each]
            summary |= {column: float(np.mean(values)), f"{column}_sd": float(np.std(values))}
        found.append(summary)
    return found
