"""Fine-tuning a model on a user's pairs, with low-rank adapters by default.

What is trained is the flat vector of a scope of the model's own parameters (see ``influence.scope``),
so that the same parameters can be attributed afterwards.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from fiftyone_ecif.api.preparation import twins_of
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.devices import choose_device
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.objective import random_partition
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.checkpoint import new_checkpoint
from fiftyone_ecif.models.dual_encoder import DualEncoder
from fiftyone_ecif.models.fine_tuning import diverged, load_state, mean_loss, train_scope
from fiftyone_ecif.models.libraries import library_of, load_encoder
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.samples.pairs import Pairs, check_collection, read_pairs, warn_skipped
from fiftyone_ecif.settings.fine_tuning import FitSettings
from fiftyone_ecif.settings.option import check_known, documented
from fiftyone_ecif.store.keys import PairKey, content_of, digest, image_key

logger = logging.getLogger(__name__)
_READ_AT_ONCE = 64  # images


@documented(FitSettings)
def fit_model(
    samples: Any,
    path: str | os.PathLike[str],
    caption_field: str = FitSettings.caption_field,
    model: str = FitSettings.model,
    pretrained: str | None = FitSettings.pretrained,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool | Callable[..., None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tunes a pretrained model on image-caption pairs and saves a checkpoint.

    Minimises the model's own contrastive loss over random batches, new ones
    each epoch, with AdamW; the learning rate warms up over the first tenth of
    the steps and then falls to zero along a cosine. The model stays in
    evaluation mode: no dropout, and batch norms keep their statistics.

    While it runs, its state is saved to ``{path}.resume`` every few seconds. A
    fit that was stopped goes on from there when it is run again with the same
    arguments, and ends where it would have ended; on the CPU to the last bit.
    Images that were moved meanwhile are known again by their bytes.

    The checkpoint is for ``pretrained=path`` with the same model name. Of a
    ``local-dir:…`` or ``hf-hub:…`` model, it belongs into a folder with a copy
    of the model's ``open_clip_config.json``.

    Args:
        samples: the training pairs, a FiftyOne dataset or view of images.
        path: the checkpoint to write; safetensors if it ends in that, else
            PyTorch's format. Adapters are written beside it, to
            ``{path}.adapters``.
        device (None): where to train; by default a GPU where there is one.
        overwrite (False): whether to replace the checkpoint, and a saved state
            of a fit with other arguments.
        progress (None): whether to show progress bars, or a callback.
        {options}

    Returns:
        ``checkpoint`` (the path), ``pairs``, ``steps`` and ``parameters``
        (counts), ``loss_before`` and ``loss_after`` (mean pair loss in nats,
        over the same random batches; it depends on their size), ``skipped``
        (``{sample id: reason}``) and ``attributed`` (names of the parameters
        that changed)

    Raises:
        EcifError: if an argument or the data is not usable, a file cannot be
            written, or the loss does not stay finite; there is no new
            checkpoint then
    """
    options |= {"caption_field": caption_field, "model": model, "pretrained": pretrained}
    settings = FitSettings.take(options)
    check_known(options, FitSettings)
    return follow(fit_steps(samples, path, settings, device=device, overwrite=overwrite), progress)


