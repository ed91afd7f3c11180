"""From samples to what is scored: pairs, encoder, scope, batches and targets."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import fiftyone.core.labels as fol
import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.api.embeddings import Arrays, check_failures, given_embeddings, on_disk
from fiftyone_ecif.devices import choose_device
from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.fitting import stationary_point
from fiftyone_ecif.influence.heads import resident
from fiftyone_ecif.influence.objective import Batches, ContrastiveLoss, random_partition
from fiftyone_ecif.influence.projections import PROJECTIONS
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import ScopeChoice, parse_scope
from fiftyone_ecif.influence.target_losses import Classes, find_target_loss
from fiftyone_ecif.influence.targets import Target, fill_prompts
from fiftyone_ecif.models.dual_encoder import DualEncoder
from fiftyone_ecif.models.features import cached_features
from fiftyone_ecif.models.given_embeddings import GivenEmbeddings
from fiftyone_ecif.models.inputs import default_readers
from fiftyone_ecif.models.libraries import library_of, load_encoder
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.runs.cache import database_id
from fiftyone_ecif.runs.influence import InfluenceResults
from fiftyone_ecif.samples.pairs import (
    Pairs,
    check_collection,
    deleted_of,
    every_sample,
    read_pairs,
    warn_skipped,
)
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.store.disk_matrix import DiskMatrix
from fiftyone_ecif.store.keys import PairKey, content_of, digest, equal_files, pair_key
from fiftyone_ecif.store.known_files import KnownFiles
from fiftyone_ecif.store.tables import Store

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 256
_READ_AT_ONCE = 512  # files between two steps of progress


@dataclass(frozen=True)
class PreparedRun:
    """What a run is about, ready to be scored.

    Attributes:
        encoder: the model.
        store: of the encoder's features on this dataset.
        choice: the scope that was asked for.
        scope: what varies.
        pairs: the training pairs.
        keys: what they are known by.
        target_pairs: the target's pairs, by the name of the slice.
        features: of images and captions of the training pairs.
        targets: by the name of their table in a run's store, in the order of ``target_pairs``.
        classes: of the target's pairs, where its loss is about them.
        settings: with the batch size that it was given, or that suits the number of pairs.
        shared: how many target pairs are also training pairs.
        twins: by which equal training pairs are told, shape ``(N, 2)``, if they are spared and there are any.
    """

    encoder: DualEncoder
    store: Store
    choice: ScopeChoice
    scope: Scope
    pairs: Pairs
    keys: list[PairKey]
    target_pairs: dict[str, Pairs]
    features: tuple[Tensor | DiskMatrix, Tensor | DiskMatrix]
    targets: dict[str, Target]
    classes: list[str]
    settings: InfluenceSettings
    shared: int
    twins: Tensor | None

    @property
    def batch_size(self) -> int:
        """How many pairs compete in one softmax, at most."""
        assert self.settings.batch_size is not None
        return self.settings.batch_size

    def batches(self, seed: int) -> Batches:
        """The training pairs in random batches."""
        partition = random_partition(len(self.pairs.ids), self.batch_size, seed)
        order = torch.cat(partition)
        features = [side if isinstance(side, Tensor) else side.in_order(order) for side in self.features]
        batches = self.encoder.batches(
            self.choice, self.pairs.paths, self.pairs.captions, partition, (features[0], features[1]), self.twins
        )
        entered: Batches = self.scope.entered(batches)
        return entered

    def run_name(self, seed: int) -> str:
        """Of the store of a partition: a digest of all that its parameters and gradients depend on."""
        chosen = self.settings
        made_of: list[Any] = [chosen.scope, chosen.fit, chosen.proximal, chosen.batch_size, seed, chosen.role]
        if chosen.keep_gradients and PROJECTIONS[self.scope.projection].suits_target:
            made_of += [*self.targets, chosen.gradient_tolerance]
        if chosen.embeddings:  # the keys of pairs say nothing of those
            made_of.append(self.encoder.fingerprint)
        if self.twins is not None:
            made_of.append("spare_equal")
        start = self.scope.start.cpu().numpy().tobytes()  # adapters are not part of the encoder
        return "run-" + digest(chain([json.dumps(made_of)], map("".join, self.keys), [start]))


def prepare(
    samples: Any,
    target: Any,
    settings: InfluenceSettings,
    job: JobSettings,
    *,
    arrays: Arrays | None = None,
    check: Callable[[], None] = lambda: None,
    processes: ProcessGroup = ALONE,
    known_in: Sequence[Store] = (),
) -> Generator[Progress, None, PreparedRun]:
    """Reads pairs, loads the model and encodes what is not cached.

    Args:
        samples: the training pairs.
        target: the target pairs, or a dict of slices, which may be empty.
        settings: of the run.
        job: how it is run.
        arrays (None): embeddings of the samples, in place of a model and of fields.
        check: called when the collections are known to be usable.
        processes (ALONE): the processes that share the encoding and the target's batches.
        known_in (()): further encoders' stores in which images are known.

    Raises:
        EcifError: for bad input, before the model is loaded where that is possible
    """
    choose_device(job.device)
    if not settings.embeddings:
        library_of(settings.model).check(settings.model, settings.pretrained)
    choice = parse_scope(settings.scope)
    if settings.is_function and settings.function is None:
        raise EcifError(
            f"The run measured a function of your own ({settings.target_loss_name}), which is not kept with it. "
            "Run compute_influence again in this session"
        )
    check_collection(samples, settings.caption_field)
    check()

    yield Progress("Reading pairs", 0, 1)
    pairs = read_pairs(samples, settings.caption_field, job.skip_failures)
    slices = dict(target) if isinstance(target, Mapping) else {"": target}
    target_pairs = {name: _read_target(name, view, settings, job.skip_failures) for name, view in slices.items()}
    _check_sizes(pairs, target_pairs, settings.batch_size)
    _classes(target_pairs, settings)
    shared = _warn_shared(pairs, target_pairs)
    if not settings.spare_equal:
        _warn_twins(pairs)
    home = Store(str(samples._dataset._doc.id))
    home.ensure_writable()
    home.claim(database_id())
    yield Progress("Reading pairs", 1, 1)

    yield Progress("Loading the model", 0, 1)
    groups = [pairs, *target_pairs.values()]
    encoder: DualEncoder
    if settings.embeddings:
        views = [samples, *slices.values()]
        encoder, failures = given_embeddings(samples, groups, views, settings, arrays, job.device)
    else:
        encoder = load_encoder(settings.model, settings.pretrained, job.device)
    encoder.loss.check_role(settings.role)
    scope = encoder.scope(choice, settings.seed)
    store = home.inside(encoder.fingerprint)
    yield Progress("Loading the model", 1, 1)

    paths = [path for group in groups for path in group.paths]
    captions = [caption for group in groups for caption in group.captions]
    workers = default_readers() if job.num_workers is None else job.num_workers
    if isinstance(encoder, GivenEmbeddings):
        keys = [pair_key(path, caption) for path, caption in zip(paths, captions, strict=True)]
        images, texts = (on_disk(store, side) for side in encoder.rows)
        check_failures(groups, failures, job.skip_failures)
    else:
        known = KnownFiles(store, *known_in)
        yield from _recognise(known, paths, workers, processes)
        keys = [PairKey(known.key(path), digest(caption)) for path, caption in zip(paths, captions, strict=True)]
        images, texts, failures = yield from cached_features(
            store, encoder, keys, paths, captions, workers, job.skip_failures, processes
        )
    kept, rows = _drop_failures(groups, failures)
    pairs, target_pairs = kept[0], dict(zip(target_pairs, kept[1:], strict=True))
    warn_skipped(pairs.skipped, "training")
    for group in target_pairs.values():
        warn_skipped(group.skipped, "target")
    _check_sizes(pairs, target_pairs, settings.batch_size)
    batch_size = settings.batch_size or min(DEFAULT_BATCH_SIZE, len(pairs.ids))

    targets = {}
    classes, needs_labels = _classes(target_pairs, settings), find_target_loss(settings.target_loss).needs_labels
    for (label, group), chosen in zip(target_pairs.items(), rows[1:], strict=True):
        partition = random_partition(len(group.ids), batch_size, settings.seed)
        features = [resident(side.select(chosen), encoder.placement) for side in (images, texts)]
        twins = None if needs_labels else twins_of(group)
        spared = twins if settings.spare_equal else None
        batches = scope.entered(
            encoder.batches(choice, group.paths, group.captions, partition, (features[0], features[1]), spared)
        )
        function = settings.target_loss_name + settings.function_token
        measured: tuple[Any, ...] = function, list(settings.templates), classes, settings.seed
        measured += ("twins",) * (twins is not None) + ("spare_equal",) * (spared is not None)
        name = _target_name(label, [keys[row] for row in chosen], measured)
        targets[name] = _make_target(encoder, choice, scope, batches, group, settings, classes)
        targets[name].twins = twins
        targets[name].processes = processes
    return PreparedRun(
        encoder,
        store,
        choice,
        scope,
        pairs,
        [keys[row] for row in rows[0]],
        target_pairs,
        (
            resident(images.select(rows[0]), encoder.placement),
            resident(texts.select(rows[0]), encoder.placement),
        ),
        targets,
        classes if needs_labels else [],
        replace(settings, batch_size=batch_size),
        shared,
        twins_of(pairs) if settings.spare_equal else None,
    )


def _recognise(
    known: KnownFiles, paths: Sequence[str], workers: int, processes: ProcessGroup
) -> Generator[Progress, None, None]:
    """Reads the image files that were not seen before, to know them again when they are moved."""
    own = processes.share(known.unknown(paths))
    contents: list[tuple[str, str]] = []
    with ThreadPoolExecutor(max(1, workers)) as readers:
        for start in range(0, len(own), _READ_AT_ONCE):
            part = own[start : start + _READ_AT_ONCE]
            found = zip(part, readers.map(content_of, part), strict=True)
            contents += [(path, content) for path, content in found if content is not None]
            yield Progress("Recognising images", start + len(part), len(own))
    known.learn(dict(sorted(processes.gather(contents))))


def _target_name(label: str, keys: list[PairKey], measured: tuple[Any, ...]) -> str:
    """Of a target's table in a run's store: a digest of its slice, its pairs and what is measured on them."""
    return "target-" + digest(json.dumps([label, keys, measured]))


def reopen(
    results: InfluenceResults, device: str | None = None, whole_target: bool = False
) -> Generator[Progress, None, tuple[PreparedRun, ContrastiveLoss, Tensor]]:
    """A run prepared once more, from its samples as they are now.

    Args:
        results: of the run.
        device (None): where the model runs.
        whole_target (False): whether all pairs of the target are needed, in
            the batches that they were in. Otherwise those that are left stand
            for it, with a warning.

    Returns:
        the prepared run, its objective and the parameters that were scored at

    Raises:
        EcifError: if pairs were deleted or changed since, the target is gone, or it was a
            function that is not at hand any more
    """
    config = results.config
    dataset = results.samples._dataset
    source = results.target_dataset()
    if source is None:
        home = config.target["dataset"]
        raise EcifError(f"The target of run {results.key!r} is in dataset {home!r}, which is gone")
    gone = deleted_of(dataset, results.ids)
    if gone:
        raise EcifError(
            f"{len(gone)} of the {len(results.ids)} pairs of run {results.key!r} were deleted since, such as "
            f"{gone[0]}. Score again: compute_influence with overwrite=True"
        )
    slices = {name: every_sample(source).select(ids) for name, ids in results.target_ids.items()}
    target = [sample for ids in results.target_ids.values() for sample in ids]
    lost = deleted_of(source, target)
    left = {name: len(set(ids).difference(lost)) for name, ids in results.target_ids.items()}
    if lost and (whole_target or min(left.values()) < 2):
        raise EcifError(
            f"{len(lost)} of the {len(target)} target pairs of run {results.key!r} were deleted since, such as "
            f"{lost[0]}. Score again: compute_influence with overwrite=True"
        )
    if lost:
        logger.warning(
            "%d of the %d target pairs of run %r were deleted since: losses are those of the others",
            len(lost),
            len(target),
            results.key,
        )
    prepared = yield from prepare(
        every_sample(dataset).select(results.ids),
        slices if config.slices else slices[""],
        config.settings,
        JobSettings(device=device, num_workers=0, skip_failures=False),
        known_in=[Store(*config.store[:-1])],
    )
    if lost:
        known = [config.target["tables"][name] for name in prepared.target_pairs]
        prepared = replace(prepared, targets=dict(zip(known, prepared.targets.values(), strict=True)))
    tables = dict(zip(prepared.target_pairs, prepared.targets, strict=True))
    if prepared.run_name(config.seed) != config.store[-1] or tables != config.target["tables"]:
        raise EcifError(
            f"The pairs, the target or the model of run {results.key!r} changed since. "
            "Run compute_influence again with overwrite=True"
        )
    objective = ContrastiveLoss(prepared.scope, prepared.batches(config.seed), len(prepared.pairs.ids), config.proximal)
    theta, _ = yield from stationary_point(results.gradient_store, objective, config.fit)
    return prepared, objective, theta


def describe(target: Any, prepared: PreparedRun) -> dict[str, Any]:
    """The target for the record: its dataset, size, the stages of its view, its samples and its tables."""
    views = list(target.values()) if isinstance(target, Mapping) else [target]
    return {
        "dataset": views[0]._dataset.name,
        "dataset_id": str(views[0]._dataset._doc.id),
        "samples": sum(len(pairs.ids) + len(pairs.skipped) for pairs in prepared.target_pairs.values()),
        "view": views[0].view().name,
        "stages": "; ".join(str(view.view()) for view in views)[:2000],
        "tables": dict(zip(prepared.target_pairs, prepared.targets, strict=True)),
    }


def _read_target(name: str, view: Any, settings: InfluenceSettings, skip_failures: bool) -> Pairs:
    """The pairs of a target; for zero-shot classification with the class in place of the caption."""
    try:
        field = settings.caption_field
        if settings.label_field is not None:
            check_collection(view, None)
            found = view.get_field(settings.label_field)
            nested = isinstance(getattr(found, "document_type", None), type) and issubclass(
                found.document_type, fol.Classification
            )
            field = f"{settings.label_field}.label" if nested else settings.label_field
        return read_pairs(view, field, skip_failures)
    except EcifError as error:
        raise EcifError(f"The target {name + ' ' if name else ''}cannot be used. {error}") from error


def _classes(target_pairs: Mapping[str, Pairs], settings: InfluenceSettings) -> list[str]:
    """The classes of the target's pairs, of which a loss that is about them needs two."""
    classes = sorted({label for group in target_pairs.values() for label in group.captions})
    loss = find_target_loss(settings.target_loss)
    if loss.needs_labels and len(classes) < 2:
        raise EcifError(f"The target has one class only, {classes[0]!r}. target_loss={loss.name!r} needs at least 2")
    return classes


