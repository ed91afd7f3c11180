"""Of what kinds the wrong pairs are, where it is known."""

import numpy as np
import pytest

from fiftyone_ecif.misalignment.mistakes import KindsOfMistakes

PLACES = np.array([[3.0, 0.0], [0.0, 3.0], [1.5, 1.5]])


def around(kind, seed):
    return PLACES[kind] + np.random.default_rng(seed).normal(size=(len(kind), 2))


@pytest.mark.parametrize("truth", [(1.0, 0.0, 0.0), (0.2, 0.5, 0.3), (0.0, 0.3, 0.7)])
def test_shares_are_those_of_the_wrong_pairs(truth):
    decoys = np.repeat([0, 1, 2], [2000, 1000, 500])
    kinds = KindsOfMistakes(around(decoys, 0), decoys)
    wrong = np.repeat([0, 1, 2], [round(3000 * share) for share in truth])
    signals = np.concatenate([around(wrong, 1), np.random.default_rng(2).normal(size=(9000, 2))])
    probability = np.repeat([1.0, 0.0], [len(wrong), 9000])
    np.testing.assert_allclose(kinds.shares(signals, probability), truth, atol=0.08)
