"""The demo set: every caption true or spoiled as recorded, splits apart."""

import collections
import re

import numpy as np
import pytest

from fiftyone_ecif.demo import scenes
from fiftyone_ecif.errors import EcifError


def words(caption):
    return re.fullmatch(r"a (\w+) (\w+) (left of|right of|above|below) a (\w+) (\w+)", caption).groups()


def test_spoils_are_what_they_are_called():
    pairs = scenes.make_pairs(300, noise=0.3, seed=1)
    count = collections.Counter(pair.spoiled for pair in pairs if pair.split == "train")
    assert [count[kind] for kind in scenes.SPOILS] == [30, 30, 30]
    truths = {pair.true_caption for pair in pairs}
    for pair in pairs:
        wrong = [a != b for a, b in zip(words(pair.caption), words(pair.true_caption), strict=True)]
        if pair.spoiled is None:
            assert not any(wrong)
        elif pair.spoiled == "relation":
            assert wrong == [False, False, True, False, False]
        elif pair.spoiled == "attribute":
            assert sum(wrong) == 1
            assert not wrong[2]
        else:
            assert any(wrong)
            assert pair.caption in truths
    assert len({pair.caption for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("way", ["relation", "attribute"])
def test_a_near_miss_is_never_true(way):
    """Twins are the trap: "a red three right of a red three" describes the same picture as "left of"."""
    for second in ((3, "red"), (3, "blue"), (5, "red")):
        scene = scenes.Scene((3, "red"), "left of", second)
        near = scenes._near_misses(scene, way)
        assert near
        assert not {scene, scene.mirrored} & set(near)


def test_splits_share_no_description():
    pairs = scenes.make_pairs(400, noise=0, seed=0)
    seen = {"train": set(), "val": set()}
    for pair in pairs:
        a, b, relation, c, d = words(pair.true_caption)
        seen[pair.split] |= {(a, b, relation, c, d), (c, d, scenes.RELATIONS[relation][0], a, b)}
    assert not seen["train"] & seen["val"]
    assert sum(pair.split == "val" for pair in pairs) == 100


def test_splits_share_no_scan():
    scans = scenes._split_scans(np.random.default_rng(0))
    keys = {split: {scan.tobytes() for d in range(10) for scan in scans[split][d]} for split in scans}
    assert all(len(scans[split][d]) > 10 for split in scans for d in range(10))
    assert not keys["train"] & keys["val"]


def test_the_picture_shows_the_caption():
    for pair in scenes.make_pairs(60, noise=0, seed=2):
        colour, _, relation, other, _ = words(pair.true_caption)
        assert (pair.image.max(2) > 90).sum() > 50
        if colour != other:
            place = {}
            for name in (colour, other):
                near = np.abs(pair.image - np.array(scenes.COLOURS[name])).sum(2) < 40
                place[name] = np.argwhere(near).mean(0)
            dy, dx = place[colour] - place[other]
            assert {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[relation]


def test_the_seed_fixes_everything():
    first, again, other = (scenes.make_pairs(40, seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a.image, b.image) and a.caption == b.caption for a, b in zip(first, again, strict=True))
    assert [pair.caption for pair in first] != [pair.caption for pair in other]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pairs": 3}, "at least 8"), ({"pairs": 99999}, "at most"), ({"pairs": 50, "noise": 1.5}, "noise")],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(EcifError, match=message):
        scenes.make_pairs(**options)