def _make_target(
    encoder: DualEncoder,
    choice: ScopeChoice,
    scope: Scope,
    batches: Batches,
    target_pairs: Pairs,
    settings: InfluenceSettings,
    classes: list[str],
) -> Target:
    loss = find_target_loss(settings.target_loss)
    if not loss.needs_labels:
        return loss.make(scope, batches)
    prompts = scope.entered_captions(encoder.prompts(choice, fill_prompts(classes, settings.templates)))
    labels = torch.tensor([classes.index(label) for label in target_pairs.captions])
    return loss.make(scope, batches, Classes(labels, prompts, len(settings.templates)))


def twins_of(pairs: Pairs) -> Tensor | None:
    """Numbers of the image and the caption of each pair, the same for equal ones; None if no two pairs share any."""
    words: dict[str, int] = {}
    found = [equal_files(pairs.paths), [words.setdefault(caption, len(words)) for caption in pairs.captions]]
    return torch.tensor(found).T if any(len(set(side)) < len(side) for side in found) else None


def _check_sizes(pairs: Pairs, target_pairs: Mapping[str, Pairs], batch_size: int | None) -> None:
    if len(pairs.ids) < 2:
        raise EcifError(f"Influence needs at least 2 training pairs, there are {len(pairs.ids)}")
    for group in target_pairs.values():
        if len(group.ids) < 2:
            raise EcifError(f"The target needs at least 2 pairs, it has {len(group.ids)}")
    if batch_size is not None and batch_size > len(pairs.ids):
        raise EcifError(
            f"batch_size={batch_size} is larger than the {len(pairs.ids)} training pairs. "
            f"Use at most {len(pairs.ids)}, or leave it out"
        )


