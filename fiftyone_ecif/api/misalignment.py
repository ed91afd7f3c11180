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
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.fitting import stationary_point
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.projected_gradients import keep_gradients
from fiftyone_ecif.influence.scoring import score_pairs
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.misalignment.detection import reasons, run_detectors
from fiftyone_ecif.misalignment.detectors import DETECTORS, LemonZ
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.misalignment.findings import Findings
from fiftyone_ecif.misalignment.fusion import ranked
from fiftyone_ecif.misalignment.noise_rate import share_of_upper_mode, share_that_fits_like_random
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

    Three fields are written: ``{brain_key}_misalignment`` in [0, 1], the share of
    the pairs that are less suspicious (a rank, not a probability: 0.9 says that
    nine tenths of the pairs look better; :func:`review_misalignment` turns it
    into a probability), ``{brain_key}_reason``, what speaks against the pair, and
    ``{brain_key}_duplicate``, whether another sample has the same image. Samples
    that could not be scored have no value.

    Detectors and their sources are in :mod:`fiftyone_ecif.misalignment.detectors`. Those that
    use influence tell about pairs that the model was trained on, which ``fit``
    sees to. Where neither ``fit`` nor ``trained`` is set they are left out, with a
    warning.

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
            by default the estimated one.
        threshold (None): tag the pairs above this score instead.
        progress (None): whether to show progress bars, or a callback.
        {options}

    Returns:
        :class:`fiftyone_ecif.MisalignmentResults`. Its ``diagnostics``
        hold ``noise_rate`` (estimated share of misaligned pairs and its 95 %
        interval, see :mod:`fiftyone_ecif.misalignment.noise_rate`), ``trained`` (whether
        influence could be used), ``detectors`` (those that ran), ``duplicates``
        (pairs that share their image, their caption or both with another),
        ``tagged``, ``pairs``, ``relative_gradient_norm`` and ``model_notes``
        (what is to be known of the model, a sentence each).

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
    detector = DETECTORS[settings.detector]
    if (target is not None) != detector.needs_target:
        needing = " or ".join(f"detector={name!r}" for name, one in DETECTORS.items() if one.needs_target)
        raise EcifError(f"target, a view of validation pairs, and {needing} belong together")
    check_collection(samples, settings.caption_field)
    check_view(samples)
    check_writable(samples._dataset, ["tags"] * bool(tag))
    overwrite = job.overwrite or brain_key in finish_writing(samples._dataset)  # its job was killed, and is run again
    prepared = yield from prepare(
        samples,
        {} if target is None else target,
        settings.influence,
        job,
        arrays=arrays,
        check=lambda: check_key(samples._dataset, brain_key, overwrite, MisalignmentConfig(settings)),
    )
    store = prepared.store.inside(prepared.run_name(settings.seed))
    settings = replace(settings, batch_size=prepared.batch_size)
    inputs, norm = yield from _open_inputs(prepared, settings, store)
    names = [
        name
        for name, one in DETECTORS.items()
        if name == settings.detector or one.evidence or (detector.with_all and not one.needs_target)
    ]
    findings = yield from run_detectors(inputs, [*names, LemonZ.name])
    table = _write_scores(store, settings, prepared, findings)

    yield Progress("Writing fields", 0, 1)
    if settings.trained:
        rate = share_of_upper_mode(findings.scores[LemonZ.name], settings.seed)
    else:
        rate = share_that_fits_like_random(findings.share_below)
    used = inputs.gradients is not None
    diagnostics = {
        "pairs": len(prepared.pairs.ids),
        "noise_rate": list(rate),
        "trained": used,
        "detectors": sorted(findings.scores),
        "duplicates": inputs.duplicates.summary(),
        "relative_gradient_norm": norm,
        "model_notes": list(prepared.encoder.notes),
    }
    suspicion = findings.scores[settings.detector]
    columns: dict[str, Any] = {
        "misalignment": ranked(suspicion),
        "reason": reasons(findings.scores),
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
        diagnostics["tagged"] = tag_misaligned(results, tag, share, threshold)
        results.save()
    yield Progress("Writing fields", 1, 1)
    fitted = judge_fit(results.config, diagnostics)
    for remark in [*prepared.encoder.notes, *([fitted.text] if settings.fit and not fitted.fine else [])]:
        logger.warning(remark)
    if not used and any(DETECTORS[name].needs_training for name in detector.needs):
        logger.warning(
            "Influence was left out: the model was not trained on these pairs. Set fit=True, or trained=True if it was"
        )
    logger.info(
        "Misalignment of %d pairs written to %s_misalignment. About %.0f %% of the captions are wrong "
        "(%.0f to %.0f %%)",
        len(prepared.pairs.ids),
        brain_key,
        *(100 * value for value in rate),
    )
    return results


def tag_misaligned(
    results: MisalignmentResults, tag: str, share: float | None = None, threshold: float | None = None
) -> int:
    """Tags the most suspicious pairs of a run, by default as many as its estimated noise rate says.

    Args:
        results: of :func:`compute_misalignment`.
        tag: the tag.
        share (None): which share of the scored pairs.
        threshold (None): all above this score instead.

    Returns:
        how many were tagged

    Raises:
        EcifError: if a limit is out of its range
    """
    _check_tag(tag, share, threshold)
    if share is None and threshold is None:
        share = results.noise_rate.rate
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
    prepared: PreparedRun, settings: MisalignmentSettings, store: Store
) -> Generator[Progress, None, tuple[DetectorInputs, float]]:
    """The pairs and the model as detectors take them, and how far from a minimum the model is."""
    batches = prepared.batches(settings.seed)
    objective = ContrastiveLoss(prepared.scope, batches, len(prepared.pairs.ids), settings.proximal)
    kept = GradientStore(store, objective.pairs)
    theta, norm = yield from stationary_point(kept, objective, settings.fit, must_converge=False)
    duplicates = find_duplicates(prepared.features[0][:], prepared.pairs.captions, prepared.encoder.device)
    gradients = influence = None
    if settings.fit or settings.trained:
        method = ScoringOptions(fit=settings.fit, proximal=settings.proximal, must_converge=False)
        if prepared.targets:
            scores = yield from score_pairs(
                store, prepared.scope, prepared.batches(settings.seed), prepared.targets, method
            )
            influence = (scores.positive + scores.negative).mean(0)
        else:
            yield from keep_gradients(kept, objective, theta, {})
        gradients = kept.load()
    return DetectorInputs(
        objective, theta, duplicates, gradients, influence, settings.seed, prepared.encoder.device
    ), norm


def _write_scores(store: Store, settings: MisalignmentSettings, prepared: PreparedRun, findings: Findings) -> str:
    """Keeps the detectors' scores for a review; returns the name of their table."""
    made_of = [sorted(findings.scores), settings.trained, list(prepared.targets)]
    name = "detectors-" + digest(json.dumps(made_of))
    store.table(name).write("0", findings.scores)
    return name
