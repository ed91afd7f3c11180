"""Features of pairs, from the store where they are, else from the encoder.

An image is known by its path, size and time of change, a caption by its text,
so that a changed one is encoded anew and an unchanged one never twice, whoever
asks for it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.models.dual_encoder import DualEncoder
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.store.disk_matrix import DiskMatrix
from fiftyone_ecif.store.keys import PairKey, digest
from fiftyone_ecif.store.tables import Store, Table

_PART = 1024  # rows computed between two writes to the store


def cached_features(
    store: Store,
    encoder: DualEncoder,
    keys: Sequence[PairKey],
    paths: Sequence[str],
    captions: Sequence[str],
    num_workers: int,
    skip_failures: bool = True,
    processes: ProcessGroup = ALONE,
) -> Generator[Progress, None, tuple[DiskMatrix, DiskMatrix, dict[int, str]]]:
    """Features of image-caption pairs.

    Args:
        store: the encoder's store.
        encoder: computes what is not in it.
        keys: of the pairs.
        paths: the image of each pair.
        captions: the caption of each pair.
        num_workers: processes that load images.
        skip_failures (True): whether to go on after an image that cannot be read.
        processes (ALONE): the processes that share the encoding.

    Returns:
        image features ``(N, w_image)``, caption features ``(N, w_text)``, and
        ``{index: reason}`` of pairs whose image cannot be read;
        their image features are zero

    Raises:
        EcifError: for the first image that cannot be read, unless it is skipped
    """
    images = {key.image: path for key, path in zip(keys, paths, strict=True)}
    texts = {key.caption: caption for key, caption in zip(keys, captions, strict=True)}
    reasons = yield from _encode_images(store.table("images"), encoder, images, num_workers, skip_failures, processes)
    yield from _encode_captions(store.table("captions"), encoder, texts, processes)
    return (
        _gather(store.table("images"), [key.image for key in keys], reasons),
        _gather(store.table("captions"), [key.caption for key in keys], {}),
        {index: reasons[key.image] for index, key in enumerate(keys) if key.image in reasons},
    )


def _encode_images(
    table: Table,
    encoder: DualEncoder,
    wanted: dict[str, str],
    num_workers: int,
    skip_failures: bool,
    processes: ProcessGroup,
) -> Generator[Progress, None, dict[str, str]]:
    missing = _missing(table, wanted, processes)
    failures: dict[str, str] = {}
    found: list[str] = []
    features: list[Tensor] = []
    done = 0
    paths = [wanted[key] for key in missing]
    for indices, rows, reasons in encoder.image_features(paths, encoder.batch_size, num_workers):
        found += [missing[index] for index in indices]
        features += [rows] if indices else []
        failures |= {missing[index]: reason for index, reason in reasons.items()}
        if failures and not skip_failures:
            break
        done += len(indices) + len(reasons)
        if sum(map(len, features)) >= _PART:
            _write(table, found, features)
            found, features = [], []
        yield Progress("Encoding images", done, len(missing))
    _write(table, found, features)
    failures = dict(processes.gather(list(failures.items())))
    if failures and not skip_failures:
        key, reason = next(iter(failures.items()))
        raise EcifError(f"The image {wanted[key]} cannot be read ({reason}). Mend it, or set skip_failures=True")
    return failures


def _encode_captions(
    table: Table, encoder: DualEncoder, wanted: dict[str, str], processes: ProcessGroup
) -> Generator[Progress, None, None]:
    missing = sorted(
        _missing(table, wanted, processes), key=lambda key: len(wanted[key])
    )  # alike lengths need least padding
    done = 0
    for start in range(0, len(missing), _PART):
        keys = missing[start : start + _PART]
        features = []
        for rows in encoder.text_features([wanted[key] for key in keys], encoder.batch_size):
            features.append(rows)
            done += len(rows)
            yield Progress("Encoding captions", done, len(missing))
        _write(table, keys, features)
    processes.wait()


def _missing(table: Table, wanted: dict[str, str], processes: ProcessGroup) -> list[str]:
    """Of this process's share, what is not in the store."""
    missing = dict.fromkeys(processes.share(list(wanted)))
    for part in table.parts():
        for key in table.read(part, "key")["key"]:
            missing.pop(key.decode(), None)
    return list(missing)


def _write(table: Table, keys: list[str], features: list[Tensor]) -> None:
    if keys:
        part = digest("".join(keys))  # the same rows make the same part, whoever writes it
        table.write(part, {"key": np.array(keys, dtype="S32"), "features": torch.cat(features).numpy()})


def _gather(table: Table, keys: Sequence[str], failures: Mapping[str, str]) -> DiskMatrix:
    """The features of each key, zero for failures."""
    wanted = np.array(keys, dtype="S32")
    order = np.argsort(wanted, kind="stable")
    wanted = wanted[order]
    lacking = np.array([key not in failures for key in keys])
    table.folder.mkdir(parents=True, exist_ok=True)
    rows = DiskMatrix(len(keys), 0, table.folder)
    for part in table.parts():
        found = table.read(part, "key")["key"]
        first, last = (np.searchsorted(wanted, found, side) for side in ("left", "right"))
        if (first == last).all():
            continue
        features = table.read(part, "features")["features"]
        if not rows.shape[1]:
            rows = DiskMatrix(len(keys), features.shape[1], table.folder)
        places = [order[a:b] for a, b in zip(first, last, strict=True)]  # a key can be that of several pairs
        rows.write(np.concatenate(places), np.repeat(features, last - first, axis=0))
        lacking[np.concatenate(places)] = False
    if lacking.any():
        raise EcifError(
            f"Features went away from {table.folder} while they were used, or processes that share a job do not "
            "share this folder. Run again"
        )
    return rows
