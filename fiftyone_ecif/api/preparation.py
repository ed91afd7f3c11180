"""From samples to what is scored: pairs, encoder, scope, batches and targets."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import fiftyone.core.labels as fol
import fiftyone.utils.torch as fout
import numpy as np
import torch
from torch import Tensor

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.fitting import stationary_point
from fiftyone_ecif.influence.heads import FeatureBatches
from fiftyone_ecif.influence.objective import Batches, ContrastiveLoss, random_partition
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, Classes, find_target_loss
from fiftyone_ecif.influence.targets import Target, fill_prompts
from fiftyone_ecif.models.checks import check_names, choose_device
from fiftyone_ecif.models.encoder import Encoder
from fiftyone_ecif.models.features import cached_features
from fiftyone_ecif.models.inputs import ImageTextBatches
from fiftyone_ecif.options import ScopeChoice, parse_scope
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.runs.cache import database_id
from fiftyone_ecif.runs.influence import InfluenceConfig, InfluenceResults, target_dataset
from fiftyone_ecif.samples.pairs import Pairs, check_collection, every_sample, read_pairs, warn_skipped
from fiftyone_ecif.store.disk_matrix import DiskMatrix
from fiftyone_ecif.store.keys import PairKey, pair_key
from fiftyone_ecif.store.tables import Store

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 256


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
        batch_size: pairs that compete in one softmax, at most.
        shared: how many target pairs are also training pairs.
    """

    encoder: Encoder
    store: Store
    choice: ScopeChoice
    scope: Scope
    pairs: Pairs
    keys: list[PairKey]
    target_pairs: dict[str, Pairs]
    features: tuple[DiskMatrix, DiskMatrix]
    targets: dict[str, Target]
    batch_size: int
    shared: int

    def batches(self, seed: int) -> Batches:
        """The training pairs in random batches."""
        partition = random_partition(len(self.pairs.ids), self.batch_size, seed)
        return _batches(self.encoder, self.choice, self.pairs, self.features, partition)

    def run_name(self, config: InfluenceConfig, seed: int) -> str:
        """Of the store of a partition: a digest of all that its parameters and gradients depend on."""
        settings = [config.scope, config.fit, config.proximal, self.batch_size, seed, config.role]
        if config.keep_gradients and not self.choice.heads:  # they are kept in directions that suit the target
            settings += list(self.targets)
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
        for key in self.keys:
            digest.update("".join(key).encode())
        digest.update(self.scope.start.cpu().numpy().tobytes())  # adapters are not part of the encoder
        return "run-" + digest.hexdigest()


def prepare(
    samples: Any,
    target: Any,
    config: InfluenceConfig,
    *,
    device: str | None = None,
    num_workers: int | None = None,
    skip_failures: bool = True,
    check: Callable[[], None] = lambda: None,
    processes: ProcessGroup = ALONE,
) -> Generator[Progress, None, PreparedRun]:
    """Reads pairs, loads the model and encodes what is not cached.

    Args:
        samples: the training pairs.
        target: the target pairs, or a dict of slices, which may be empty.
        config: of the run.
        device (None): where the model runs.
        num_workers (None): processes that load images.
        skip_failures (True): whether to skip what cannot be used.
        check: called when the collections are known to be usable.
        processes (ALONE): the processes that share the encoding and the target's batches.

    Raises:
        EcifError: for bad input, before the model is loaded where that is possible
    """
    choose_device(device)
    check_names(config.model, config.pretrained)
    choice = parse_scope(config.scope)
    if config.target_loss not in TARGET_LOSSES and config._target_function is None:
        raise EcifError(
            f"The run measured a function of your own ({config.target_loss}), which is not kept with it. "
            "Run compute_influence again in this session"
        )
    check_collection(samples, config.caption_field)
    check()

    yield Progress("Reading pairs", 0, 1)
    pairs = read_pairs(samples, config.caption_field, skip_failures)
    slices = dict(target) if isinstance(target, Mapping) else {"": target}
    target_pairs = {name: _read_target(name, view, config, skip_failures) for name, view in slices.items()}
    _check_sizes(pairs, target_pairs, config.batch_size)
    _classes(target_pairs, config)
    shared = _warn_shared(pairs, target_pairs)
    home = Store(str(samples._dataset._doc.id))
    home.ensure_writable()
    home.claim(database_id())
    yield Progress("Reading pairs", 1, 1)

    yield Progress("Loading the model", 0, 1)
    encoder = Encoder(config.model, config.pretrained, device)
    encoder.loss.check_role(config.role)
    scope = encoder.scope(choice, config.seed)
    store = home.inside(encoder.fingerprint)
    yield Progress("Loading the model", 1, 1)

    groups = [pairs, *target_pairs.values()]
    paths = [path for group in groups for path in group.paths]
    captions = [caption for group in groups for caption in group.captions]
    keys = [pair_key(path, caption) for path, caption in zip(paths, captions, strict=True)]
    workers = fout.recommend_num_workers() if num_workers is None else num_workers
    images, texts, failures = yield from cached_features(
        store, encoder, keys, paths, captions, workers, skip_failures, processes
    )
    kept, rows = _drop_failures(groups, failures)
    pairs, target_pairs = kept[0], dict(zip(target_pairs, kept[1:], strict=True))
    warn_skipped(pairs.skipped, "training")
    for group in target_pairs.values():
        warn_skipped(group.skipped, "target")
    _check_sizes(pairs, target_pairs, config.batch_size)
    batch_size = config.batch_size or min(DEFAULT_BATCH_SIZE, len(pairs.ids))

    targets = {}
    classes = _classes(target_pairs, config)
    for (label, group), chosen in zip(target_pairs.items(), rows[1:], strict=True):
        partition = random_partition(len(group.ids), batch_size, config.seed)
        features = images.select(chosen), texts.select(chosen)
        batches = _batches(encoder, choice, group, features, partition)
        measured = config.target_loss + config._target_token, config.templates, classes, config.seed
        made_of = label, [keys[row] for row in chosen], measured
        name = "target-" + hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()
        targets[name] = _make_target(encoder, choice, scope, batches, group, config, classes)
        targets[name].processes = processes
    return PreparedRun(
        encoder,
        store,
        choice,
        scope,
        pairs,
        [keys[row] for row in rows[0]],
        target_pairs,
        (images.select(rows[0]), texts.select(rows[0])),
        targets,
        batch_size,
        shared,
    )


