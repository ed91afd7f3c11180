"""The public functions, shaped like FiftyOne Brain's: samples in, fields and a run out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator
from typing import Any

import fiftyone.utils.torch as fout
import numpy as np

from .encoder import Encoder, check_names, choose_device
from .errors import EcifError
from .features import PairKey, cached_features, pair_key
from .progress import Progress, follow
from .runs import InfluenceConfig, InfluenceResults, check_key, influence_fields, release_store
from .samples import Pairs, check_collection, read_pairs, warn_skipped, write_scores
from .scoring import Scores, score_pairs
from .store import Store

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 256
_FAR_FROM_STATIONARY = 0.01


def compute_influence(
    samples: Any,
    caption_field: str = "caption",
    model: str = "ViT-B-32",
    pretrained: str | None = None,
    target: Any = None,
    *,
    scope: str = "heads",
    brain_key: str = "ecif",
    fit: bool = False,
    proximal: float = 0.1,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | None = None,
    num_workers: int | None = None,
    skip_failures: bool = True,
    overwrite: bool = False,
    progress: bool | Callable[..., None] | None = None,
) -> InfluenceResults:
    """Computes what training on each image-caption pair does to a target.

    The influence of a pair is the change of the target's mean loss if the pair
    had not been trained on, to first order, for a model trained with the
    contrastive (softmax) loss: **positive = valuable, negative = harmful**, in
    nats. It is the sum of two parts, from the pair's own loss and from its
    serving as a negative of the others in its batch.

    Four fields are written: ``{brain_key}_influence``, its parts
    ``{brain_key}_positive`` and ``{brain_key}_negative``, and
    ``{brain_key}_rank`` (1 = most harmful). Samples that could not be scored
    have no value.

    .. note::

        Runs of this method can be referenced later via brain key
        ``brain_key``: ``dataset.load_brain_results(brain_key)``,
        ``dataset.delete_brain_run(brain_key)``.

    What is expensive is cached (see ``fiftyone_ecif.store``): a second run with
    another target reads the features and encodes nothing that is unchanged.

    Args:
        samples: the training pairs, a FiftyOne dataset or view of images.
        caption_field ("caption"): the string field that holds the captions.
        model ("ViT-B-32"): the name of an open_clip model.
        pretrained (None): one of its pretrained tags, or the path of a
            checkpoint. Needed unless the model name brings its own weights
            (``local-dir:…``, ``hf-hub:…``).
        target: the validation pairs towards which influence is measured, a
            dataset or view of images with the same caption field.
        scope ("heads"): the parameters to attribute: both final projections.
        brain_key ("ecif"): names the run and its fields.
        fit (False): whether to bring the scope to a stationary point of the
            pairs' loss first, in memory, starting from the loaded weights.
            Influence functions presume one.
        proximal (0.1): strength of the pull to the loaded weights, in the
            objective and as the damping of its Hessian.
        batch_size (None): pairs that compete in one softmax; by default 256,
            or all pairs if there are fewer. Scores depend on it.
        seed (0): which pairs share a batch.
        device (None): where images and captions are encoded; by default a GPU
            where there is one. All that follows is float64 on the CPU.
        num_workers (None): processes that load images.
        skip_failures (True): whether to skip samples without a caption or with
            an unreadable image, with a warning, rather than raise.
        overwrite (False): whether to replace a run of the same key.
        progress (None): whether to show progress bars, or a callback.

    Returns:
        :class:`fiftyone_ecif.InfluenceResults`. Its ``diagnostics`` hold
        ``relative_gradient_norm`` (of the mean over a pair's, 0 at a stationary
        point),
        ``damping`` (what had to be added to an indefinite Hessian, else 0),
        ``solve_residual``, ``solve_iterations`` and ``condition_number`` of the
        solve, ``smallest_norm`` (the shortest embedding over the median,
        before normalisation), ``training_loss`` and ``target_loss`` (mean pair
        losses in nats), ``pairs``, ``target_pairs``, ``shared_pairs``,
        ``parameters`` and ``attributed`` (what is in scope).

    Raises:
        EcifError: if an argument or the data is not usable, or the result
            could not be trusted; nothing on the samples is changed then
    """
    config = InfluenceConfig(
        caption_field=caption_field,
        model=model,
        pretrained=pretrained,
        scope=scope,
        fit=fit,
        proximal=proximal,
        batch_size=batch_size,
        seed=seed,
    )
    work = influence_steps(
        samples,
        target,
        config,
        brain_key=brain_key,
        device=device,
        num_workers=num_workers,
        skip_failures=skip_failures,
        overwrite=overwrite,
    )
    return follow(work, progress)


def influence_steps(
    samples: Any,
    target: Any,
    config: InfluenceConfig,
    *,
    brain_key: str = "ecif",
    device: str | None = None,
    num_workers: int | None = None,
    skip_failures: bool = True,
    overwrite: bool = False,
) -> Generator[Progress, None, InfluenceResults]:
    """:func:`compute_influence` as a generator of its progress, for a caller that shows it or stops it."""
    choose_device(device)
    check_names(config.model, config.pretrained)
    if target is None:
        raise EcifError("target is needed: a view of validation pairs, such as dataset.match_tags('val')")
    check_collection(samples, config.caption_field)
    dataset = samples._dataset
    check_key(dataset, brain_key, overwrite)

    yield Progress("Reading pairs", 0, 1)
    pairs = read_pairs(samples, config.caption_field, skip_failures)
    try:
        aims = read_pairs(target, config.caption_field, skip_failures)
    except EcifError as error:
        raise EcifError(f"The target cannot be used. {error}") from error
    _check_sizes(pairs, aims, config.batch_size)
    shared = _warn_shared(pairs, aims)
    Store(str(dataset._doc.id)).ensure_writable()
    yield Progress("Reading pairs", 1, 1)

    yield Progress("Loading the model", 0, 1)
    encoder = Encoder(config.model, config.pretrained, device)
    scope = encoder.scope()
    store = Store(str(dataset._doc.id), encoder.fingerprint)
    yield Progress("Loading the model", 1, 1)

    paths, captions = pairs.paths + aims.paths, pairs.captions + aims.captions
    keys = [pair_key(path, caption) for path, caption in zip(paths, captions, strict=True)]
    images, texts, failures = yield from cached_features(
        store,
        encoder,
        keys,
        paths,
        captions,
        fout.recommend_num_workers() if num_workers is None else num_workers,
        skip_failures,
    )
    pairs, aims, rows, aim_rows = _drop_failures(pairs, aims, failures)
    warn_skipped(pairs.skipped, "training")
    warn_skipped(aims.skipped, "target")
    _check_sizes(pairs, aims, config.batch_size)

    config.batch_size = config.batch_size or min(DEFAULT_BATCH_SIZE, len(pairs.ids))
    config.target = _describe(target)
    config.encoder = encoder.fingerprint
    run_store = store.inside("run-" + _run_key([keys[row] for row in rows], config))
    config.store = run_store.names
    scores = yield from score_pairs(
        run_store,
        scope,
        (images[rows], texts[rows]),
        (images[aim_rows], texts[aim_rows]),
        fit=config.fit,
        proximal=config.proximal,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    _check_scores(pairs, scores)

    yield Progress("Writing fields", 0, 1)
    diagnostics = scores.diagnostics | {
        "pairs": len(pairs.ids),
        "target_pairs": len(aims.ids),
        "shared_pairs": shared,
        "attributed": encoder.head_parameters(),
    }
    results = _write_run(samples, brain_key, config, pairs, scores, diagnostics)
    yield Progress("Writing fields", 1, 1)
    logger.info("Influence of %d pairs written to %s", len(pairs.ids), ", ".join(influence_fields(brain_key)))
    return results


def _check_sizes(pairs: Pairs, aims: Pairs, batch_size: int | None) -> None:
    if len(pairs.ids) < 2:
        raise EcifError(f"Influence needs at least 2 training pairs, there are {len(pairs.ids)}")
    if len(aims.ids) < 2:
        raise EcifError(f"The target needs at least 2 pairs, it has {len(aims.ids)}")
    if batch_size is not None and batch_size > len(pairs.ids):
        raise EcifError(
            f"batch_size={batch_size} is larger than the {len(pairs.ids)} training pairs. "
            f"Use at most {len(pairs.ids)}, or leave it out"
        )


def _drop_failures(pairs: Pairs, aims: Pairs, failures: dict[int, str]) -> tuple[Pairs, Pairs, np.ndarray, np.ndarray]:
    """Takes the pairs whose image could not be read out of both, and says which feature rows are left."""
    count = len(pairs.ids)
    good = np.array([index not in failures for index in range(count + len(aims.ids))])
    pairs = pairs.without({index: reason for index, reason in failures.items() if index < count})
    aims = aims.without({index - count: reason for index, reason in failures.items() if index >= count})
    return pairs, aims, np.flatnonzero(good[:count]), count + np.flatnonzero(good[count:])


def _warn_shared(pairs: Pairs, aims: Pairs) -> int:
    shared = len(set(pairs.ids) & set(aims.ids))
    if shared:
        logger.warning(
            "%d of the %d target pairs are also scored as training pairs: their influence on themselves is part of "
            "their score. Leave them out of one of the two for a held-out target",
            shared,
            len(aims.ids),
        )
    return shared


def _run_key(keys: list[PairKey], config: InfluenceConfig) -> str:
    """A digest of all that the fitted parameters and the gradients depend on, beside the encoder."""
    settings = [config.scope, config.fit, config.proximal, config.batch_size, config.seed]
    return hashlib.blake2b(json.dumps([keys, settings]).encode(), digest_size=16).hexdigest()


def _check_scores(pairs: Pairs, scores: Scores) -> None:
    bad = np.flatnonzero(~np.isfinite(scores.positive + scores.negative))
    if len(bad):
        raise EcifError(
            f"The scores of {len(bad)} samples are not finite; the first is {pairs.ids[bad[0]]}. "
            "Check its image and caption, or raise proximal"
        )
    found = scores.diagnostics
    if found["relative_gradient_norm"] > _FAR_FROM_STATIONARY:
        logger.warning(
            "The model is not at a stationary point of these pairs' loss (relative gradient norm %.2g, 0 is ideal), so "
            "influence is a rougher estimate. fit=True brings it there",
            found["relative_gradient_norm"],
        )
    if found["damping"]:
        logger.warning(
            "The Hessian has negative curvature here, so it was damped by %.3g and influence is a rougher estimate. "
            "fit=True avoids that",
            found["damping"],
        )


def _describe(target: Any) -> dict[str, Any]:
    """The target for the record: its dataset, size, and the stages of its view."""
    view = target.view()
    return {"dataset": target._dataset.name, "samples": len(target), "view": view.name, "stages": str(view)[:2000]}


def _write_run(
    samples: Any,
    brain_key: str,
    config: InfluenceConfig,
    pairs: Pairs,
    scores: Scores,
    diagnostics: dict[str, Any],
) -> InfluenceResults:
    dataset = samples._dataset
    old_store = dataset.get_brain_info(brain_key).config.store if dataset.has_brain_run(brain_key) else None
    fields = influence_fields(brain_key)
    influence = scores.positive + scores.negative
    rank = np.empty(len(influence), dtype=int)
    rank[np.argsort(influence, kind="stable")] = np.arange(1, len(influence) + 1)
    columns = (influence, scores.positive, scores.negative, rank)
    values = {
        field: dict(zip(pairs.ids, column.tolist(), strict=True)) for field, column in zip(fields, columns, strict=True)
    }
    run = config.build()
    run.register_run(samples, brain_key, cleanup=False)
    write_scores(dataset, values, fields)
    results = InfluenceResults(samples, config, brain_key, pairs.ids, pairs.skipped, diagnostics, backend=run)
    run.save_run_results(samples, brain_key, results)
    if old_store not in (None, config.store):
        release_store(dataset, "", old_store)
    return results
