"""Finding pairs whose caption does not belong to the image: samples in, fields and a run out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from fiftyone_ecif.api.embeddings import Arrays, take_arrays
from fiftyone_ecif.api.preparation import PreparedRun, prepare
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.devices import say_device
from fiftyone_ecif.distributed import ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.fitting import stationary_point
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.projected_gradients import keep_gradients
from fiftyone_ecif.influence.scoring import score_pairs
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.misalignment.detection import run_detectors
from fiftyone_ecif.misalignment.detectors import DETECTORS, Calibrated
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.evidence import KINDS, Evidence
from fiftyone_ecif.misalignment.judgement import TRUSTED
from fiftyone_ecif.misalignment.ranks import ranked
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.runs.base import check_key, check_view, check_writable
from fiftyone_ecif.runs.diagnostics import judge_fit
from fiftyone_ecif.runs.misalignment import MisalignmentConfig, MisalignmentRecord, MisalignmentResults
from fiftyone_ecif.runs.writing import finish_writing, write_run
from fiftyone_ecif.samples.pairs import check_collection, every_sample
from fiftyone_ecif.samples.review_tags import check_score_tag
from fiftyone_ecif.samples.selection import tag_by_influence
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings
from fiftyone_ecif.settings.option import check_known, documented
from fiftyone_ecif.store.keys import digest
from fiftyone_ecif.store.tables import Store

logger = logging.getLogger(__name__)


@documented(MisalignmentSettings, JobSettings)
def compute_misalignment(
    samples: Any,
    caption_field: str = MisalignmentSettings.caption_field,
    model: str = MisalignmentSettings.model,
    pretrained: str | None = MisalignmentSettings.pretrained,
    *,
    brain_key: str = "audit",
    target: Any = None,
    tag: str | None = None,
    share: float | None = None,
    threshold: float | None = None,
    progress: bool | Callable[..., None] | None = None,
    **options: Any,
) -> MisalignmentResults:
    """Finds image-caption pairs that do not belong together, without labels.

    Three fields are written: ``{brain_key}_misalignment``, the probability that
    caption and image do not belong together, ``{brain_key}_reason``, what speaks
    against the pair, and ``{brain_key}_duplicate``, whether another sample has
    the same image. Samples that could not be scored have no value.

    The default detector learns what a wrong caption looks like from decoys, pairs
    with the caption of another, and so tells how far it can be trusted on these
    pairs: see :mod:`fiftyone_ecif.misalignment.judgement`. With any other detector
    ``{brain_key}_misalignment`` is the share of the pairs that are less suspicious
    by it, a rank.

    .. note::

        Runs of this method can be referenced later via brain key
        ``brain_key``: ``dataset.load_brain_results(brain_key)``,
        ``dataset.delete_brain_run(brain_key)``.

    Args:
        samples: the pairs, a FiftyOne dataset or view of images.
        brain_key ("audit"): names the run and its fields.
        target (None): validation pairs, a dataset or view of images with the
            same caption field; for ``detector="global_influence"``.
        tag (None): tag to give the most suspicious pairs.
        share (None): which share of the pairs to tag: the expected noise rate;
            by default the estimated one, where it can be told.
        threshold (None): tag the pairs above this score instead.
        progress (None): whether to show progress bars, or a callback.
        {options}

    Returns:
        :class:`fiftyone_ecif.MisalignmentResults`. Its ``diagnostics``
        hold ``noise_rate`` (estimated share of misaligned pairs and its 95 %
        interval, see :mod:`fiftyone_ecif.misalignment.noise_rate`), ``power`` (AUROC
        at which decoys are found, by kind), ``seen`` (whether the loaded weights
        know these pairs), ``signals`` (all that were measured), ``weights`` (of
        those that were used), ``detectors`` (those that
        ran), ``duplicates`` (pairs that share their image, their caption or both
        with another), ``tagged``, ``pairs``, ``relative_gradient_norm``
        (for a detector of influence), ``model_notes`` (what is to be known of the model, a sentence each) and
        ``computed_on`` (the device, and in which precision).

    Raises:
        EcifError: if an argument or the data is not usable; nothing on the
            samples is changed then
    """
    options |= {"caption_field": caption_field, "model": model, "pretrained": pretrained}
    arrays = take_arrays(options)
    settings, job = MisalignmentSettings.take(options), JobSettings.take(options)
    check_known(options, MisalignmentSettings, JobSettings)
    work = misalignment_steps(
        samples, settings, job, brain_key, target=target, tag=tag, share=share, threshold=threshold, arrays=arrays
    )
    return follow(work, progress)


def misalignment_steps(
    samples: Any,
    settings: MisalignmentSettings,
    job: JobSettings,
    brain_key: str = "audit",
    *,
    target: Any = None,
    tag: str | None = None,
    share: float | None = None,
    threshold: float | None = None,
    arrays: Arrays | None = None,
) -> Generator[Progress, None, MisalignmentResults]:
    """:func:`compute_misalignment` as a generator of its progress, for a caller that shows it or stops it."""
    _check_tag(tag, share, threshold)
    detector, processes = DETECTORS[settings.detector], ProcessGroup.here()
    if (target is not None) != detector.needs_target:
        needing = " or ".join(f"detector={name!r}" for name, one in DETECTORS.items() if one.needs_target)
        raise EcifError(f"target, a view of validation pairs, and {needing} belong together")
    check_collection(samples, settings.caption_field)
    check_view(samples)
    check_writable(samples._dataset, ["tags"] * bool(tag))
    finished = processes.gather(finish_writing(samples._dataset) if processes.first else [])
    overwrite = job.overwrite or brain_key in finished  # its job was killed, and is run again
    prepared = yield from prepare(
        samples,
        {} if target is None else target,
        settings.influence,
        job,
        arrays=arrays,
        check=lambda: check_key(samples._dataset, brain_key, overwrite, MisalignmentConfig(settings)),
        processes=processes,
    )
    store = prepared.store.inside(prepared.run_name(settings.seed))
    settings = replace(settings, batch_size=prepared.batch_size)
    inputs, norm = yield from _open_inputs(prepared, settings, store, processes)
    findings = yield from run_detectors(inputs, [Calibrated.name, settings.detector])
    evidence, judgement = findings.evidence, findings.judgement
    assert evidence is not None
    assert judgement is not None
    if not processes.first:
        processes.wait()  # for the first one to write
        samples._dataset.reload()
        return samples._dataset.load_brain_results(brain_key)  # type: ignore[no-any-return]
    table = _write_evidence(store, settings, evidence)

    yield Progress("Writing fields", 0, 1)
    diagnostics = {
        "pairs": len(prepared.pairs.ids),
        "noise_rate": list(judgement.rate),
        "power": judgement.power,
        "seen": evidence.seen,
        "signals": list(evidence.names),
        "weights": judgement.weights,
        "detectors": sorted(findings.scores),
        "duplicates": inputs.duplicates.summary(),
        **({} if norm is None else {"relative_gradient_norm": norm}),
        "model_notes": list(prepared.encoder.notes),
        "computed_on": say_device(prepared.encoder.device),
    }
    default = settings.detector == Calibrated.name
    columns: dict[str, Any] = {
        "misalignment": judgement.probability if default else ranked(findings.scores[settings.detector]),
        "reason": judgement.reasons,
        "duplicate": inputs.duplicates.kinds(),
    }
    record = MisalignmentRecord(prepared.encoder.fingerprint, store.names, table=table)
    results = MisalignmentResults(
        samples,
        MisalignmentConfig(settings, record),
        brain_key,
        prepared.pairs.ids,
        prepared.pairs.skipped,
        diagnostics,
        [pair.digest for pair in prepared.keys],
    )
    write_run(results, columns, overwrite)
    if tag:
        limited = judgement.rate.told or share is not None or threshold is not None
        if not limited:
            logger.warning("Nothing was tagged. %s. Give share or threshold", judgement.rate)
        diagnostics["tagged"] = tag_misaligned(results, tag, share, threshold) if limited else 0
        results.save()
    processes.wait()
    yield Progress("Writing fields", 1, 1)
    poor = [] if norm is None else [judge_fit(results.config, diagnostics)]
    for remark in [*prepared.encoder.notes, *(each.text for each in poor if settings.fit and not each.fine)]:
        logger.warning(remark)
    logger.info(
        "Misalignment of %d pairs written to %s_misalignment. %s", len(prepared.pairs.ids), brain_key, judgement.rate
    )
    logger.info("Of known wrong captions: %s", ", ".join(f"{kind} {judgement.power[kind]:.2f}" for kind in KINDS))
    if judgement.power["random"] < TRUSTED:
        logger.warning(
            "This model hardly tells wrong captions of these pairs from right ones: do not rely on the score"
        )
    return results


def tag_misaligned(
    results: MisalignmentResults, tag: str, share: float | None = None, threshold: float | None = None
) -> int:
    """Tags the most suspicious pairs of a run, by default as many as its estimated noise rate says.

    Where that cannot be told, ``share`` or ``threshold`` must be given.

    Args:
        results: of :func:`compute_misalignment`.
        tag: the tag.
        share (None): which share of the scored pairs.
        threshold (None): all above this score instead.

    Returns:
        how many were tagged

    Raises:
        EcifError: if a limit is out of its range, or none is given and the rate cannot be told
    """
    _check_tag(tag, share, threshold)
    if share is None and threshold is None:
        rate = results.noise_rate
        if not rate.told:
            raise EcifError(f"Nothing was tagged: {rate}. Give share or threshold")
        share = rate.rate
        if share == 0:
            return 0
    scored = every_sample(results.samples._dataset).select(results.ids)
    field = f"{results.key}_misalignment"
    return len(tag_by_influence(scored, field, tag, "suspicious", share=share, threshold=threshold))


def _check_tag(tag: str | None, share: float | None, threshold: float | None) -> None:
    check_score_tag(tag)
    if share is not None and threshold is not None:
        raise EcifError(f"Give share or threshold, not both (share={share}, threshold={threshold})")
    if tag is None and (share is not None or threshold is not None):
        raise EcifError("share and threshold say what to tag: give tag too")
    for name, value in (("share", share), ("threshold", threshold)):
        if value is not None and not 0 <= value <= 1:
            raise EcifError(f"{name}={value} must be in [0, 1]")
    if share == 0:
        raise EcifError("share=0 would tag nothing. Use a share in (0, 1], or leave tag out")


def _open_inputs(
    prepared: PreparedRun, settings: MisalignmentSettings, store: Store, processes: ProcessGroup
) -> Generator[Progress, None, tuple[DetectorInputs, float | None]]:
    """The pairs and the model as detectors take them, and how far from a minimum it is where that matters."""
    batches = prepared.batches(settings.seed)
    objective = ContrastiveLoss(prepared.scope, batches, len(prepared.pairs.ids), settings.proximal, processes)
    kept = GradientStore(store, objective.pairs)
    duplicates = find_duplicates(prepared.features[0][:], prepared.pairs.captions, prepared.encoder.device)
    gradients = influence = None
    theta, norm = prepared.scope.start, None
    if DETECTORS[settings.detector].needs_training:
        theta, norm = yield from stationary_point(kept, objective, settings.fit, must_converge=False)
        method = ScoringOptions(fit=settings.fit, proximal=settings.proximal, must_converge=False)
        if prepared.targets:
            scores = yield from score_pairs(
                store, prepared.scope, prepared.batches(settings.seed), prepared.targets, method, processes
            )
            influence = (scores.positive + scores.negative).mean(0)
        else:
            yield from keep_gradients(kept, objective, theta, {})
        gradients = kept.load()
    return DetectorInputs(
        objective,
        theta,
        duplicates,
        gradients,
        influence,
        settings.seed,
        prepared.encoder.device,
        settings.trained,
    ), norm


def _write_evidence(store: Store, settings: MisalignmentSettings, evidence: Evidence) -> str:
    """Keeps what speaks for and against pairs, for a review to learn from; returns the name of its table."""
    name = "evidence-" + digest(json.dumps([evidence.names, settings.trained]))
    for part, columns in evidence.tables().items():
        store.table(name).write(part, columns)
    return name
