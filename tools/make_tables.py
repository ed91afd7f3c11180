"""Writes the tables of docs/results that list what can be chosen by name. Run: python tools/make_tables.py"""

from pathlib import Path

from fiftyone_ecif.bench.tables import table
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES
from fiftyone_ecif.misalignment.detectors import DETECTORS

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
MADE = "```shell\npython tools/make_tables.py   # writes this page\n```"
LABELS = "`label_field`, the classes of the target's pairs"


def pages() -> dict[str, str]:
    """The text of each page, by its file's name."""
    return {
        "detectors.md": _page(
            "Detectors of misaligned pairs",
            "`detector=` of `compute_misalignment`. A pair is suspicious when:",
            [
                {"name": f"`{name}`", "says": one.says, "needs": _needs(one), "source": one.source or None}
                for name, one in DETECTORS.items()
            ],
        ),
        "solvers.md": _page(
            "Solvers",
            "`solver=` of `compute_influence`: what stands for the curvature.",
            [{"name": f"`{name}`", "says": one.says} for name, one in SOLVERS.items()],
        ),
        "target_losses.md": _page(
            "Target losses",
            "`target_loss=` of `compute_influence`: what is measured on the target.",
            [
                {"name": f"`{name}`", "says": one.says, "unit": one.unit, "needs": LABELS if one.needs_labels else None}
                for name, one in TARGET_LOSSES.items()
            ],
        ),
    }


def _needs(detector):
    needs = ["a model trained on the pairs"] * detector.needs_training + ["a target"] * detector.needs_target
    return ", ".join(needs) or None


def _page(title, about, rows):
    return f"# {title}\n\n{MADE}\n\n{about}\n\n{table(rows)}\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
