"""Claims of images and captions on each other, against all matchings of a few pairs and the definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from fiftyone_ecif.misalignment.matching import match


def odds(weights, captions, images):
    """Log odds of each edge."""
    return (weights + captions.known + images.known.T).numpy()


def every_matching(weights):
    """Log odds of each edge, by all permutations."""
    count = len(weights)
    orders = list(itertools.permutations(range(count)))
    chance = np.exp([sum(weights[row, order[row]] for row in range(count)) for order in orders])
    share = np.zeros((count, count))
    for order, each in zip(orders, chance, strict=True):
        share[range(count), order] += each
    share /= chance.sum()
    return np.log(share / (1 - share))


def test_odds_are_nearly_those_of_all_matchings():
    for seed in range(5):
        weights = 2 * torch.randn(7, 7, generator=torch.Generator().manual_seed(seed))
        found = odds(weights, *match(weights, torch.arange(7), torch.arange(7)))
        exact = every_matching(weights.numpy())
        alone = weights - torch.logsumexp(weights, 1, keepdim=True) - torch.logsumexp(weights, 0, keepdim=True)
        assert spearmanr(found.ravel(), exact.ravel()).statistic > 0.99
        assert np.abs(found - exact).mean() < 0.5 < 2.5 < np.abs(alone.numpy() - exact).mean()


def test_freedom_is_what_others_leave():
    weights = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    same_image, same_caption = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    captions, images = match(weights, same_image, same_caption)
    for image, caption in itertools.product(range(8), range(8)):
        others = [k for k in range(8) if same_caption[k] != same_caption[caption]]
        left = sum(math.exp(weights[image, k] + captions.known[image, k]) for k in others)
        assert images.known[caption, image] == pytest.approx(-math.log(left), abs=5e-3)  # nearly at a fixed point
        others = [j for j in range(8) if same_image[j] != same_image[image]]
        left = sum(math.exp(weights[j, caption] + images.known[caption, j]) for j in others)
        assert captions.known[image, caption] == pytest.approx(-math.log(left), abs=5e-3)
    left = [sum(math.exp(weights[j, k] + images.known[k, j]) for j in range(8)) for k in range(8)]
    np.testing.assert_allclose(captions.others, -np.log(left), atol=5e-3)


def test_one_that_was_not_matched_sees_what_all_others_leave():
    captions, _ = match(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), *[torch.arange(4)] * 2)
    asked = captions.asked_by(torch.tensor([2, -1]))
    torch.testing.assert_close(asked, torch.stack([captions.known[2], captions.others]))


def test_large_weights_are_no_trouble():
    captions, images = match(100 * torch.eye(50), torch.arange(50), torch.arange(50))
    assert torch.isfinite(captions.known).all()
    assert torch.isfinite(images.known).all()
