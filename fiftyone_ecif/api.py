"""The public functions, shaped like FiftyOne Brain's: samples in, fields and a run out."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Generator
from typing import Any

import fiftyone.utils.torch as fout
import numpy as np
import torch

from .curvature import Solution, conjugate_gradient
from .encoder import Encoder, check_names, choose_device
from .errors import EcifError
from .features import cached_features, caption_key, image_key
from .fitting import minimise
from .gradients import principal_projections, removal_gradients
from .heads import FeatureBatches, HeadScope
from .influence import batch_influence
from .objective import ContrastiveLoss, random_partition
from .progress import Progress, follow
from .runs import InfluenceConfig, InfluenceResults, influence_fields, release_store
from .samples import Pairs, check_collection, failure, read_pairs, warn_skipped, write_scores
from .store import Store

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 256
_FAR_FROM_STATIONARY = 0.1
_COLLAPSED = 1e-3
_BATCHES_A_PART = 8


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

    Three float fields are written: ``{brain_key}_influence``, ``…_positive``
    and ``…_negative``. Samples that could not be scored have no value.

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
        device (None): by default a GPU where there is one.
        num_workers (None): processes that load images.
        skip_failures (True): whether to skip samples without a caption or with
            an unreadable image, with a warning, rather than raise.
        overwrite (False): whether to replace a run of the same key.
        progress (None): whether to show progress bars, or a callback.

    Returns:
        :class:`fiftyone_ecif.InfluenceResults`. Its ``diagnostics`` hold
        ``relative_gradient_norm`` (0 at a stationary point, 1 far from one),
        ``solve_residual``, ``solve_iterations`` and ``condition_number`` of the
        solve, ``smallest_norm`` (the shortest embedding over the median,
        before normalisation), ``training_loss`` and ``target_loss`` (mean pair
        losses in nats), ``pairs``, ``target_pairs``, ``shared_pairs``,
        ``parameters`` and ``attributed`` (what is in scope).

    Raises:
        EcifError: if an argument or the data is not usable, or the result
            could not be trusted; nothing on the samples is changed then
    """
    work = influence_steps(
        samples,
        caption_field,
        model,
        pretrained,
        target,
        scope=scope,
        brain_key=brain_key,
        fit=fit,
        proximal=proximal,
        batch_size=batch_size,
        seed=seed,
        device=device,
        num_workers=num_workers,
        skip_failures=skip_failures,
        overwrite=overwrite,
    )
    return follow(work, progress)


