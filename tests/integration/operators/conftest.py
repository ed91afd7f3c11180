"""What operators are asked for."""

import pytest
from operator_driver import operator

from fiftyone_ecif.demo import training


@pytest.fixture
def options(made):
    return {"target": "tag: val", "model": training.MODEL, "pretrained": made[1], "fit": True, "batch_size": 24}


@pytest.fixture
def audit_options(made):
    return {"model": training.MODEL, "pretrained": made[1], "batch_size": 24}


@pytest.fixture
def detect(dataset, audit_options):
    """``detect_misalignment`` on the training pairs, from Python."""
    return lambda **options: operator("detect_misalignment")(dataset.match_tags("train"), **(audit_options | options))
