"""What is detected on a GPU is what is detected on the CPU."""

import numpy as np
import pytest
import torch

from fiftyone_ecif.devices import ON_CPU, Placement
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.gathering import gather_evidence
from fiftyone_ecif.misalignment.judgement import judge
from fiftyone_ecif.progress import result_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
PAIRS, WIDTH = 400, 24


def score(placement):
    draw = torch.Generator().manual_seed(0)
    shown = torch.randn(PAIRS, 12, generator=draw)
    images, texts = (
        torch.cat([shown, torch.zeros(PAIRS, WIDTH - 12)], dim=1) + 0.4 * torch.randn(PAIRS, WIDTH, generator=draw)
        for _ in range(2)
    )
    texts[:60] = texts[:60].roll(1, 0)
    head = torch.eye(WIDTH)
    scope = HeadScope(head, head.clone(), 10.0, placement=placement)
    sides = [side.to(placement.device) for side in (images, texts)]
    batches = FeatureBatches(*sides, random_partition(PAIRS, 64, 0), placement)
    objective = ContrastiveLoss(scope, batches, PAIRS, 0.1)
    duplicates = find_duplicates(sides[0], [str(number) for number in range(PAIRS)], placement.device)
    inputs = DetectorInputs(objective, scope.start, duplicates, device=placement.device)
    return judge(result_of(gather_evidence(inputs))).score


def test_the_same_pairs_are_suspicious():
    found, expected = score(Placement("cuda")), score(ON_CPU)
    assert np.corrcoef(found, expected)[0, 1] > 0.999
    assert np.argsort(-expected)[:40].max() < 60