def influence_steps(
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
) -> Generator[Progress, None, InfluenceResults]:
    """:func:`compute_influence` as a generator of its progress, for a caller that shows it or stops it."""
    _check_options(scope, proximal, batch_size)
    choose_device(device)
    check_names(model, pretrained)
    if target is None:
        raise EcifError("target is needed: a view of validation pairs, such as dataset.match_tags('val')")
    check_collection(samples, caption_field)
    dataset = samples._dataset
    check_key(dataset, brain_key, overwrite)

    yield Progress("Reading pairs", 0, 1)
    pairs = read_pairs(samples, caption_field, skip_failures)
    try:
        aims = read_pairs(target, caption_field, skip_failures)
    except EcifError as error:
        raise EcifError(f"The target cannot be used. {error}") from error
    _check_sizes(pairs, aims, batch_size)
    Store(str(dataset._doc.id)).ensure_writable()
    yield Progress("Reading pairs", 1, 1)

    yield Progress("Loading the model", 0, 1)
    encoder = Encoder(model, pretrained, device)
    heads = encoder.scope()
    store = Store(str(dataset._doc.id), encoder.fingerprint)
    yield Progress("Loading the model", 1, 1)

    workers = fout.recommend_num_workers() if num_workers is None else num_workers
    images, texts, failures = yield from cached_features(
        store, encoder, pairs.paths + aims.paths, pairs.captions + aims.captions, workers
    )
    if failures and not skip_failures:
        index, reason = next(iter(failures.items()))
        raise failure((pairs.ids + aims.ids)[index], f"image: {reason}")
    pairs, aims, rows, aim_rows = _drop_failures(pairs, aims, failures)
    warn_skipped(pairs.skipped, "training")
    warn_skipped(aims.skipped, "target")
    _check_sizes(pairs, aims, batch_size)
    shared = len(set(pairs.ids) & set(aims.ids))
    if shared:
        logger.warning(
            "%d of the %d target pairs are also scored as training pairs: their influence on themselves is part of "
            "their score. Leave them out of one of the two for a held-out target",
            shared,
            len(aims.ids),
        )

    batch_size = batch_size or min(DEFAULT_BATCH_SIZE, len(pairs.ids))
    partition = random_partition(len(pairs.ids), batch_size, seed)
    batches = FeatureBatches(images[rows], texts[rows], partition)
    objective = ContrastiveLoss(heads, batches, len(pairs.ids), proximal)
    run_store = store.inside("run-" + _run_key(pairs, scope, fit, proximal, batch_size, seed))

    theta, relative = yield from _stationary_point(run_store, objective, fit)
    if relative > _FAR_FROM_STATIONARY:
        logger.warning(
            "The model is not at a stationary point of these pairs' loss (relative gradient norm %.2g, 0 is ideal), so "
            "influence is a rougher estimate. fit=True brings it there",
            relative,
        )
    smallest = _smallest_norm(heads, theta, batches)

    aim_partition = random_partition(len(aims.ids), batch_size, seed)
    aim = ContrastiveLoss(heads, FeatureBatches(images[aim_rows], texts[aim_rows], aim_partition), len(aims.ids))
    gradient, target_loss = aim.gradient_and_value(theta)
    solution = yield from _solve(objective, theta, gradient)

    yield from _store_gradients(run_store, objective, theta, pairs)

    positive, negative = np.empty(len(pairs.ids)), np.empty(len(pairs.ids))
    for done, (indices, batch) in enumerate(zip(partition, batches, strict=True), start=1):
        parts = batch_influence(heads, theta, batch, solution.vector, len(pairs.ids))
        positive[indices], negative[indices] = (part.numpy() for part in parts)
        yield Progress("Scoring", done, len(partition))
    if not (np.isfinite(positive).all() and np.isfinite(negative).all()):
        bad = pairs.ids[int(np.flatnonzero(~np.isfinite(positive + negative))[0])]
        raise EcifError(f"The score of sample {bad} is not finite. Check its image and caption, or raise proximal")

    config = InfluenceConfig(
        caption_field=caption_field,
        model=model,
        pretrained=pretrained,
        encoder=encoder.fingerprint,
        scope=scope,
        fit=fit,
        proximal=proximal,
        batch_size=batch_size,
        seed=seed,
        target=_describe(target),
        store=run_store.names,
    )
    diagnostics = {
        "pairs": len(pairs.ids),
        "target_pairs": len(aims.ids),
        "shared_pairs": shared,
        "parameters": len(theta),
        "attributed": [name for head in encoder.heads.values() for name in (head.weight, head.bias) if name],
        "relative_gradient_norm": relative,
        "solve_residual": solution.residual,
        "solve_iterations": solution.iterations,
        "condition_number": solution.condition_number,
        "smallest_norm": smallest,
        "training_loss": (objective.gradient_and_value(theta)[1]).item(),
        "target_loss": target_loss.item(),
    }
    yield Progress("Writing fields", 0, 1)
    results = _write_run(samples, brain_key, config, pairs, positive, negative, diagnostics)
    yield Progress("Writing fields", 1, 1)
    logger.info("Influence of %d pairs written to %s", len(pairs.ids), ", ".join(influence_fields(brain_key)))
    return results


def check_key(dataset: Any, brain_key: str, overwrite: bool) -> None:
    """Checks that a run may be written under a key.

    Raises:
        EcifError: if the key is no identifier, is taken, or one of the fields
            that it names is there and belongs to no run
    """
    if not isinstance(brain_key, str) or not brain_key.isidentifier() or brain_key.startswith("_"):
        raise EcifError(f"brain_key={brain_key!r} is not a name. Use letters, digits and _, such as 'ecif'")
    if dataset.has_brain_run(brain_key):
        if not isinstance(dataset.get_brain_info(brain_key).config, InfluenceConfig):
            raise EcifError(f"The brain key {brain_key!r} belongs to another kind of run. Choose another key")
        if not overwrite:
            raise EcifError(
                f"The brain key {brain_key!r} is taken. Choose another one, or set overwrite=True to replace that run"
            )
        return
    for field in influence_fields(brain_key):
        if dataset.has_sample_field(field):
            raise EcifError(f"There is a field {field!r} already, which no run wrote. Choose another brain_key")


def _check_options(scope: str, proximal: float, batch_size: int | None) -> None:
    if scope != "heads":
        raise EcifError(f"scope={scope!r} is not available. Use 'heads'")
    if not (isinstance(proximal, int | float) and math.isfinite(proximal) and proximal > 0):
        raise EcifError(f"proximal={proximal!r} must be a positive number, such as 0.1")
    if batch_size is not None and batch_size < 2:
        raise EcifError(f"batch_size={batch_size} leaves no negatives. Use at least 2")


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


def _run_key(pairs: Pairs, *settings: Any) -> str:
    keys = [[image_key(path), caption_key(caption)] for path, caption in zip(pairs.paths, pairs.captions, strict=True)]
    return hashlib.blake2b(json.dumps([keys, *settings]).encode(), digest_size=16).hexdigest()


