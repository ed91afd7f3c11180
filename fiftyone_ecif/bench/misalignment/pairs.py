"""Clean image-caption pairs to spoil and look for: a folder of images with a ``pairs.csv``.

Sets that are not ours to ship are made into such a folder in the cache on first
use: emoji from the npm registry by the user's ``npm``, easy-VQA's shapes from
PyPI by ``pip``.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fiftyone_ecif.demo import scenes
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import atomic_path, cache_folder

COLUMNS = ("filepath", "caption", "category", "subcategory", "group")
_EMOJI_VERSION = "16.0.0"
_SHAPES_VERSION = "1.0"
_DIGITS = 2000
_COLOURS = ("red", "green", "blue", "yellow", "teal", "black", "gray", "brown")
_SHAPES = ("circle", "triangle", "rectangle")


@dataclass(frozen=True)
class CleanPairs:
    """Pairs that belong together.

    Attributes:
        name: of the set.
        paths: image files.
        captions: one for each.
        kinds: ``category`` and ``subcategory`` of each pair, where they are known.
        groups: pairs of one group must stay on one side of a split.
    """

    name: str
    paths: list[str]
    captions: list[str]
    kinds: Mapping[str, list[str]]
    groups: list[str]

    def select(self, rows: Iterable[int]) -> CleanPairs:
        """Some of the pairs."""
        chosen = list(rows)
        pick: Callable[[list[str]], list[str]] = lambda values: [values[row] for row in chosen]  # noqa: E731
        kinds = {name: pick(values) for name, values in self.kinds.items()}
        return CleanPairs(self.name, pick(self.paths), pick(self.captions), kinds, pick(self.groups))


def load_pairs(data: str) -> CleanPairs:
    """A set by its name, ``digits``, ``shapes``, ``emoji`` or ``emoji-twitter``, or from a folder.

    Raises:
        EcifError: if there is no such set, or it cannot be fetched or read
    """
    makers: dict[str, Callable[[Path], None]] = {
        "digits": _make_digits,
        "shapes": _make_shapes,
        "emoji": lambda folder: _make_emoji("google", folder),
        "emoji-twitter": lambda folder: _make_emoji("twitter", folder),
    }
    if data in makers:
        folder = cache_folder() / "bench" / f"pairs-{data}"
        if not (folder / "pairs.csv").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            makers[data](folder)
        return read_folder(folder, data)
    if not Path(data).is_dir():
        raise EcifError(f"data={data!r} is neither a folder nor one of {', '.join(makers)}")
    return read_folder(Path(data), Path(data).resolve().name)


def read_folder(folder: Path, name: str) -> CleanPairs:
    """Reads ``pairs.csv`` and checks it.

    Args:
        folder: with ``pairs.csv``: columns ``filepath``, relative to the folder,
            and ``caption``; where they are known ``category``, ``subcategory``
            and ``group``.
        name: of the set.

    Raises:
        EcifError: naming the row, if something is missing or lies outside the folder
    """
    table = folder / "pairs.csv"
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EcifError(f"{table} cannot be read ({error})") from error
    if not rows:
        raise EcifError(f"{table} has no pairs")
    for column in ("filepath", "caption"):
        if column not in rows[0]:
            raise EcifError(f"{table} has no column {column!r}")
    root = folder.resolve()
    for number, row in enumerate(rows, start=2):
        try:
            path = (folder / (row["filepath"] or "")).resolve()
            inside = path.is_relative_to(root) and path.is_file()
        except (OSError, ValueError):  # a name too long, or with a NUL
            inside = False
        if not inside:
            raise EcifError(f"{table}, line {number}: there is no file {row['filepath']!r} in the folder")
        if not (row["caption"] or "").strip():
            raise EcifError(f"{table}, line {number}: the caption is empty")
    kinds = {
        kind: [row[kind] for row in rows] for kind in ("category", "subcategory") if all(row.get(kind) for row in rows)
    }
    groups = [row.get("group") or f"line {number}" for number, row in enumerate(rows, start=2)]
    paths = [str(folder / row["filepath"]) for row in rows]
    return CleanPairs(name, paths, [row["caption"].strip() for row in rows], kinds, groups)


def swap_captions(pairs: CleanPairs, noise: str, ratio: float, seed: int) -> tuple[list[str], np.ndarray]:
    """Permutes the captions of some pairs among each other, so that no caption is there twice that was not before.

    Args:
        pairs: clean ones.
        noise: ``"random"``, or a kind of the pairs, within which captions stay.
        ratio: the share of the pairs whose captions are permuted.
        seed: fixes which and how.

    Returns:
        the captions, and which are wrong now, bool, shape ``(N,)``; a victim that
        was given its own text again is not
    """
    generator = np.random.default_rng(seed)
    count = len(pairs.captions)
    victims = generator.permutation(count)[: round(ratio * count)]
    within = np.array(["" for _ in range(count)] if noise == "random" else pairs.kinds[noise])
    texts = np.array(pairs.captions, dtype=object)
    swapped = texts.copy()
    for kind in np.unique(within[victims]):
        places = victims[within[victims] == kind]
        given = generator.permutation(places)
        for _ in range(100):
            same = np.flatnonzero(texts[given] == texts[places])
            if not len(same):
                break
            for place in same:
                other = generator.integers(len(places))
                given[[place, other]] = given[[other, place]]
        swapped[places] = texts[given]
    return list(swapped), swapped != texts


def _write(folder: Path, rows: Iterable[tuple[Image.Image, Mapping[str, str]]]) -> None:
    """Writes images and ``pairs.csv``, the table last, so that a folder with one is whole."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "pairs.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for number, (image, columns) in enumerate(rows):
            name = f"images/{number:05d}.png"
            image.save(folder / name)
            writer.writerow({"filepath": name, **columns})