def reopen(
    results: InfluenceResults, device: str | None = None
) -> Generator[Progress, None, tuple[PreparedRun, ContrastiveLoss, Tensor]]:
    """The prepared of a run once more, from its samples as they are now.

    Returns:
        the prepared, its objective and the parameters that were scored at

    Raises:
        EcifError: if pairs were deleted or changed since, or the target was a
            function that is not at hand any more
    """
    config = results.config
    dataset = results.samples._dataset
    source = target_dataset(dataset, config.target)
    if source is None:
        home = config.target["dataset"]
        raise EcifError(f"The target of run {results.key!r} is in dataset {home!r}, which is gone")
    slices = {name: every_sample(source).select(ids) for name, ids in config.target["ids"].items()}
    prepared = yield from prepare(
        every_sample(dataset).select(results.ids),
        slices if config.slices else slices[""],
        config,
        device=device,
        num_workers=0,
        skip_failures=False,
    )
    tables = dict(zip(prepared.target_pairs, prepared.targets, strict=True))
    if prepared.run_name(config, config.seed) != config.store[-1] or tables != config.target["tables"]:
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
        "samples": sum(len(view) for view in views),
        "view": views[0].view().name,
        "stages": "; ".join(str(view.view()) for view in views)[:2000],
        "ids": {name: group.ids for name, group in prepared.target_pairs.items()},
        "tables": dict(zip(prepared.target_pairs, prepared.targets, strict=True)),
    }


def _read_target(name: str, view: Any, config: InfluenceConfig, skip_failures: bool) -> Pairs:
    """The pairs of a target; for zero-shot classification with the class in place of the caption."""
    try:
        field = config.caption_field
        if config.label_field is not None:
            check_collection(view, None)
            found = view.get_field(config.label_field)
            nested = isinstance(getattr(found, "document_type", None), type) and issubclass(
                found.document_type, fol.Classification
            )
            field = f"{config.label_field}.label" if nested else config.label_field
        return read_pairs(view, field, skip_failures)
    except EcifError as error:
        raise EcifError(f"The target {name + ' ' if name else ''}cannot be used. {error}") from error


def _classes(target_pairs: Mapping[str, Pairs], config: InfluenceConfig) -> list[str]:
    """The classes of the target's pairs, of which a loss that is about them needs two."""
    classes = sorted({label for group in target_pairs.values() for label in group.captions})
    loss = find_target_loss(config._target_function or config.target_loss)
    if loss.needs_labels and len(classes) < 2:
        raise EcifError(f"The target has one class only, {classes[0]!r}. target_loss={loss.name!r} needs at least 2")
    return classes


def _make_target(
    encoder: Encoder,
    choice: ScopeChoice,
    scope: Scope,
    batches: Batches,
    target_pairs: Pairs,
    config: InfluenceConfig,
    classes: list[str],
) -> Target:
    loss = find_target_loss(config._target_function or config.target_loss)
    if not loss.needs_labels:
        return loss.make(scope, batches)
    prompts = fill_prompts(classes, config.templates)
    tokens = torch.cat(list(encoder.text_features(prompts, 128))).double() if choice.heads else encoder.tokens(prompts)
    labels = torch.tensor([classes.index(label) for label in target_pairs.captions])
    return loss.make(scope, batches, Classes(labels, tokens, len(config.templates)))


def _batches(
    encoder: Encoder,
    choice: ScopeChoice,
    pairs: Pairs,
    features: tuple[DiskMatrix, DiskMatrix],
    partition: list[Tensor],
) -> Batches:
    if choice.heads:
        return FeatureBatches(*features, partition)
    return ImageTextBatches(encoder, pairs.paths, pairs.captions, partition)


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
