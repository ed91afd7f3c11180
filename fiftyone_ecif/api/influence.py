"""The public functions, shaped like FiftyOne Brain's: samples in, fields and a run out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fiftyone_ecif.api.embeddings import Arrays, take_arrays
from fiftyone_ecif.api.preparation import PreparedRun, describe, prepare
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.devices import say_device
from fiftyone_ecif.distributed import ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.scoring import Scores, score_pairs
from fiftyone_ecif.progress import Progress, partition
from fiftyone_ecif.runs.base import check_key, check_view
from fiftyone_ecif.runs.diagnostics import diagnose
from fiftyone_ecif.runs.influence import (
    InfluenceConfig,
    InfluenceRecord,
    InfluenceResults,
    influence_fields,
    slice_names,
)
from fiftyone_ecif.runs.writing import finish_writing, write_run
from fiftyone_ecif.samples.pairs import Pairs, check_collection
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.option import check_known, documented
from fiftyone_ecif.store.tables import Store

logger = logging.getLogger(__name__)


@documented(InfluenceSettings, JobSettings)
def compute_influence(
    samples: Any,
    caption_field: str = InfluenceSettings.caption_field,
    model: str = InfluenceSettings.model,
    pretrained: str | None = InfluenceSettings.pretrained,
    target: Any = None,
    *,
    brain_key: str = "ecif",
    progress: bool | Callable[..., None] | None = None,
    **options: Any,
) -> InfluenceResults:
    """Computes what training on each image-caption pair does to a target.

    The influence of a pair is the change of the target's mean loss if the pair
    had not been trained on, to first order, for a model trained with the
    contrastive loss (softmax, or sigmoid for a model with a ``logit_bias``):
    **positive = valuable, negative = harmful**, in nats. It is the sum of two
    parts, from the pair's own loss and from its serving as a negative of the
    others in its batch.

    Four fields are written: ``{brain_key}_influence``, its parts
    ``{brain_key}_positive`` and ``{brain_key}_negative``, and
    ``{brain_key}_rank`` (1 = most harmful). With more than one partition,
    ``{brain_key}_error`` is the standard error. Samples that could not be scored
    have no value.

    .. note::

        Runs of this method can be referenced later via brain key
        ``brain_key``: ``dataset.load_brain_results(brain_key)``,
        ``dataset.delete_brain_run(brain_key)``.

    What is expensive is cached (see ``fiftyone_ecif.store``): a second run with
    another target reads the features and encodes nothing that is unchanged.

    Args:
        samples: the training pairs, a FiftyOne dataset or view of images.
        target: the validation pairs towards which influence is measured, a
            dataset or view of images with the same caption field; or slices of
            them as a dict of name -> view. Each slice then gets a field
            ``{brain_key}_influence_on_{name}``, and ``{brain_key}_influence`` is
            their mean.
        brain_key ("ecif"): names the run and its fields.
        progress (None): whether to show progress bars, or a callback.
        {options}

    Returns:
        :class:`fiftyone_ecif.InfluenceResults`. Its ``diagnostics`` hold
        ``relative_gradient_norm`` (of the mean over a pair's, 0 at a stationary
        point), ``damping`` (what was added to the curvature to make it positive,
        relative to its mean eigenvalue), ``solve_residual``,
        ``solve_iterations`` and ``condition_number`` of the solves,
        ``smallest_norm`` (the shortest embedding over the median, before
        normalisation), ``training_loss`` and ``target_loss`` (means over pairs),
        ``cached_correlation`` (Pearson, of influence from the stored gradients
        with the scores), ``pairs``, ``target_pairs``, ``shared_pairs``,
        ``parameters`` (how many are in scope), ``attributed`` (their names),
        ``held_fixed`` (the names of all others), ``model_notes`` (what is to be
        known of the model, a sentence each) and ``computed_on`` (the device, and
        in which precision).

    Raises:
        EcifError: if an argument or the data is not usable, or the result
            could not be trusted; nothing on the samples is changed then
    """
    options |= {"caption_field": caption_field, "model": model, "pretrained": pretrained}
    arrays = take_arrays(options)
    settings, job = InfluenceSettings.take(options), JobSettings.take(options)
    check_known(options, InfluenceSettings, JobSettings)
    return follow(influence_steps(samples, target, settings, job, brain_key, arrays), progress)


def influence_steps(
    samples: Any,
    target: Any,
    settings: InfluenceSettings,
    job: JobSettings,
    brain_key: str = "ecif",
    arrays: Arrays | None = None,
) -> Generator[Progress, None, InfluenceResults]:
    """:func:`compute_influence` as a generator of its progress, for a caller that shows it or stops it."""
    if target is None or target == {}:
        raise EcifError("target is needed: a view of validation pairs, such as dataset.match_tags('val')")
    record = InfluenceRecord(slices=slice_names(target))
    processes = ProcessGroup.here()
    check_collection(samples, settings.caption_field)
    check_view(samples)
    finished = processes.gather(finish_writing(samples._dataset) if processes.first else [])
    overwrite = job.overwrite or brain_key in finished  # its job was killed, and is run again
    prepared = yield from prepare(
        samples,
        target,
        settings,
        job,
        arrays=arrays,
        check=lambda: check_key(samples._dataset, brain_key, overwrite, InfluenceConfig(settings, record)),
        processes=processes,
    )
    settings = prepared.settings
    options = settings.scoring
    home = store = prepared.store.inside(prepared.run_name(settings.seed))
    found: list[Scores] = []
    for number in range(settings.n_partitions):
        if number:  # in the first one's folder, so that they are deleted with it
            store = home.inside(f"partition-{number}")
        batches = prepared.batches(settings.seed + number)
        steps = score_pairs(store, prepared.scope, batches, prepared.targets, options, processes)
        scores = yield from partition(steps, number + 1, settings.n_partitions)
        _check_scores(prepared.pairs, scores)
        found.append(scores)
        options = replace(options, keep_gradients=False)  # one partition's are enough
    if samples._dataset.deleted:
        raise EcifError("The dataset was deleted while it was scored. Nothing was written")
    config = InfluenceConfig(
        settings,
        replace(record, target=describe(target, prepared), encoder=prepared.encoder.fingerprint, store=home.names),
    )
    for note in prepared.encoder.notes:
        logger.warning(note)
    for scores in found:
        for remark in diagnose(config, scores.diagnostics):
            if not remark.fine:
                logger.warning(remark.text)

    yield Progress("Writing fields", 0, 1)
    attributed = prepared.encoder.scope_names(prepared.choice)
    diagnostics = found[0].diagnostics | {
        "pairs": len(prepared.pairs.ids),
        "target_pairs": sum(len(target_pairs.ids) for target_pairs in prepared.target_pairs.values()),
        "shared_pairs": prepared.shared,
        "model_notes": list(prepared.encoder.notes),
        "computed_on": say_device(prepared.encoder.device),
        "attributed": attributed,
        "held_fixed": [name for name in prepared.encoder.parameter_names() if name not in set(attributed)],
    }
    if not processes.first:
        processes.wait()  # for the first one to write
        samples._dataset.reload()
        return samples._dataset.load_brain_results(brain_key)  # type: ignore[no-any-return]
    columns = _columns(found, config, prepared)
    results = InfluenceResults(
        samples,
        config,
        brain_key,
        prepared.pairs.ids,
        prepared.pairs.skipped,
        diagnostics,
        [pair.digest for pair in prepared.keys],
        {name: group.ids for name, group in prepared.target_pairs.items()},
        prepared.classes,
    )
    write_run(results, columns, overwrite)
    processes.wait()
    yield Progress("Writing fields", 1, 1)
    fields = ", ".join(influence_fields(brain_key, config))
    logger.info("Influence of %d pairs written to %s", len(prepared.pairs.ids), fields)
    return results


def _columns(found: Sequence[Scores], config: InfluenceConfig, prepared: PreparedRun) -> dict[str, np.ndarray]:
    """What is written, by the end of the field's name: averages over partitions, then over slices."""
    positive = np.mean([scores.positive for scores in found], axis=0)
    negative = np.mean([scores.negative for scores in found], axis=0)
    influence = (positive + negative).mean(0)
    rank = np.empty(len(influence), dtype=int)
    rank[np.argsort(influence, kind="stable")] = np.arange(1, len(influence) + 1)
    columns = {"influence": influence, "positive": positive.mean(0), "negative": negative.mean(0), "rank": rank}
    if len(found) > 1:
        each = [(scores.positive + scores.negative).mean(0) for scores in found]
        columns["error"] = np.std(each, axis=0, ddof=1) / len(found) ** 0.5
    for name, row in zip(config.slices, positive + negative, strict=False):
        columns[f"influence_on_{name}"] = row
    if config.scores:
        store = GradientStore(Store(*(config.store or ())), len(influence), config.solver, config.damping)
        effects = store.effects()
        if "relative_influence" in config.scores:
            columns["relative_influence"] = influence / effects.length
        if "self_influence" in config.scores:
            columns["self_influence"] = effects.own
        if "leave_one_out_loss" in config.scores:
            (losses,) = store.columns("loss")
            columns["leave_one_out_loss"] = losses + effects.own
    return columns


def _check_scores(pairs: Pairs, scores: Scores) -> None:
    bad = np.flatnonzero(~np.isfinite(scores.positive + scores.negative).all(0))
    if len(bad):
        raise EcifError(
            f"The scores of {len(bad)} samples are not finite; the first is {pairs.ids[bad[0]]}. "
            "Check its image and caption, or raise proximal"
        )
