"""Writes the tables of docs/results that list what can be chosen. Run: python tools/make_tables.py"""

from pathlib import Path

from fiftyone_ecif.bench.tables import table
from fiftyone_ecif.influence.solvers import SOLVERS
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES
from fiftyone_ecif.misalignment.detectors import DETECTORS
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
MADE = "```shell\npython tools/make_tables.py   # writes this page\n```"


def pages():
    """The text of each page, by its file's name."""
    detectors = [{"name": f"`{one.name}`", "says": one.says, **_needs(one)} for one in DETECTORS.values()]
    solvers = [{"name": f"`{one.name}`", "says": one.says} for one in SOLVERS.values()]
    losses = [{"name": f"`{one.name}`", "says": one.says, **_unit(one)} for one in TARGET_LOSSES.values()]
    options = {
        "`compute_influence`": _options(InfluenceSettings),
        "`compute_misalignment`": _options(MisalignmentSettings),
        "How a job runs": _options(JobSettings),
    }
    return {
        "detectors.md": _page(
            "Detectors of misaligned pairs",
            "`detector=` of `compute_misalignment`. A pair is suspicious when:",
            table(detectors),
        ),
        "solvers.md": _page(
            "Solvers", "`solver=` of `compute_influence`: what stands for the curvature.", table(solvers)
        ),
        "target_losses.md": _page(
            "Target losses", "`target_loss=` of `compute_influence`: what is measured on the target.", table(losses)
        ),
        "options.md": _page(
            "Options",
            "Those of both functions, and at the end those that numbers do not depend on.",
            "\n\n".join(f"## {title}\n\n{table(rows)}" for title, rows in options.items()),
        ),
    }


def _needs(detector):
    needs = ["a model trained on the pairs"] * detector.needs_training + ["a target"] * detector.needs_target
    return {"needs": ", ".join(needs) or None, "source": detector.source or None}


def _unit(loss):
    return {
        "unit": loss.unit,
        "needs": "`label_field`, the classes of the target's pairs" if loss.needs_labels else None,
    }


def _options(settings):
    return [
        {"option": f"`{name}`", "default": f"`{default!r}`", "what": settings.options()[name].help}
        for name, default in settings.defaults().items()
    ]


def _page(title, about, tables):
    return f"# {title}\n\n{MADE}\n\n{about}\n\n{tables}\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