def _stationary_point(
    store: Store, objective: ContrastiveLoss, fit: bool
) -> Generator[Progress, None, tuple[torch.Tensor, float]]:
    """The parameters to score at, and their relative gradient norm; fitted once and kept."""
    table = store.table("parameters")
    if table.parts():
        found = table.read("0", "theta", "relative_gradient_norm")
        return torch.from_numpy(found["theta"][0]), float(found["relative_gradient_norm"][0])
    theta = objective.scope.start
    if fit:
        tolerance = 1e-5
        for theta, relative in minimise(objective, tolerance):
            yield Progress("Fitting the heads", _percent(relative, tolerance), 100)
    else:
        relative = (objective.gradient_and_value(theta)[0].norm() / objective.gradient_scale(theta)).item()
    table.write("0", {"theta": theta.numpy()[None], "relative_gradient_norm": np.array([relative])})
    return theta, relative


def _smallest_norm(heads: HeadScope, theta: torch.Tensor, batches: FeatureBatches) -> float:
    """The shortest embedding over the median, before normalisation; the smaller of both towers."""
    norms = [
        torch.stack([side @ head for side, head in zip(batch, heads.split(theta), strict=True)]).norm(dim=2)
        for batch in batches
    ]
    ratios = torch.cat(norms, dim=1)
    smallest = (ratios.min(1).values / ratios.median(1).values).min().item()
    if not smallest >= _COLLAPSED:
        raise EcifError(
            f"An embedding has collapsed: its length before normalisation is {smallest:.1e} of the median, and no "
            "score can be trusted then. Raise proximal, or use weights that were not overfitted"
        )
    return smallest


def _solve(
    objective: ContrastiveLoss, theta: torch.Tensor, right: torch.Tensor
) -> Generator[Progress, None, Solution]:
    tolerance = 1e-6
    for solution in conjugate_gradient(lambda v: objective.hessian_product(theta, v), right, tolerance):
        yield Progress("Solving", _percent(solution.residual, tolerance), 100)
    return solution


def _percent(value: float, goal: float) -> int:
    """How far a value that falls geometrically from 1 is on its way to the goal."""
    return int(100 * min(max(math.log(max(value, goal)) / math.log(goal), 0.0), 1.0))


def _store_gradients(
    store: Store, objective: ContrastiveLoss, theta: torch.Tensor, pairs: Pairs
) -> Generator[Progress, None, None]:
    """Writes the partition and the projected gradients of the pairs, as far as they are not there."""
    table, batches, scope = store.table("gradients"), objective.batches, objective.scope
    assert isinstance(scope, HeadScope) and isinstance(batches, FeatureBatches)
    known = set(table.parts())
    projections = None
    for start in range(0, len(batches), _BATCHES_A_PART):
        part, numbers = f"{start:09d}", range(start, min(start + _BATCHES_A_PART, len(batches)))
        if part not in known:
            projections = projections or principal_projections(scope, theta, batches.images, batches.texts)
            rows = []
            for number in numbers:
                batch, indices = batches[number], batches.partition[number]
                positive, negative = removal_gradients(scope, theta, batch, projections)
                cosine = scope.similarity(theta, batch).diagonal() / scope.scale
                rows.append((indices, torch.full_like(indices, number), cosine, positive.float(), negative.float()))
            columns = ("row", "batch", "cosine", "positive", "negative")
            table.write(part, {name: torch.cat(v).numpy() for name, v in zip(columns, zip(*rows, strict=True), strict=True)})
        yield Progress("Computing gradients", numbers[-1] + 1, len(batches))


def _describe(target: Any) -> dict[str, Any]:
    """The target for the record: its dataset, size, and the stages of its view."""
    view = target.view()
    return {"dataset": target._dataset.name, "samples": len(target), "view": view.name, "stages": str(view)[:2000]}


def _write_run(
    samples: Any,
    brain_key: str,
    config: InfluenceConfig,
    pairs: Pairs,
    positive: np.ndarray,
    negative: np.ndarray,
    diagnostics: dict[str, Any],
) -> InfluenceResults:
    dataset = samples._dataset
    old_store = dataset.get_brain_info(brain_key).config.store if dataset.has_brain_run(brain_key) else None
    fields = influence_fields(brain_key)
    columns = (positive + negative, positive, negative)
    scores = {
        field: dict(zip(pairs.ids, column.tolist(), strict=True)) for field, column in zip(fields, columns, strict=True)
    }
    run = config.build()
    run.register_run(samples, brain_key, cleanup=False)
    write_scores(dataset, scores, fields)
    results = InfluenceResults(samples, config, brain_key, pairs.ids, pairs.skipped, diagnostics, backend=run)
    run.save_run_results(samples, brain_key, results)
    if old_store not in (None, config.store):
        release_store(dataset, "", old_store)
    return results
