"""The sweep over open_clip's models and its table."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fiftyone_ecif.bench.models.sweep import examine, lacking, model_names
from fiftyone_ecif.bench.tables import table

_ALL = "Influence of five pairs in each of the scopes `heads`, `heads+logit_scale`, `blocks:1` and `lora:2:1`"


def run(
    names: Sequence[str], log: Callable[[str], None], keep: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Examines models one after the other.

    Args:
        names: of open_clip's models; all if there are none.
        log: told which model it is at.
        keep: given what is found so far.

    Returns:
        ``{"open_clip": version, "models": {name: what is found}}``; ``error`` of a model that failed, ``lacks`` of
        one that needs what is not installed
    """
    import open_clip

    found: dict[str, Any] = {"open_clip": open_clip.__version__, "models": {}}
    logging.disable(logging.WARNING)  # open_clip warns of each model without weights
    with tempfile.TemporaryDirectory(prefix="ecif-models-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names or model_names():
            log(name)
            if lack := lacking(name):
                found["models"][name] = {"lacks": lack}
            else:
                found["models"][name] = _examined(name, Path(folder))
            keep(found)
    logging.disable(logging.NOTSET)
    return found


def _examined(name: str, folder: Path) -> dict[str, Any]:
    try:
        return examine(name, folder)
    except Exception as error:  # to go on with the next model; the table says so
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def markdown(found: dict[str, Any]) -> str:
    """The table, a row for each model."""
    models = found["models"]
    done = {name: one for name, one in models.items() if "worst" in one}
    rows = [_row(name, one) for name, one in models.items()]
    worst = max((one["worst"] for one in done.values()), default=0.0)
    edit = max((abs(one["edit"]) for one in done.values()), default=0.0)
    return "\n".join(
        [
            "# Models of open_clip",
            "",
            "```shell",
            "fiftyone-ecif bench models --out models   # report.md there is this page",
            "```",
            "",
            f"All {len(models)} configurations of open_clip {found['open_clip']}, shrunken (the same layers in the "
            "same order, narrower and fewer) and with random weights, on noise and random words, on the CPU. "
            f"{len(done)} went through all of it:",
            "",
            f"* {_ALL} against gradients through the whole of open_clip's model: {worst:.0e} off at most, relative to "
            "the largest. Features are kept in float32, which is most of that.",
            "* `fit` by Newton steps: the relative gradient norm that it ended at, with the least `proximal` of 1, 10 "
            "and 100 with which it found a minimum: noise is also told apart by an embedding that shrinks to nothing.",
            f"* An edited checkpoint, loaded by plain open_clip: the loss that was reported is {edit:.0e} off at most.",
            "* Detection: detectors with finite scores for all pairs, without a fit.",
            "",
            "`+` marks a head to which the tower adds something, which is kept as an offset; `identity` one that was "
            "appended as the tower ends in no linear map: an edit of such a run is refused, and `blocks:1` was edited.",
            "",
            table(rows),
        ]
    )


def _row(name: str, one: dict[str, Any]) -> dict[str, Any]:
    if "worst" not in one:
        return {"model": f"`{name}`", "image head": one.get("error") or f"needs {one['lacks']}"}
    heads = [
        f"`{weight.removesuffix('.weight')}`{' +' * offset}" if weight else "identity"
        for weight, offset in zip(one["heads"], one["offset"], strict=True)
    ]
    return {
        "model": f"`{name}`",
        "image head": heads[0],
        "text head": heads[1],
        "last image block": f"`{one['block'][0]}`",
        "last text block": f"`{one['block'][1]}`",
        "worst error": f"{one['worst']:.0e}",
        "fit": f"{one['fit']:.0e}",
        "proximal": f"{one['proximal']:g}",
        "edit": f"{abs(one['edit']):.0e}",
        "detectors": one["detectors"],
    }
