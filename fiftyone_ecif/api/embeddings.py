"""Reading embeddings that users bring, from fields of samples or from arrays in the order of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.given_embeddings import GivenEmbeddings
from fiftyone_ecif.samples.pairs import Pairs, every_sample
from fiftyone_ecif.settings.influence import ARRAYS, InfluenceSettings
from fiftyone_ecif.store.disk_matrix import DiskMatrix
from fiftyone_ecif.store.tables import Store

Arrays = tuple[np.ndarray, np.ndarray]
_SIDES = ("image", "caption")


def take_arrays(options: dict[str, Any]) -> Arrays | None:
    """Takes arrays out of some options, in which their place is marked, or None where fields are named.

    Raises:
        EcifError: if they are neither two field names nor two matrices of as many rows
    """
    given = options.get("embeddings")
    if given is None:
        options.pop("embeddings", None)
        return None
    if isinstance(given, str) or (len(given) in (0, 2) and all(isinstance(each, str) for each in given)):
        return None
    try:
        images, captions = (np.asarray(each, dtype=np.float32) for each in given)
    except (TypeError, ValueError) as error:
        raise EcifError(f"embeddings must be two field names, or two arrays of numbers ({error})") from error
    if images.ndim != 2 or captions.ndim != 2 or len(images) != len(captions):
        raise EcifError(
            f"embeddings have shapes {images.shape} and {captions.shape}. Give two matrices with a row for each sample"
        )
    options["embeddings"] = ARRAYS
    return images, captions


def given_embeddings(
    samples: Any,
    groups: Sequence[Pairs],
    views: Sequence[Any],
    settings: InfluenceSettings,
    arrays: Arrays | None,
    device: str | None,
) -> tuple[GivenEmbeddings, dict[int, str]]:
    """The embeddings of pairs in place of an encoder.

    Args:
        samples: what arrays have a row for, or else of whose dataset.
        groups: the pairs, training pairs first.
        views: the collection of each group.
        settings: of the run, with two field names if there are no arrays.
        arrays: of images and of captions, if they are given.
        device: where heads are computed.

    Returns:
        rows for all pairs, one group after the other, and ``{index: reason}`` of those without usable embeddings,
        whose rows are zero

    Raises:
        EcifError: if a field does not exist, no arrays are at hand, or embeddings of images and captions differ in size
    """
    if arrays is None and settings.embeddings == ARRAYS:
        raise EcifError(
            "The run was of arrays of embeddings, which are not kept with it. Run it again with arrays, or keep them "
            "in fields"
        )
    if arrays is not None:
        found = _of_arrays(samples, groups, arrays)
    else:
        found = [_of_field(groups, views, field) for field in settings.embeddings]
    failures: dict[int, str] = {}
    sides = []
    for side, rows in zip(_SIDES, found, strict=True):
        sides.append(_matrix(rows, side, failures))
    widths = [side.shape[1] for side in sides]
    if widths[0] != widths[1]:
        raise EcifError(
            f"Image embeddings have {widths[0]} numbers and caption embeddings {widths[1]}. Give those of one model, "
            "which can be compared"
        )
    return GivenEmbeddings(sides[0], sides[1], settings.scale, device), failures


def _of_field(groups: Sequence[Pairs], views: Sequence[Any], field: str) -> list[Any]:
    rows: list[Any] = []
    for group, view in zip(groups, views, strict=True):
        dataset = every_sample(view._dataset)
        if dataset.get_field(field) is None:
            raise EcifError(f"There is no field {field!r} for embeddings in dataset {view._dataset.name!r}")
        by_id: Mapping[str, Any] = dict(zip(*dataset.select(group.ids).values(["id", field]), strict=True))
        rows += [by_id[sample] for sample in group.ids]
    return rows


def _of_arrays(samples: Any, groups: Sequence[Pairs], arrays: Arrays) -> list[list[Any]]:
    order = next((each.values("id") for each in (samples, samples._dataset) if len(each) == len(arrays[0])), None)
    if order is None:
        raise EcifError(
            f"embeddings have {len(arrays[0]):,} rows for {len(samples):,} samples. Give a row for each sample, or for "
            f"each of the {len(samples._dataset):,} of their dataset"
        )
    place = {sample: row for row, sample in enumerate(order)}
    lacking = [sample for group in groups for sample in group.ids if sample not in place]
    if lacking:
        raise EcifError(
            f"Sample {lacking[0]} of the target has no row in embeddings. Give arrays with a row for each sample of "
            "the dataset, or the names of two fields"
        )
    return [[side[place[sample]] for group in groups for sample in group.ids] for side in arrays]


def _matrix(rows: Sequence[Any], side: str, failures: dict[int, str]) -> np.ndarray:
    """All rows, float32, zero where there is none that can be used, which is noted."""
    usable: dict[int, np.ndarray] = {}
    for place, row in enumerate(rows):
        vector = None if row is None else np.asarray(row, dtype=np.float32).ravel()
        if vector is None or not vector.size:
            failures.setdefault(place, f"it has no {side} embedding")
        elif not np.isfinite(vector).all() or not vector.any():
            failures.setdefault(place, f"its {side} embedding is zero, or holds NaN or infinity")
        else:
            usable[place] = vector
    if not usable:
        raise EcifError(f"No sample has a usable {side} embedding: numbers, finite and not all zero")
    sizes = {len(vector) for vector in usable.values()}
    if len(sizes) > 1:
        raise EcifError(
            f"The {side} embeddings have different sizes, {min(sizes)} and {max(sizes)}. Give those of one model"
        )
    matrix = np.zeros((len(rows), sizes.pop()), dtype=np.float32)
    for place, vector in usable.items():
        matrix[place] = vector
    return matrix


def check_failures(groups: Sequence[Pairs], failures: Mapping[int, str], skip_failures: bool) -> None:
    """Checks that pairs may lack embeddings, if some do.

    Raises:
        EcifError: for the first of them, unless it is skipped
    """
    if failures and not skip_failures:
        ids = [sample for group in groups for sample in group.ids]
        place, reason = min(failures.items())
        raise EcifError(f"Sample {ids[place]} cannot be used: {reason}. Mend it, or set skip_failures=True")


def on_disk(store: Store, rows: np.ndarray) -> DiskMatrix:
    """A matrix as features are kept, shape ``(N, d)``."""
    folder = store.table("images").folder
    folder.mkdir(parents=True, exist_ok=True)
    matrix = DiskMatrix(len(rows), rows.shape[1], folder)
    matrix.write(np.arange(len(rows)), rows)
    return matrix