def _drop_failures(groups: list[Pairs], failures: Mapping[int, str]) -> tuple[list[Pairs], list[np.ndarray]]:
    """Takes the pairs whose image could not be read out of all groups, and says which feature rows are left."""
    kept, rows, start = [], [], 0
    for group in groups:
        places = range(start, start + len(group.ids))
        kept.append(group.without({place - start: failures[place] for place in places if place in failures}))
        rows.append(np.array([place for place in places if place not in failures], dtype=int))
        start = places.stop
    return kept, rows


def _warn_twins(pairs: Pairs) -> None:
    images, captions = Counter(pairs.paths), Counter(pairs.captions)
    twins = sum(
        images[path] > 1 or captions[caption] > 1 for path, caption in zip(pairs.paths, pairs.captions, strict=True)
    )
    if twins:
        logger.warning(
            "%d of the %d training pairs share their image or their caption with another: where they meet in a batch, "
            "each is a negative of the other, as in training, unless spare_equal=True",
            twins,
            len(pairs.ids),
        )


def _warn_shared(pairs: Pairs, target_pairs: Mapping[str, Pairs]) -> int:
    targets = [sample for group in target_pairs.values() for sample in group.ids]
    shared = len(set(pairs.ids) & set(targets))
    if shared:
        logger.warning(
            "%d of the %d target pairs are also scored as training pairs: their influence on themselves is part of "
            "their score. Leave them out of one of the two for a held-out target",
            shared,
            len(targets),
        )
    return shared
