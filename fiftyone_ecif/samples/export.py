"""Pairs and their scores as a file that other programs read."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.samples.pairs import check_collection
from fiftyone_ecif.samples.selection import score_fields
from fiftyone_ecif.store.files import atomic_path, user_path

EXPORT_FORMATS = (".csv", ".json")
_BESIDE = {"_influence": ("_rank",), "_misalignment": ("_reason", "_duplicate")}  # ends of names, of scores and others
#: What a spreadsheet may take for the start of a formula, in full width too, also after blanks.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n\0]")


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
        samples: a FiftyOne dataset or view; the order is kept, and repeats are left out.
        path: a file that ends in ``.csv`` or ``.json``.
        caption_field ("caption"): the field of the captions.
        fields (None): further fields; by default all float fields, and what runs say beside scores: rank, reason
            and duplicate.
        overwrite (False): whether to replace the file.

    Returns:
        the number of pairs written

    Raises:
        EcifError: if the file cannot be written, or a field does not exist
    """
    check_collection(samples, caption_field)
    path = user_path(path)
    if path.suffix not in EXPORT_FORMATS:
        raise EcifError(f"{path.name!r} must end in {' or '.join(EXPORT_FORMATS)}")
    if path.exists() and not overwrite:
        raise EcifError(f"There is a file {path} already. Choose another name, or set overwrite=True")
    fields = [*score_fields(samples), *_told_beside(samples)] if fields is None else list(fields)
    for field in fields:
        if samples.get_field(field) is None:
            raise EcifError(f"There is no field {field!r} to export")
    columns = ["id", "filepath", "caption", "tags", *fields]
    found = zip(*samples.values(["id", "filepath", caption_field, "tags", *fields]), strict=True)
    rows = list({row[0]: row for row in found}.values())  # a view can repeat samples, as after concat()
    try:
        with atomic_path(path, shared=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)  # some split cells at other characters too
                writer.writerow(map(_csv_cell, columns))
                writer.writerows([_csv_cell(value) for value in row] for row in rows)
            else:
                json.dump(
                    [dict(zip(columns, map(_plain, row), strict=True)) for row in rows], file, indent=1, default=str
                )
    except (OSError, ValueError) as error:  # the latter of a text that is no Unicode, or a path with a NUL
        raise EcifError(f"{path} cannot be written ({error})") from error
    return len(rows)


def _told_beside(samples: Any) -> list[str]:
    """The fields beside the scores of runs that say more of a pair."""
    names = set(samples.get_field_schema())
    return [
        f"{score.removesuffix(end)}{told}"
        for end, beside in _BESIDE.items()
        for score in score_fields(samples)
        if score.endswith(end)
        for told in beside
        if f"{score.removesuffix(end)}{told}" in names
    ]


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
