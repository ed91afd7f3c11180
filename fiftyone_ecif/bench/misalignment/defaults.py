"""What the default detector's numbers are chosen by: each is set to other values, the rest being as it is.

``python -m fiftyone_ecif.bench.misalignment.defaults DATA REGIME [SEEDS]``, such as ``digits scratch 1`` or ``FOLDER
pretrained``, prints a table: means over all kinds of mistakes, of 10 % and 40 % of the captions, and seeds.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
from sklearn.metrics import roc_auc_score

from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.bench.misalignment.experiments import (
    FROZEN,
    PRETRAINED,
    SCRATCH,
    Sizes,
    Trained,
    expected_calibration_error,
    spoil_and_train,
)
from fiftyone_ecif.bench.misalignment.pairs import load_pairs
from fiftyone_ecif.bench.tables import table
from fiftyone_ecif.misalignment import calibration, decoys, gathering, judgement, noise_rate
from fiftyone_ecif.misalignment.detection import run_detectors
from fiftyone_ecif.misalignment.detectors import Calibrated
from fiftyone_ecif.misalignment.evidence import Evidence

#: What is tried of numbers that judging depends on, and of those that gathering does.
JUDGING: dict[tuple[ModuleType, str], tuple[Any, ...]] = {
    (calibration, "RIDGE"): (0.001, 0.02),
    (judgement, "PRIOR"): (np.array([1.0, 0.0, 0.0]), np.full(3, 1 / 3)),
    (judgement, "SAID"): (0.0, 1.0),
    (noise_rate, "DOUBT"): (0.0, 10.0),
    (noise_rate, "TEMPER"): (1.0, 20.0),
}
GATHERING: dict[tuple[ModuleType, str], tuple[Any, ...]] = {
    (gathering, "RIDGE"): (2.0, 32.0),
    (gathering, "CANONICAL_SCALE"): (5.0, 20.0),
    (gathering, "FOLDS"): (2, 10),
    (decoys, "DRAWN"): ((8, 4, 16), (8, 16, 256)),
}
_RATIOS = 0.1, 0.4
_REGIMES = {"scratch": SCRATCH, "frozen": FROZEN, "pretrained": PRETRAINED}


def run(data: str, regime: str, seeds: int) -> list[dict[str, Any]]:
    """A row for each value: AUROC, calibration error and how often the interval holds the truth, in %."""
    pairs, sizes = load_pairs(data), Sizes(ratios=_RATIOS)
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for noise, ratio, seed in itertools.product(("random", *pairs.kinds), _RATIOS, range(seeds)):
        trained = spoil_and_train(pairs, noise, ratio, seed, sizes, _REGIMES[regime])
        for name, value, measured in _variants(trained):
            found[name, value].append(measured)
    return [
        {"number": name, "value": value, "auroc": auroc, "calibration_error": error, "covered": covered}
        for (name, value), rows in found.items()
        for auroc, error, covered in [100 * np.mean(rows, axis=0)]
    ]


def _variants(trained: Trained) -> Iterator[tuple[str, str, tuple[float, float, float]]]:
    """The name of a number, its value, and what is found with it; first all as they are."""
    usual = _gather(trained)
    yield "all", "as they are", _measure(usual, trained.wrong)
    for tried, gathers in ((JUDGING, False), (GATHERING, True)):
        for (module, name), values in tried.items():
            for value in values:
                with patch.object(module, name, value):
                    measured = _measure(_gather(trained) if gathers else usual, trained.wrong)
                yield f"{module.__name__.rsplit('.', 1)[1]}.{name}", str(value), measured


def _gather(trained: Trained) -> Evidence:
    evidence = follow(run_detectors(trained.loaded, [Calibrated.name]), progress=False).evidence
    assert evidence is not None
    return evidence


def _measure(evidence: Evidence, wrong: np.ndarray) -> tuple[float, float, float]:
    judged = judgement.judge(evidence)
    covered = judged.rate.low <= wrong.mean() <= judged.rate.high
    error = expected_calibration_error(judged.probability, wrong)
    return float(roc_auc_score(wrong, judged.score)), error, float(covered)


if __name__ == "__main__":
    print(table(run(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)))
