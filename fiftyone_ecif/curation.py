"""Acting on scores: selecting, tagging and exporting pairs."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fiftyone.core.fields as fof
from fiftyone import ViewField

from .errors import EcifError
from .samples import check_collection, every_sample
from .verdicts import check_mark

#: Which end of a score each direction means: of influence, then of misalignment.
DIRECTIONS = {"harmful": "lowest", "valuable": "highest", "suspicious": "highest"}
EXPORT_FORMATS = (".csv", ".json")
#: What a spreadsheet may take for the start of a formula, in full width too, also after blanks.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n\0]")


def score_fields(samples: Any) -> list[str]:
    """The top-level float fields of a collection."""
    return list(samples.get_field_schema(ftype=fof.FloatField))


def select_by_influence(
    samples: Any,
    field: str,
    direction: str = "harmful",
    *,
    count: int | None = None,
    share: float | None = None,
    threshold: float | None = None,
) -> Any:
    """The most harmful or most valuable pairs, the extreme ones first.

    Args:
        samples: a FiftyOne dataset or view.
        field: a score, such as ``ecif_influence``. Samples without one are
            never selected.
        direction ("harmful"): ``"harmful"`` (lowest scores), ``"valuable"``
            (highest scores) or, of misalignment, ``"suspicious"`` (highest).
        count (None): how many.
        share (None): which share of the scored samples, in (0, 1].
        threshold (None): harmful: scores below it; otherwise: scores above it.

    Returns:
        a view

    Raises:
        EcifError: unless exactly one of the three limits is given and usable,
            and the field holds scores
    """
    if direction not in DIRECTIONS:
        raise EcifError(f"direction={direction!r} must be one of {', '.join(DIRECTIONS)}")
    if not isinstance(samples.get_field(field), fof.FloatField):
        raise EcifError(
            f"There is no score field {field!r}. Score fields: {', '.join(score_fields(samples)) or 'none'}"
        )
    limits = {"count": count, "share": share, "threshold": threshold}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1:
        raise EcifError(f"Give one of count, share and threshold, got {', '.join(given) or 'none'}")
    scored = samples.exists(field).match(ViewField(field) > -math.inf)  # NaN exists, and sorts below all numbers
    lowest = DIRECTIONS[direction] == "lowest"
    ordered = scored.sort_by(field, reverse=not lowest)
    if threshold is not None:
        if not math.isfinite(threshold):
            raise EcifError(f"threshold={threshold} must be a number")
        return ordered.match(ViewField(field) < threshold if lowest else ViewField(field) > threshold)
    if share is not None:
        if not 0 < share <= 1:
            raise EcifError(f"share={share} must be in (0, 1]")
        count = whole_pairs(share, len(scored))
        if not count:
            raise EcifError(f"None of these samples has a score in {field!r}")
    if count is None or count < 1:
        raise EcifError(f"count={count} must be at least 1")
    return ordered.limit(min(count, len(samples)))


def tag_by_influence(
    samples: Any,
    field: str = "ecif_influence",
    tag: str | None = None,
    direction: str = "harmful",
    *,
    count: int | None = None,
    share: float | None = None,
    threshold: float | None = None,
) -> Any:
    """Tags the most harmful or most valuable pairs.

    Doing it twice changes nothing; ``view.untag_samples(tag)`` takes it back.

    Args:
        samples: a FiftyOne dataset or view.
        field ("ecif_influence"): the score.
        tag (None): by default the direction.
        direction ("harmful"): which end, see :func:`select_by_influence`.
        count (None): how many.
        share (None): which share of the scored samples.
        threshold (None): where to cut.

    Returns:
        a view of the tagged samples, the extreme ones first

    Raises:
        EcifError: as :func:`select_by_influence`, or if the tag is reserved for
            what a person says
    """
    check_mark(tag)
    selected = select_by_influence(samples, field, direction, count=count, share=share, threshold=threshold)
    # a tag may end the samples' own view
    selected = every_sample(samples._dataset).select(selected.values("id"), ordered=True)
    selected.tag_samples(tag or direction)
    return selected


def whole_pairs(share: float, pairs: int) -> int:
    """How many pairs a share of them is, rounded up."""
    return math.ceil(share * pairs * (1 - 1e-12))  # 0.07 * 100 is a little more than 7


def export_pairs(
    samples: Any,
    path: str | os.PathLike[str],
    caption_field: str = "caption",
    fields: Sequence[str] | None = None,
    overwrite: bool = False,
) -> int:
    """Writes pairs and their scores to a CSV or JSON file.

    Columns: ``id``, ``filepath``, ``caption``, ``tags`` and the fields. In CSV,
    text that a spreadsheet would run as a formula is preceded by an apostrophe;
    JSON holds it as it is.

    Args:
        samples: a FiftyOne dataset or view; the order is kept.
        path: a file that ends in ``.csv`` or ``.json``.
        caption_field ("caption"): the field of the captions.
        fields (None): further fields; by default all float fields.
        overwrite (False): whether to replace the file.

    Returns:
        the number of pairs written

    Raises:
        EcifError: if the file cannot be written, or a field does not exist
    """
    check_collection(samples, caption_field)
    path = Path(path).expanduser()
    if path.suffix not in EXPORT_FORMATS:
        raise EcifError(f"{path.name!r} must end in {' or '.join(EXPORT_FORMATS)}")
    if path.exists() and not overwrite:
        raise EcifError(f"There is a file {path} already. Choose another name, or set overwrite=True")
    fields = score_fields(samples) if fields is None else list(fields)
    for field in fields:
        if samples.get_field(field) is None:
            raise EcifError(f"There is no field {field!r} to export")
    columns = ["id", "filepath", "caption", "tags", *fields]
    rows = zip(*samples.values(["id", "filepath", caption_field, "tags", *fields]), strict=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)  # some split cells at other characters too
                writer.writerow(map(_csv_cell, columns))
                writer.writerows([_csv_cell(value) for value in row] for row in rows)
            else:
                json.dump(
                    [dict(zip(columns, map(_plain, row), strict=True)) for row in rows], file, indent=1, default=str
                )
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # the latter of a text that is no Unicode, or a path with a NUL
        raise EcifError(f"{path} cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()
    return len(samples)


def _plain(value: Any) -> Any:
    """The value, or None for a number that is none: neither format can say NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_cell(value: Any) -> Any:
    if isinstance(value, list | tuple):
        value = ";".join(map(str, value))
    if value is None or isinstance(value, bool | int | float):
        return _plain(value)
    text = str(value)
    return f"'{text}" if _FORMULA.match(text) else text