def _make_digits(folder: Path) -> None:
    """The demo's scenes with right captions. Category: the relation; subcategory: the first digit too."""
    rows = []
    for pair in scenes.make_pairs(_DIGITS, noise=0.0, seed=0, validation=0):
        relation = next(word for word in scenes.RELATIONS if f" {word} " in pair.caption)
        first = pair.caption.split()[2]
        columns = {"caption": pair.caption, "category": relation, "subcategory": f"{first} {relation}"}
        rows.append((Image.fromarray(pair.image), columns))
    _write(folder, rows)


def _make_emoji(vendor: str, folder: Path) -> None:
    """A vendor's renderings and the names of the characters."""
    with tempfile.TemporaryDirectory() as place:
        package = f"emoji-datasource-{vendor}@{_EMOJI_VERSION}"
        _fetch("npm", ["npm", "pack", package, "--silent", "--pack-destination", place])
        with tarfile.open(next(Path(place).glob("*.tgz"))) as archive:
            wanted = ("package/emoji.json", f"package/img/{vendor}/64/")
            members = [member for member in archive.getmembers() if member.name.startswith(wanted)]
            archive.extractall(place, members, filter="data")
        entries = json.loads((Path(place) / "package/emoji.json").read_text(encoding="utf-8"))
        images = Path(place) / f"package/img/{vendor}/64"
        rows = []
        for entry in entries:
            path = images / entry["image"]
            if path.is_file():
                picture = Image.open(path).convert("RGBA")
                paper = Image.new("RGBA", picture.size, "white")
                paper.alpha_composite(picture)
                columns = {
                    "caption": (entry["name"] or entry["short_name"]).lower(),
                    "category": entry["category"],
                    "subcategory": entry["subcategory"],
                    "group": entry["unified"],
                }
                rows.append((paper.convert("RGB"), columns))
        _write(folder, rows)


def _make_shapes(folder: Path) -> None:
    """The training images of easy-VQA whose colour and shape its questions give away. Category: the shape."""
    with tempfile.TemporaryDirectory() as place:
        _fetch(
            "pip",
            [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", place, f"easy-vqa=={_SHAPES_VERSION}"],
        )
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as archive:
            colours: dict[int, str] = {}
            shapes: dict[int, str] = {}
            for question, answer, image in json.loads(archive.read("easy_vqa/data/train/questions.json")):
                words = [word for word in question.rstrip("?").split() if word not in ("not", "shape")]
                told = [*words, answer] if answer not in ("yes", "no") else []
                if (answer == "yes") != (" not " in question) and answer in ("yes", "no"):
                    told = words
                for word in told:
                    if word in _COLOURS:
                        colours[image] = word
                    elif word in _SHAPES:
                        shapes[image] = word
            rows = []
            for image in sorted(colours.keys() & shapes.keys()):
                caption = f"a {colours[image]} {shapes[image]}"
                picture = Image.open(io.BytesIO(archive.read(f"easy_vqa/data/train/images/{image}.png")))
                rows.append((picture.convert("RGB"), {"caption": caption, "category": shapes[image]}))
        _write(folder, rows)


def _fetch(program: str, command: list[str]) -> None:
    if program == "npm" and shutil.which("npm") is None:
        raise EcifError("The emoji set is fetched with npm, which is not installed. Install Node.js, or give a folder")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EcifError(f"{program} could not fetch the set: {done.stderr.strip()[-500:]}")
