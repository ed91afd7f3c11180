"""FiftyOne samples to image-caption pairs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fiftyone as fo
import fiftyone.core.fields as fof
import fiftyone.core.validation as fov
from PIL import Image

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.keys import PairKey, digest, pair_key
from fiftyone_ecif.store.known_files import KnownFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Image-caption pairs of a collection.

    Attributes:
        ids: sample ids, in the order of the collection.
        paths: image files.
        captions: non-empty texts.
        skipped: ``{sample id: reason}`` of samples that are no pair.
    """

    ids: list[str]
    paths: list[str]
    captions: list[str]
    skipped: dict[str, str]

    def without(self, failures: Mapping[int, str]) -> Pairs:
        """The pairs but those at the given indices, which join the skipped."""
        keep = [index for index in range(len(self.ids)) if index not in failures]
        return Pairs(
            [self.ids[index] for index in keep],
            [self.paths[index] for index in keep],
            [self.captions[index] for index in keep],
            self.skipped | {self.ids[index]: f"image: {reason}" for index, reason in failures.items()},
        )


def caption_fields(samples: Any) -> list[str]:
    """The fields of a collection that can hold captions."""
    schema = samples.get_field_schema(flat=True, ftype=fof.StringField)
    return [name for name in schema if name not in ("filepath", "metadata.mime_type") and not name.startswith("_")]


def every_sample(dataset: Any) -> Any:
    """All samples of a dataset; the images of every slice if it is grouped."""
    return dataset.select_group_slices(media_type="image") if dataset.media_type == "group" else dataset


def deleted_of(dataset: Any, ids: Sequence[str]) -> list[str]:
    """Which samples are no longer in a dataset, in the order given."""
    there = set(every_sample(dataset).select(list(dict.fromkeys(ids))).values("id"))
    return [sample for sample in ids if sample not in there]


def each_once(samples: Any) -> Any:
    """A collection without repeats, which a view can have, as after ``concat``; then in no order.

    Args:
        samples: a FiftyOne dataset or view.
    """
    ids = [] if isinstance(samples, fo.Dataset) else samples.values("id")
    if len(set(ids)) == len(ids):
        return samples
    return samples.mongo(
        [{"$group": {"_id": "$_id", "first": {"$first": "$$ROOT"}}}, {"$replaceRoot": {"newRoot": "$first"}}]
    )


def check_collection(samples: Any, caption_field: str | None) -> None:
    """Checks that a collection can hold image-caption pairs.

    Args:
        samples: the collection.
        caption_field: where the captions are; None to check the images only.

    Raises:
        EcifError: if it is none of images, or has no such caption field
    """
    if not isinstance(samples, fo.core.collections.SampleCollection):
        raise EcifError(f"A FiftyOne dataset or view is needed, got {type(samples).__name__}")
    if samples._dataset._is_generated or samples._is_generated:
        raise EcifError("Patches, frames and clips views are not supported. Use a view of whole images")
    if samples.media_type == "group" and samples._is_dynamic_groups:
        raise EcifError("The view shows groups of samples, made by group_by. Use its samples: view.flatten()")
    if samples.media_type == "group":
        raise EcifError("A grouped dataset was given. Choose a slice: select_group_slices(media_type='image')")
    if len(samples) == 0:
        raise EcifError("The view has no samples")
    try:
        fov.validate_collection(samples, media_type="image")
    except ValueError as error:
        raise EcifError(f"Images are needed: {error}") from error
    if caption_field is None:
        return
    field = samples.get_field(caption_field)
    offer = ", ".join(caption_fields(samples)) or f"none. {advice_on_captions(samples)}"
    if field is None:
        raise EcifError(f"There is no field {caption_field!r}. String fields of this dataset: {offer}")
    if not isinstance(field, fof.StringField):
        raise EcifError(
            f"Captions must be in a string field, but {caption_field!r} is a {type(field).__name__}. "
            f"String fields of this dataset: {offer}"
            + (f". {advice_on_captions(samples)}" if isinstance(field, fof.ListField) else "")
        )


