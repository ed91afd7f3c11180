"""Which pairs share an image or a caption."""

import tracemalloc

import numpy as np
import pytest
import torch

from fiftyone_ecif.misalignment.duplicates import Duplicates, find_duplicates


def draw(count, width=20, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def sets(groups):
    """Group numbers as the sets of rows that share one, without singles."""
    found = {int(number): frozenset(np.flatnonzero(groups == number).tolist()) for number in groups}
    return {rows for rows in found.values() if len(rows) > 1}


def captions_that_are_shared(*captions):
    return sets(find_duplicates(draw(len(captions)), captions).caption)


def image_sets(images):
    return sets(find_duplicates(images, [f"caption {n}" for n in range(len(images))]).image)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A red Seven", "a RED seven"),
        ("a red seven", "  a red,\tseven!\n"),
        ("snow_man", "snow-man"),
        ("ﬁsh №1", "fish No1"),  # compatibility forms
        ("caf\u00e9", "cafe\u0301"),  # composed and not
        ("STRASSE", "straße"),
        ("全角", "全角。"),
        ("\uff21\uff22\uff23", "abc"),
    ],
)
def test_captions_that_differ_in_case_spacing_and_punctuation_are_one(one, other):
    assert captions_that_are_shared(one, "something else", other) == {frozenset({0, 2})}


@pytest.mark.parametrize(
    ("one", "other"), [("!", "?"), ("🐶", "🐱"), ("...", "🐶"), ("café", "cafe"), ("a 1", "a 11"), ("ab", "a b")]
)
def test_captions_that_differ_otherwise_stay_apart(one, other):
    assert captions_that_are_shared(one, other, "something else") == set()


def test_captions_without_a_word_are_compared_as_they_are():
    assert captions_that_are_shared("🐶", "!?", "🐶", "!?", "!") == {frozenset({0, 2}), frozenset({1, 3})}


def test_one_endless_caption_costs_no_more_than_itself():
    """Not its length for each caption, as in an array of text of fixed width."""
    words = ["x" * 50_000, *(f"caption {n}" for n in range(2000))]
    images = torch.eye(3)[torch.arange(len(words)) % 3]
    tracemalloc.start()
    groups = find_duplicates(images, words).caption
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(groups)) == len(words)
    assert peak < 50e6


def test_the_same_image_and_nearly_the_same():
    images = draw(12)
    images[4] = images[1]
    images[7] = images[2] + 1e-3 * draw(1, seed=1)[0]
    images[9] = images[3] + 0.3 * draw(1, seed=2)[0]  # alike, no more
    assert image_sets(images) == {frozenset({1, 4}), frozenset({2, 7})}


def test_what_all_images_have_in_common_makes_none_alike():
    images = draw(12) + 1000
    images[4] = images[1]
    assert image_sets(images) == {frozenset({1, 4})}


def test_a_chain_of_near_images_is_one_group():
    images = draw(40)
    step = images[1] / images[1].norm() * images[0].norm() * 0.03
    for number, row in enumerate((5, 6, 7, 8), start=1):
        images[row] = images[0] + number * step
    centred = torch.nn.functional.normalize(images - images.mean(0), dim=1)
    assert centred[0] @ centred[8] < 0.999 < centred[0] @ centred[5]  # the ends alone would stay apart
    assert image_sets(images) == {frozenset({0, 5, 6, 7, 8})}


def test_many_copies_do_not_hide_a_near_image():
    images = draw(60)
    images[:30] = images[0]
    images[50] = images[0] + 1e-3 * images[1].norm() * torch.eye(20)[0]
    assert image_sets(images) == {frozenset({*range(30), 50})}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_there_is_but_one_image(count):
    found = find_duplicates(torch.ones(count, 4), [f"caption {n}" for n in range(count)])
    assert found.image.tolist() == [0] * count
    assert found.kinds() == (["image"] * count if count > 1 else [None])


def test_two_images_are_not_one():
    assert image_sets(draw(2)) == set()


def test_kinds_and_their_counts():
    image = np.array([0, 0, 1, 1, 2, 2, 2, 3, 4, 5])
    caption = np.array([0, 0, 1, 2, 3, 3, 4, 5, 5, 6])
    found = Duplicates(image, caption)
    assert found.kinds() == ["pair", "pair", "image", "image", "image", "image", "image", None, None, None]
    # by the words of the docstring, pair by pair
    expected = []
    for n in range(10):
        others = [m for m in range(10) if m != n and image[m] == image[n]]
        if any(caption[m] != caption[n] for m in others):
            expected.append("image")
        else:
            expected.append("pair" if others else None)
    assert found.kinds() == expected
    assert found.summary() == {"pair": 2, "image": 5, "caption": 6}
    assert sets(found.pair) == {frozenset({0, 1}), frozenset({4, 5})}
