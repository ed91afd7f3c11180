"""Decoys are wrong, of one fold, and as like the right caption as their kind says."""

import numpy as np
import pytest
import torch

from fiftyone_ecif.misalignment.decoys import draw_decoys
from fiftyone_ecif.misalignment.evidence import KINDS

PAIRS = 400


@pytest.fixture(scope="module")
def made():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(PAIRS, 8, generator=generator)
    fold = torch.arange(PAIRS) % 5
    same = torch.arange(PAIRS)
    same[10:20] = 10
    usable = torch.arange(PAIRS)
    return texts, fold, same, usable, draw_decoys(texts, fold, same, usable, seed=1)


def test_each_is_of_two_pairs_of_one_fold_with_different_captions(made):
    _, fold, same, _, decoys = made
    assert (fold[decoys.image] == fold[decoys.caption]).all()
    assert (same[decoys.image] != same[decoys.caption]).all()


def test_every_image_has_a_random_and_a_similar_one_and_half_a_subtle_one(made):
    counts = np.bincount(made[4].kind)
    assert counts[0] == counts[1] == PAIRS
    assert 0 <= counts[2] - PAIRS // 2 <= 2  # with those in the middle


def test_they_are_the_more_alike_the_subtler(made):
    texts, _, _, _, decoys = made
    alike = torch.cosine_similarity(texts[decoys.image], texts[decoys.caption]).numpy()
    means = [alike[decoys.kind == kind].mean() for kind in range(len(KINDS))]
    assert abs(means[0]) < 0.1
    assert means[0] + 0.3 < means[1] < means[2] - 0.1


def test_only_usable_rows_are_drawn(made):
    texts, fold, same, _, _ = made
    usable = torch.arange(100, 200)
    decoys = draw_decoys(texts, fold, same, usable, seed=1)
    for rows in (decoys.image, decoys.caption):
        assert set(rows.tolist()) <= set(range(100, 200))


def test_the_seed_fixes_them(made):
    texts, fold, same, usable, decoys = made
    again = draw_decoys(texts, fold, same, usable, seed=1)
    other = draw_decoys(texts, fold, same, usable, seed=2)
    assert torch.equal(again.caption, decoys.caption)
    assert len(other.caption) != len(decoys.caption) or not torch.equal(other.caption, decoys.caption)


def test_two_pairs_are_enough():
    decoys = draw_decoys(torch.eye(2), torch.zeros(2), torch.arange(2), torch.arange(2))
    assert set(decoys.kind) == set(range(len(KINDS)))
    assert (decoys.image != decoys.caption).all()