def advice_on_captions(samples: Any) -> str:
    """How to make a string field of captions: from a field of lists of texts where there is one."""
    schema = samples.get_field_schema(ftype=fof.ListField)
    lists = [name for name, field in schema.items() if name != "tags" and isinstance(field.field, fof.StringField)]
    if not lists:
        return "Add one: dataset.set_values('caption', texts)"
    name = lists[0]
    return (
        f"Make one of the lists in {name!r}: "
        f"dataset.set_values('caption', [texts[0] if texts else None for texts in dataset.values({name!r})])"
    )


def read_pairs(samples: Any, caption_field: str, skip_failures: bool = True) -> Pairs:
    """Reads image-caption pairs, sorted by sample id, each sample once. No image is decoded yet.

    Args:
        samples: a FiftyOne dataset or view of images.
        caption_field: a string field.
        skip_failures (True): whether to skip samples without a caption or with
            a missing or unreadable image, with a warning.

    Raises:
        EcifError: for the first such sample, if they are not to be skipped, or
            if no sample is a pair
    """
    check_collection(samples, caption_field)
    samples = each_once(samples)
    pairs = Pairs([], [], [], {})
    for sample_id, path, caption in sorted(
        zip(*samples.values(["id", "filepath", caption_field]), strict=True), key=lambda row: row[0]
    ):
        reason = _what_is_wrong(path, caption, caption_field, open_image=not skip_failures)
        if reason is None:
            pairs.ids.append(sample_id)
            pairs.paths.append(path)
            pairs.captions.append(caption)
        elif skip_failures:
            pairs.skipped[sample_id] = reason
        else:
            raise EcifError(f"Sample {sample_id} cannot be scored ({reason}). Mend it, or set skip_failures=True")
    if not pairs.ids:
        sample_id, reason = next(iter(pairs.skipped.items()))
        raise EcifError(f"None of the {len(samples)} samples is an image-caption pair; sample {sample_id}: {reason}")
    return pairs


def warn_skipped(skipped: Mapping[str, str], what: str) -> None:
    """Logs how many samples were skipped, and names the first."""
    if skipped:
        sample_id, reason = next(iter(skipped.items()))
        logger.warning("Skipped %d %s samples; the first is %s (%s)", len(skipped), what, sample_id, reason)


def _what_is_wrong(path: str, caption: Any, field: str, open_image: bool) -> str | None:
    if caption is None or not str(caption).strip():
        return f"{field}: empty"
    if not isinstance(caption, str):
        return f"{field}: not text but {type(caption).__name__} {caption!r}"
    if not os.path.isfile(path):
        return f"image: there is no file {path}"
    if open_image:
        try:
            Image.open(path).close()
        except Exception as error:  # PIL raises many kinds on damaged files
            return f"image: {error}"
    return None


def pairs_now(dataset: Any, caption_field: str, ids: Sequence[str] | None = None) -> dict[str, tuple[str, Any]]:
    """Path and caption by sample id, of all slices of a grouped dataset.

    Args:
        dataset: a FiftyOne dataset.
        caption_field: where the captions are; they are None where it is gone.
        ids (None): of some samples only, in this order, those that are gone left out.
    """
    samples = every_sample(dataset)
    if ids is not None:
        samples = samples.select(list(dict.fromkeys(ids)), ordered=True)
    there = samples.get_field(caption_field) is not None
    ids, paths, *captions = samples.values(["id", "filepath"] + [caption_field] * there)
    return dict(zip(ids, zip(paths, *(captions or [[None] * len(ids)]), strict=True), strict=True))


def digest_now(path: str, caption: Any) -> str | None:
    """Of a pair as it is now, as :attr:`fiftyone_ecif.store.keys.PairKey.digest`; None if it is none."""
    if not isinstance(caption, str):
        return None
    try:
        return pair_key(path, caption).digest
    except EcifError:
        return None


def is_as_it_was(path: str, caption: Any, before: str, known: KnownFiles) -> bool:
    """Whether a pair has the caption that it had and an image of the same bytes, wherever that lies now.

    Args:
        path: of the image.
        caption: its caption.
        before: the pair's digest then.
        known: the files of the dataset.
    """
    now = digest_now(path, caption)
    if now is None or now == before:
        return now is not None
    return PairKey(known.key(path), digest(caption)).digest == before
