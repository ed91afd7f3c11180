"""The stand-in for a pretrained model knows the classes that its heads were made of."""

import pytest
import torch
from torch.nn.functional import normalize

from fiftyone_ecif.bench.misalignment import pretrained

CLASSES, WIDTH, WORDS = 1000, 60, 40


@pytest.fixture
def world(monkeypatch):
    """A classifier whose classes lie where their names do, turned; images and captions of each class."""
    generator = torch.Generator().manual_seed(0)
    names = torch.randn(CLASSES, WORDS, generator=generator)
    turn = torch.randn(WORDS, WIDTH, generator=generator) / WORDS**0.5
    weights = normalize(names, dim=1) @ turn + 0.01 * torch.randn(CLASSES, WIDTH, generator=generator)
    monkeypatch.setattr(pretrained, "class_weights", lambda: weights)
    monkeypatch.setattr(pretrained, "frozen_features", lambda paths, captions: (torch.zeros(CLASSES, WIDTH), names))
    images = weights + 0.05 * torch.randn(CLASSES, WIDTH, generator=generator)
    return images, names


def made(world, seed=0):
    scope, features = pretrained.pretrained_heads(*world, torch.arange(CLASSES), "any.png", seed)
    embedded = scope.embed(scope.start, [side.double() for side in features])
    return embedded, normalize(embedded[0], dim=1) @ normalize(embedded[1], dim=1).T


def test_it_finds_the_caption_of_an_image_also_of_classes_that_it_was_not_made_of(world):
    _, similarity = made(world)
    rank = (similarity > similarity.diagonal()[:, None]).sum(1).double()
    for half in (rank[:500], rank[500:]):
        assert half.median() < 50


def test_embeddings_have_a_median_length_of_one_and_the_seed_fixes_the_half(world):
    (images, texts), similarity = made(world)
    assert images.norm(dim=1).median().item() == pytest.approx(1, abs=0.05)
    assert texts.norm(dim=1).median().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(made(world)[1], similarity)
    assert not torch.allclose(made(world, seed=1)[1], similarity)