def fit_steps(
    samples: Any,
    path: str | os.PathLike[str],
    settings: FitSettings,
    *,
    device: str | None = None,
    overwrite: bool = False,
) -> Generator[Progress, None, dict[str, Any]]:
    """:func:`fit_model` as a generator of its progress, for a caller that shows it or stops it."""
    library_of(settings.model).check(settings.model, settings.pretrained)
    choice = parse_scope(settings.scope)
    choose_device(device)
    check_collection(samples, settings.caption_field)
    path = new_checkpoint(path, overwrite, settings.pretrained)

    yield Progress("Reading pairs", 0, 1)
    pairs = read_pairs(samples, settings.caption_field, settings.skip_failures)
    _check_count(pairs)
    yield Progress("Reading pairs", 1, 1)

    yield Progress("Loading the model", 0, 1)
    encoder = load_encoder(settings.model, settings.pretrained, device)
    scope = encoder.scope(choice, settings.seed)
    resume = path.with_name(f"{path.name}.resume")
    paths, captions = pairs.paths, pairs.captions
    quick = _fingerprint([image_key(path) for path in paths], captions, settings, encoder, scope)

    def by_content() -> str:
        return _fingerprint([content_of(path) or "" for path in paths], captions, settings, encoder, scope)

    state = load_state(resume, quick, by_content, overwrite)
    yield Progress("Loading the model", 1, 1)

    if state is None:
        unreadable = yield from _find_unreadable(encoder, pairs, settings.skip_failures)
    else:
        unreadable = state["unreadable"]
    pairs = pairs.without(unreadable)
    warn_skipped(pairs.skipped, "training")
    _check_count(pairs)

    partition = random_partition(len(pairs.ids), settings.batch_size, settings.seed)
    twins = twins_of(pairs) if settings.spare_equal else None
    batches = scope.entered(encoder.batches(choice, pairs.paths, pairs.captions, partition, twins=twins))
    if state is None:
        before = yield from mean_loss(scope, scope.start, batches)
        state = {
            "digest": quick,
            "content": by_content(),
            "unreadable": unreadable,
            "loss_before": before,
            "step": 0,
            "theta": scope.start,
            "optimiser": None,
        }
    theta = yield from train_scope(scope, batches, settings, state, resume)
    after = yield from mean_loss(scope, theta, batches)
    if not math.isfinite(after):
        raise diverged(settings)

    yield Progress("Saving", 0, 1)
    encoder.save(path, scope, theta)
    resume.unlink(missing_ok=True)
    yield Progress("Saving", 1, 1)
    return {
        "checkpoint": str(path),
        "pairs": len(pairs.ids),
        "steps": settings.epochs * len(partition),
        "parameters": len(theta),
        "loss_before": state["loss_before"],
        "loss_after": after,
        "skipped": pairs.skipped,
        "attributed": encoder.scope_names(choice),
    }


def _find_unreadable(
    encoder: DualEncoder, pairs: Pairs, skip_failures: bool
) -> Generator[Progress, None, dict[int, str]]:
    """Decodes every image once, so that none ends the training half-way.

    Returns:
        ``{index: reason}`` of those that cannot be read

    Raises:
        EcifError: for the first of them, unless it is skipped
    """
    images = encoder.images(pairs.paths)
    failures: dict[int, str] = {}
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), _READ_AT_ONCE):
            yield Progress("Reading images", start, len(images))
            rows = range(start, min(start + _READ_AT_ONCE, len(images)))
            failures |= {row: reason for row, _, reason in pool.map(images.__getitem__, rows) if reason is not None}
            if failures and not skip_failures:
                row, reason = next(iter(failures.items()))
                raise EcifError(
                    f"The image {pairs.paths[row]} cannot be read ({reason}). Mend it, or set skip_failures=True"
                )
    yield Progress("Reading images", len(images), len(images))
    return failures


def _check_count(pairs: Pairs) -> None:
    if len(pairs.ids) < 2:
        raise EcifError(f"Fine-tuning needs at least 2 readable pairs, there are {len(pairs.ids)}")


def _fingerprint(
    images: Sequence[str], captions: Sequence[str], settings: FitSettings, encoder: DualEncoder, scope: Scope
) -> str:
    """A digest of all that the result depends on: settings, pairs, weights and where the scope starts.

    Args:
        images: what the image of each pair is known by.
        captions: of the pairs.
        settings: of the fit.
        encoder: the model.
        scope: what is trained.
    """
    chosen = asdict(settings)
    if not settings.spare_equal:
        del chosen["spare_equal"]  # which earlier fits did not have
    keys = [PairKey(image, digest(caption)) for image, caption in zip(images, captions, strict=True)]
    return digest([json.dumps([chosen, encoder.fingerprint, keys]), scope.start.cpu().numpy().tobytes()])
