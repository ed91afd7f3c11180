"""What the misalignment benchmark found, as Markdown tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from fiftyone_ecif.bench.tables import Row, table
from fiftyone_ecif.misalignment.detectors import Calibrated

matplotlib.use("Agg")

_DRAWN = ("calibrated", "lemon_tuned", "lemon", "cross_fit", "loaded_neg_clip_loss", "loaded_clip_score")


def markdown(result: Mapping[str, Any]) -> str:
    """All tables, under a heading each."""
    parts = [
        f"## {result['data']}: {result['pairs']} pairs, {result['model']}",
        "### AUROC (%), mean ± sd over seeds",
        table(_by_cell(result["summary"], "auroc")),
        "### Ours against the best baseline: AUROC points, 95 % paired bootstrap",
        table(_differences(result["summary"])),
    ]
    for column, title in (("auprc", "AUPRC"), ("f1", "F1"), ("p_at_10", "P@10"), ("p_at_100", "P@100")):
        parts += [f"### {title} (%)", table(_by_cell(result["summary"], column))]
    parts += ["### Share of the wrong ones among the most suspicious (%)", table(_recalls(result["rows"]))]
    parts += [
        "### Estimated noise rate, its interval, how often that is narrow enough to be told and covers the truth, and "
        "the mean calibration error of the probability (%)",
        table(_mean(result["noise_rates"], ("noise", "ratio"), _RATES)),
        "### The share that would be estimated if the scores of the wrong pairs were known in place of decoys' (%)",
        table(_mean([row for row in result["noise_rates"] if row["ratio"]], ("noise", "ratio"), _KNOWN)),
        "### What runs say of themselves: AUROC (%) on decoys; how often the weights were found to know the pairs; and "
        "the AUROC of counting duplicate captions",
        table(_mean(result["noise_rates"], ("noise", "ratio"), _SELF_REPORT)),
        "### How many are wrong (%) where so much is said",
        table(_reliability(result["reliability"])),
        "### Review: AUROC (%) on the pairs that were not reviewed, and on all, and the error of the noise rate",
        table(_mean(result["review"], ("noise", "ratio", "labels"), _REVIEW)),
        "### Recall@5 (%) on clean pairs after dropping the most suspicious and training the heads again",
        table(_mean(result["downstream"], ("noise", "by", "dropped"), ("recall_at_5",))),
    ]
    if result["ablation"]:
        parts += [
            "### The default without parts of it: AUROC (%)",
            table(_mean(result["ablation"], ("what", "value"), ("auroc",))),
        ]
    return "\n\n".join(parts) + f"\n\nSeconds: {result['seconds']:.0f}.\n"


def plot(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the plots and says where they are.

    Args:
        result: of :func:`fiftyone_ecif.bench.misalignment.experiments.run`.
        folder: where to; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noises = list(dict.fromkeys(row["noise"] for row in result["summary"]))
    paths = []
    drawn = (
        ("auroc", "share of wrong captions (%)", "AUROC (%)", _draw_auroc),
        ("review", "reviewed pairs", "AUROC of the whole list (%)", _draw_review),
        ("downstream", "pairs dropped (%)", "recall@5 on clean pairs (%)", _draw_downstream),
    )
    for name, across, up, draw in drawn:
        figure, panels = plt.subplots(
            1, len(noises), figsize=(3.6 * len(noises), 3.4), layout="constrained", squeeze=False
        )
        for axes, noise in zip(panels[0], noises, strict=True):
            draw(axes, result, noise)
            axes.set_title(f"{result['data']}, {noise} noise", fontsize=9)
            axes.set_xlabel(across)
            axes.set_ylabel(up)
        panels[0][-1].legend(fontsize=7)
        paths.append(folder / f"{result['data']}-{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _draw_auroc(axes: Any, result: Mapping[str, Any], noise: str) -> None:
    for detector in _DRAWN:
        rows = [row for row in result["summary"] if (row["noise"], row["detector"]) == (noise, detector)]
        rows.sort(key=lambda row: row["ratio"])
        across = [100 * row["ratio"] for row in rows]
        up, spread = [100 * row["auroc"] for row in rows], [100 * row["auroc_sd"] for row in rows]
        axes.errorbar(across, up, yerr=spread, marker="o", markersize=3, label=detector)


_RATES = ("wrong", "rate", "low", "high", "told", "covered", "calibration_error")
_KNOWN = ("wrong", "known_rate", "known_low", "known_high")
_SELF_REPORT = ("power_random", "power_similar", "power_subtle", "seen", "duplicate_count_auroc")
_REVIEW = ("auroc", "auroc_without", "auroc_all", "auroc_all_without", "rate_error", "rate_error_without")


def _draw_review(axes: Any, result: Mapping[str, Any], noise: str) -> None:
    rows = _mean(result["review"], ("noise", "ratio", "labels"), ("auroc_all", "auroc_all_without"))
    for ratio in sorted({row["ratio"] for row in rows}):
        kept = [row for row in rows if (row["noise"], row["ratio"]) == (noise, ratio)]
        (line,) = axes.plot(
            [row["labels"] for row in kept],
            [row["auroc_all"] for row in kept],
            marker="o",
            markersize=3,
            label=f"{ratio:.0%}",
        )
        without = [row["auroc_all_without"] for row in kept]
        axes.plot([row["labels"] for row in kept], without, "--", color=line.get_color())


def _draw_downstream(axes: Any, result: Mapping[str, Any], noise: str) -> None:
    rows = _mean(result["downstream"], ("noise", "by", "dropped"), ("recall_at_5",))
    for by in dict.fromkeys(row["by"] for row in rows):
        kept = [row for row in rows if (row["noise"], row["by"]) == (noise, by)]
        axes.plot(
            [100 * row["dropped"] for row in kept],
            [row["recall_at_5"] for row in kept],
            marker="o",
            markersize=3,
            label=by,
        )


def _by_cell(summary: Sequence[Row], column: str) -> list[dict[str, Any]]:
    """A row for each detector, the best on average first, and a column for each noise and ratio."""
    cells = list(dict.fromkeys((row["noise"], row["ratio"]) for row in summary))
    found = {}
    for detector in dict.fromkeys(row["detector"] for row in summary):
        values = {(row["noise"], row["ratio"]): row for row in summary if row["detector"] == detector}
        texts = {
            f"{noise} {ratio:.0%}": " ± ".join(
                f"{100 * values[noise, ratio][name]:.1f}" for name in (column, f"{column}_sd")
            )
            for noise, ratio in cells
        }
        found[detector] = (np.mean([row[column] for row in values.values()]), {"detector": detector, **texts})
    return [row for _, row in sorted(found.values(), key=lambda pair: -pair[0])]


def _differences(summary: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            "noise": row["noise"],
            "ratio": f"{row['ratio']:.0%}",
            "detector": row["detector"],
            "best baseline": row["best_baseline"],
            "difference": f"{100 * row['difference']:+.1f}",
            "from": f"{100 * row['difference_low']:+.1f}",
            "to": f"{100 * row['difference_high']:+.1f}",
        }
        for row in summary
        if row["detector"] == Calibrated.name
    ]


def _recalls(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of the default and of two baselines, by review budget."""
    found = []
    for noise, ratio in dict.fromkeys((row["noise"], row["ratio"]) for row in rows):
        for detector in (Calibrated.name, "lemon_z", "loaded_clip_score"):
            kept = [
                row["recall_at_budget"]
                for row in rows
                if (row["noise"], row["ratio"], row["detector"]) == (noise, ratio, detector)
            ]
            shares = {f"top {float(b):.0%}": f"{100 * np.mean([each[b] for each in kept]):.1f}" for b in kept[0]}
            found.append({"noise": noise, "ratio": f"{ratio:.0%}", "detector": detector, **shares})
    return found


def _reliability(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All cells together, a row for each tenth."""
    found = []
    for start in sorted({row["from"] for row in rows}):
        kept = [row for row in rows if row["from"] == start]
        pairs = sum(row["pairs"] for row in kept)
        means = {name: sum(row[name] * row["pairs"] for row in kept) / pairs for name in ("said", "wrong")}
        found.append({"pairs": pairs, **{name: round(100 * mean, 1) for name, mean in means.items()}})
    return found


def _mean(rows: Sequence[Row], keys: Iterable[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Percentages averaged over seeds."""
    keys = tuple(keys)
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        each = [row for row in rows if tuple(row[name] for name in keys) == key]
        means = {column: round(100 * float(np.mean([row[column] for row in each])), 1) for column in columns}
        found.append({**dict(zip(keys, key, strict=True)), **means})
    return found
