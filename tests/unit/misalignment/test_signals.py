"""Signals, pair by pair from their definition."""

import math

import numpy as np
import pytest
import torch

from fiftyone_ecif.misalignment.evidence import SIGNALS
from fiftyone_ecif.misalignment.matching import match
from fiftyone_ecif.misalignment.signals import PairSpace, Surroundings, feature_agreement, without

PAIRS, NEAR, SCALE = 30, 6, 8.0
IMAGE = torch.tensor([*range(PAIRS), 2, 5, 9])
CAPTION = torch.tensor([*range(PAIRS), 7, 3, 11])  # of the last three another pair's


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def world():
    generator = np.random.default_rng(0)
    u = unit(generator.normal(size=(PAIRS, 4)))
    v = unit(u + 0.6 * generator.normal(size=(PAIRS, 4)))
    same_image, same_caption = np.arange(PAIRS), np.arange(PAIRS)
    same_image[4] = 3
    same_caption[8] = 7
    near = [[sorted((m for m in range(PAIRS) if m != n), key=lambda m: -side[n] @ side[m])[:NEAR] for n in range(PAIRS)]
            for side in (u, v)]  # fmt: skip
    references = generator.permutation(PAIRS)[:20]
    around = Surroundings(*map(torch.tensor, near), *map(torch.from_numpy, (references, same_image, same_caption)))
    images, captions = (torch.from_numpy(side).float() for side in (u, v))
    found = PairSpace(images, captions, SCALE, around).measure(IMAGE, CAPTION)
    return u, v, near, references, same_image, same_caption, around, found


def rivals(world, a, b):
    """Captions that compete for image a, and images that compete for caption b."""
    _, _, _, references, same_image, same_caption, _, _ = world
    other_caption = same_caption[references] != same_caption[b]
    other_image = same_image[references] != same_image[a]
    for_image = references[other_caption & (other_image | (references == a))]
    for_caption = references[other_image & (other_caption | (references == b))]
    return for_image, for_caption


def column(world, name):
    return world[-1][:, SIGNALS.index(name)]


def test_distance(world):
    u, v = world[:2]
    expected = [1 - u[a] @ v[b] for a, b in zip(IMAGE, CAPTION, strict=True)]
    np.testing.assert_allclose(column(world, "distance"), expected, atol=1e-6)


def test_competition_and_margin(world):
    u, v = world[:2]
    for row, (a, b) in enumerate(zip(IMAGE.tolist(), CAPTION.tolist(), strict=True)):
        for_image, for_caption = rivals(world, a, b)
        to_captions, to_images = [u[a] @ v[r] for r in for_image], [u[r] @ v[b] for r in for_caption]
        ease = sum(math.log(sum(math.exp(SCALE * s) for s in each)) for each in (to_captions, to_images)) / 2
        assert column(world, "competition")[row] == pytest.approx(ease - SCALE * u[a] @ v[b], abs=1e-4)
        best = np.mean([np.mean(sorted(each)[-3:]) for each in (to_captions, to_images)])
        assert column(world, "margin")[row] == pytest.approx(best - u[a] @ v[b], abs=1e-5)


def test_matching_is_what_others_claim_and_are_free_for(world):
    u, v, _, references, same_image, same_caption, around, _ = world
    space = PairSpace(*(torch.from_numpy(side).float() for side in (u, v)), SCALE, around)
    found = space.matching(IMAGE, CAPTION)
    weights = torch.from_numpy(SCALE * u[references] @ v[references].T).float()
    captions, images = match(weights, *(torch.from_numpy(side[references]) for side in (same_image, same_caption)))
    place = {row: number for number, row in enumerate(references)}
    for row, (a, b) in enumerate(zip(IMAGE.tolist(), CAPTION.tolist(), strict=True)):
        for_image, for_caption = rivals(world, a, b)
        free = captions.known[place[a]] if a in place else captions.others
        to_captions = sum(math.exp(SCALE * u[a] @ v[r] + free[place[r]]) for r in for_image)
        free = images.known[place[b]] if b in place else images.others
        to_images = sum(math.exp(SCALE * u[r] @ v[b] + free[place[r]]) for r in for_caption)
        expected = math.log(to_captions) + math.log(to_images) - SCALE * u[a] @ v[b]
        assert found[row] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("side", ["image", "caption"])
def test_agreement_with_neighbours_that_can_be_trusted(world, side):
    u, v, near = world[:3]
    own, far, rows = (u, v, near[0]) if side == "image" else (v, u, near[1])
    for row, (a, b) in enumerate(zip(IMAGE.tolist(), CAPTION.tolist(), strict=True)):
        at, other = (a, b) if side == "image" else (b, a)
        others = [m for m in rows[at] if m != other]
        others = others[: NEAR - 1]
        weight = [max(own[at] @ own[m], 0) * math.exp(-5 * (1 - u[m] @ v[m])) for m in others]
        expected = sum(w * (1 - far[other] @ far[m]) for w, m in zip(weight, others, strict=True)) / sum(weight)
        assert column(world, f"{side}_agreement")[row] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["image", "caption"])
def test_influence_is_how_a_step_for_the_pair_goes_with_the_steps_of_its_neighbours(world, side):
    """A step is minus the gradient of the pair's own loss by its embedding, by automatic differentiation."""
    u, v, near, references = world[:4]

    def step(at, other, others):
        point = torch.tensor((u if side == "image" else v)[at], requires_grad=True)
        far = torch.tensor(v if side == "image" else u)
        loss = torch.logsumexp(SCALE * far[others] @ point, 0) - SCALE * far[other] @ point
        return unit(-torch.autograd.grad(loss, point)[0].numpy())

    steps = [step(m, m, [r for r in references if r != m]) for m in range(PAIRS)]
    for row, (a, b) in enumerate(zip(IMAGE.tolist(), CAPTION.tolist(), strict=True)):
        at, other = (a, b) if side == "image" else (b, a)
        own = step(at, other, rivals(world, a, b)[side == "caption"])
        others = [m for m in near[side == "caption"][at] if m != other][: NEAR - 1]
        agree = [math.exp(-5 * (1 - u[m] @ v[m])) * (own @ steps[m]) for m in others]
        assert column(world, f"{side}_influence")[row] == pytest.approx(-np.mean(agree), abs=1e-4)


def test_agreement_of_features(world):
    u, v, near, *_, around, _ = world
    images, texts = torch.from_numpy(u), torch.from_numpy(v)
    found = feature_agreement(images, texts, around, IMAGE, CAPTION)
    for row, (a, b) in enumerate(zip(IMAGE.tolist(), CAPTION.tolist(), strict=True)):
        by_image = [m for m in near[0][a] if m != b][: NEAR - 1]
        by_caption = [m for m in near[1][b] if m != a][: NEAR - 1]
        expected = np.mean([1 - v[b] @ v[m] for m in by_image]), np.mean([1 - u[a] @ u[m] for m in by_caption])
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_a_neighbour_is_left_out_or_else_the_last():
    near = torch.tensor([[1, 2, 3], [1, 2, 3]])
    assert without(near, torch.tensor([2, 9])).tolist() == [[1, 3], [1, 2]]
    assert without(near[:, :1], torch.tensor([1, 9])).tolist() == [[1], [1]]
