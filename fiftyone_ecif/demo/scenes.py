"""The demo set: scenes of two coloured, handwritten digits with captions.

Each scene places two real scans of scikit-learn's handwritten digits
(https://archive.ics.uci.edu/dataset/80) side by side or one above the other,
each in a colour of its own, and is captioned in plain words: "a red seven left
of a green two". A seeded share of the training captions is spoiled in a known
way, so that every detector can be measured against the truth.

Training and validation are split by content: they share neither a scan nor a
scene description.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fiftyone_ecif.errors import EcifError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (235, 64, 52),
    "green": (60, 190, 75),
    "blue": (70, 120, 255),
    "yellow": (250, 215, 50),
    "pink": (245, 120, 200),
    "white": (240, 240, 240),
}
#: Each relation with its opposite and the direction (dx, dy) of the first digit.
RELATIONS = {
    "left of": ("right of", (-1, 0)),
    "right of": ("left of", (1, 0)),
    "above": ("below", (0, -1)),
    "below": ("above", (0, 1)),
}
SPOILS = ("swapped", "attribute", "relation")

IMAGE_SIZE = 96
_DIGIT_SIZE = 40
_VALIDATION_SHARE = 0.2  # of the scans
_MAX_DESCRIPTIONS = (len(DIGITS) * len(COLOURS)) ** 2 * len(RELATIONS) // 2  # mirrored ones are one


@dataclass(frozen=True)
class Scene:
    """What an image shows: two coloured digits and where the first one stands."""

    first: tuple[int, str]  # digit, colour
    relation: str
    second: tuple[int, str]

    @property
    def caption(self) -> str:
        """The scene in words, such as "a red seven left of a green two"."""
        (a, colour_a), (b, colour_b) = self.first, self.second
        return f"a {colour_a} {DIGITS[a]} {self.relation} a {colour_b} {DIGITS[b]}"

    @property
    def mirrored(self) -> Scene:
        """The same picture described from the other digit."""
        return Scene(self.second, RELATIONS[self.relation][0], self.first)


@dataclass(frozen=True)
class Pair:
    """One image-caption pair of the demo set.

    Attributes:
        image: the picture, ``uint8`` array of shape ``(IMAGE_SIZE, IMAGE_SIZE, 3)``.
        caption: the caption it is shown with, spoiled or not.
        true_caption: the caption that describes the picture.
        spoiled: one of :data:`SPOILS`, or None if the caption is right.
        split: ``"train"`` or ``"val"``.
    """

    image: np.ndarray
    caption: str
    true_caption: str
    spoiled: str | None
    split: str


def make_pairs(pairs: int, noise: float = 0.2, seed: int = 0, validation: int | None = None) -> list[Pair]:
    """Composes the demo set.

    Args:
        pairs: the number of training pairs, at least 8.
        noise (0.2): the share of training captions to spoil, in [0, 1). The
            three ways of :data:`SPOILS` take equal parts.
        seed (0): fixes everything.
        validation (None): the number of validation pairs, whose captions are
            all right. By default a quarter of ``pairs``.

    Returns:
        the training pairs, then the validation pairs; no two captions are equal

    Raises:
        EcifError: if a number is out of its range
    """
    validation = max(pairs // 4, 8) if validation is None else validation
    if pairs < 8:
        raise EcifError(f"The demo set needs at least 8 pairs, got {pairs}")
    if pairs + validation > _MAX_DESCRIPTIONS:
        raise EcifError(
            f"The demo set has at most {_MAX_DESCRIPTIONS} different scenes; "
            f"{pairs} training and {validation} validation pairs were asked for"
        )
    if not 0 <= noise < 1:
        raise EcifError(f"noise is a share in [0, 1), got {noise}")

    rng = np.random.default_rng(seed)
    scenes = _draw_scenes(pairs + validation, rng)
    captions, spoils = _spoil(scenes[:pairs], round(noise * pairs), scenes[pairs:], rng)
    captions += [scene.caption for scene in scenes[pairs:]]
    spoils += [None] * validation
    scans = _split_scans(rng)
    return [
        Pair(_draw(scene, scans[split], rng), caption, scene.caption, spoiled, split)
        for scene, caption, spoiled, split in zip(
            scenes, captions, spoils, ["train"] * pairs + ["val"] * validation, strict=True
        )
    ]


def _draw_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    seen: set[Scene] = set()
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = _random_scene(rng)
        if scene not in seen:
            seen |= {scene, scene.mirrored}
            scenes.append(scene)
    return scenes


def _random_scene(rng: np.random.Generator) -> Scene:
    colours, relations = list(COLOURS), list(RELATIONS)

    def digit() -> tuple[int, str]:
        return int(rng.integers(10)), colours[rng.integers(len(colours))]

    return Scene(digit(), relations[rng.integers(len(relations))], digit())


def _spoil(
    scenes: list[Scene], count: int, others: list[Scene], rng: np.random.Generator
) -> tuple[list[str], list[str | None]]:
    """Captions of the scenes, ``count`` of them spoiled, and how each was spoiled."""
    captions = [scene.caption for scene in scenes]
    spoils: list[str | None] = [None] * len(scenes)
    attribute, relation, swapped = (len(part) for part in np.array_split(np.arange(count), 3))
    if swapped == 1:  # nobody to swap with
        attribute, swapped = attribute + 1, 0

    victims = iter(rng.permutation(len(scenes)))
    to_swap = [next(victims) for _ in range(swapped)]
    for victim, donor in zip(to_swap, np.roll(to_swap, 1), strict=True):
        captions[victim], spoils[victim] = scenes[donor].caption, "swapped"

    taken = set(captions) | {scene.caption for scene in others}
    for way in ["attribute"] * attribute + ["relation"] * relation:
        free: list[str] = []
        while not free:  # a scene all of whose near misses are other captions stays right
            victim = next(victims, None)
            if victim is None:
                raise EcifError(f"{count} captions cannot all be spoiled without repeating one. Lower noise or pairs")
            free = sorted({wrong.caption for wrong in _near_misses(scenes[victim], way)} - taken)
        captions[victim], spoils[victim] = str(rng.choice(free)), way
        taken.add(captions[victim])
    return captions, spoils


def _near_misses(scene: Scene, way: str) -> list[Scene]:
    """The scenes that differ in one attribute (a digit or a colour), or in the relation."""
    if way == "relation":
        near = [replace(scene, relation=relation) for relation in RELATIONS]
    else:
        (a, colour_a), (b, colour_b) = scene.first, scene.second
        near = [replace(scene, first=(digit, colour_a)) for digit in range(10)]
        near += [replace(scene, first=(a, colour)) for colour in COLOURS]
        near += [replace(scene, second=(digit, colour_b)) for digit in range(10)]
        near += [replace(scene, second=(b, colour)) for colour in COLOURS]
    return [other for other in near if other not in (scene, scene.mirrored)]


def _split_scans(rng: np.random.Generator) -> dict[str, dict[int, np.ndarray]]:
    """The scans of each digit, as opacities in [0, 1], training and validation apart."""
    data = load_digits()
    order = rng.permutation(len(data.target))
    cut = int(len(order) * _VALIDATION_SHARE)
    return {
        split: {d: data.images[indices[data.target[indices] == d]] / 16.0 for d in range(10)}
        for split, indices in (("val", order[:cut]), ("train", order[cut:]))
    }


def _draw(scene: Scene, scans: dict[int, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 28.0)
    dx, dy = RELATIONS[scene.relation][1]
    jitter = (IMAGE_SIZE - 2 * _DIGIT_SIZE) // 4
    for (digit, colour), side in ((scene.first, 1), (scene.second, -1)):
        scan = scans[digit][rng.integers(len(scans[digit]))]
        opacity = Image.fromarray(scan.astype(np.float32)).resize((_DIGIT_SIZE, _DIGIT_SIZE), Image.Resampling.BICUBIC)
        alpha = np.clip(np.asarray(opacity), 0, 1)[..., None]
        middle = (IMAGE_SIZE - _DIGIT_SIZE) // 2
        step = _DIGIT_SIZE // 2 + jitter
        x, y = (middle + side * direction * step + rng.integers(-jitter, jitter + 1) for direction in (dx, dy))
        patch = canvas[y : y + _DIGIT_SIZE, x : x + _DIGIT_SIZE]
        patch += alpha * (np.array(COLOURS[colour]) - patch)
    return canvas.round().astype(np.uint8)
