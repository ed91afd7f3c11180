"""Fine-tuning a model on a user's pairs, with low-rank adapters by default.

What is trained is the flat vector of a deep scope (see ``towers``), so that the
same parameters can be attributed afterwards. Batches and learning rate depend
on the seed and the step only: a fit that was stopped goes on from its last
saved state to the numbers that it would have reached.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import parse_model_name
from open_clip.transform import PreprocessCfg
from torch import Tensor

from .checkpoint import new_checkpoint, save_checkpoint
from .choices import ScopeChoice, parse_scope
from .encoder import Encoder, check_names, choose_device
from .errors import EcifError
from .inputs import Images, ImageTextBatches
from .keys import pair_key
from .objective import random_partition
from .progress import Progress, follow
from .samples import Pairs, check_collection, read_pairs, warn_skipped
from .towers import TowerScope

logger = logging.getLogger(__name__)

_SAVE_EVERY = 10.0  # seconds of training
_READ_AT_ONCE = 64  # images
_BETAS = (0.9, 0.98)  # of AdamW, as CLIP was trained with


@dataclass(frozen=True)
class FitSettings:
    """What the result of :func:`fit_model` depends on, beside the pairs; see there."""

    caption_field: str = "caption"
    model: str = "ViT-B-32"
    pretrained: str | None = None
    scope: str = "lora"
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    skip_failures: bool = True

    def check(self) -> ScopeChoice:
        """Checks what can be checked without the data and the model.

        Returns:
            what the scope means

        Raises:
            EcifError: if a value is not usable
        """
        for name, least in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise EcifError(f"{name}={value!r} must be a whole number from {least} up")
        if not 0 < self.learning_rate < math.inf:
            raise EcifError(f"learning_rate={self.learning_rate!r} must be a positive number, such as 0.001")
        if not 0 <= self.weight_decay < math.inf:
            raise EcifError(f"weight_decay={self.weight_decay!r} must be a number from 0 up, such as 0.01")
        choice = parse_scope(self.scope)
        if choice.heads:
            raise EcifError(
                f"scope={self.scope!r} is not for fine-tuning: compute_influence(fit=True) brings heads to their "
                "minimum. Use scope='lora', 'blocks:1' or a regular expression over parameter names"
            )
        check_names(self.model, self.pretrained)
        return choice


def fit_model(
    samples: Any,
    path: str | os.PathLike[str],
    caption_field: str = "caption",
    model: str = "ViT-B-32",
    pretrained: str | None = None,
    *,
    scope: str = "lora",
    epochs: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    skip_failures: bool = True,
    overwrite: bool = False,
    progress: bool | Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Fine-tunes a pretrained model on image-caption pairs and saves a checkpoint.

    Minimises the model's own contrastive loss over random batches, new ones
    each epoch, with AdamW; the learning rate warms up over the first tenth of
    the steps and then falls to zero along a cosine. The model stays in
    evaluation mode: no dropout, and batch norms keep their statistics.

    While it runs, its state is saved to ``{path}.resume`` every few seconds. A
    fit that was stopped goes on from there when it is run again with the same
    arguments, and ends where it would have ended; on the CPU to the last bit.

    The checkpoint is for ``pretrained=path`` with the same model name. Of a
    ``local-dir:…`` or ``hf-hub:…`` model, it belongs into a folder with a copy
    of the model's ``open_clip_config.json``.

    Args:
        samples: the training pairs, a FiftyOne dataset or view of images.
        path: the checkpoint to write; safetensors if it ends in that, else
            PyTorch's format. Adapters are written beside it, to
            ``{path}.adapters``.
        caption_field ("caption"): the string field that holds the captions.
        model ("ViT-B-32"): the name of an open_clip model.
        pretrained (None): one of its pretrained tags, or the path of a
            checkpoint to start from. Needed unless the model name brings its
            own weights (``local-dir:…``, ``hf-hub:…``).
        scope ("lora"): the parameters to train: ``lora[:RANK[:BLOCKS]]``,
            ``blocks:K`` or a regular expression over parameter names.
        epochs (5): how often each pair is seen.
        batch_size (64): pairs that compete in one softmax, at most.
        learning_rate (1e-3): the highest, after the warm-up.
        weight_decay (0.0): of the trained parameters to zero; decoupled from
            the loss, as in AdamW.
        seed (0): fixes new adapters and all batches.
        device (None): where to train; by default a GPU where there is one.
        skip_failures (True): whether to skip samples without a caption or with
            an unreadable image, with a warning, rather than raise.
        overwrite (False): whether to replace the checkpoint, and a saved state
            of a fit with other arguments.
        progress (None): whether to show progress bars, or a callback.

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
    settings = FitSettings(
        caption_field=caption_field,
        model=model,
        pretrained=pretrained,
        scope=scope,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
        skip_failures=skip_failures,
    )
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
    choice = settings.check()
    choose_device(device)
    check_collection(samples, settings.caption_field)
    path = new_checkpoint(path, overwrite)

    yield Progress("Reading pairs", 0, 1)
    pairs = read_pairs(samples, settings.caption_field, settings.skip_failures)
    _check_count(pairs)
    yield Progress("Reading pairs", 1, 1)

    yield Progress("Loading the model", 0, 1)
    encoder = Encoder(settings.model, settings.pretrained, device)
    scope = encoder.scope(choice, settings.seed)
    assert isinstance(scope, TowerScope)  # heads were refused
    resume = path.with_name(f"{path.name}.resume")
    digest = _digest(settings, pairs, encoder, scope)
    state = _load_state(resume, digest, overwrite)
    yield Progress("Loading the model", 1, 1)

    if state is None:
        unreadable = yield from _find_unreadable(encoder, pairs, settings.skip_failures)
    else:
        unreadable = state["unreadable"]
    pairs = pairs.without(unreadable)
    warn_skipped(pairs.skipped, "training")
    _check_count(pairs)

    partition = random_partition(len(pairs.ids), settings.batch_size, settings.seed)
    batches = ImageTextBatches(encoder, pairs.paths, pairs.captions, partition)
    if state is None:
        before = yield from _mean_loss(scope, scope.start, batches)
        state = {
            "digest": digest,
            "unreadable": unreadable,
            "loss_before": before,
            "step": 0,
            "theta": scope.start,
            "optimiser": None,
        }
    theta = yield from _train(scope, batches, settings, state, resume)
    after = yield from _mean_loss(scope, theta, batches)
    if not math.isfinite(after):
        raise _diverged(settings)

    yield Progress("Saving", 0, 1)
    adapters = scope.adapters(theta) if scope.rank else None
    save_checkpoint(path, encoder.changed_state(scope, theta), adapters, encoder.preprocessing)
    resume.unlink(missing_ok=True)
    _warn_preprocessing(encoder, path)
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


def _train(
    scope: TowerScope, batches: ImageTextBatches, settings: FitSettings, state: dict[str, Any], resume: Path
) -> Generator[Progress, None, Tensor]:
    """Trains from a state to the end, saving the state every now and then.

    Returns:
        the trained parameters, shape ``(p,)``
    """
    theta: Tensor = state["theta"].to(scope.start).clone().requires_grad_()
    optimiser = torch.optim.AdamW([theta], betas=_BETAS, weight_decay=settings.weight_decay)
    if state["optimiser"] is not None:
        optimiser.load_state_dict(state["optimiser"])
    step, per_epoch = state["step"], len(batches)
    steps = settings.epochs * per_epoch
    saved = time.monotonic()
    for epoch in range(step // per_epoch, settings.epochs):
        shuffled = batches.regrouped(
            random_partition(
                sum(map(len, batches.partition)), settings.batch_size, settings.seed * settings.epochs + epoch
            )
        )
        for index in range(step % per_epoch, per_epoch):
            yield Progress("Fine-tuning", step, steps)
            loss = scope.loss.pair_losses(scope.similarity(theta, shuffled[index])).mean()
            if not loss.isfinite():
                raise _diverged(settings)
            (theta.grad,) = torch.autograd.grad(loss, theta)
            optimiser.param_groups[0]["lr"] = _learning_rate(settings.learning_rate, step, steps)
            optimiser.step()
            step += 1
            if time.monotonic() - saved >= _SAVE_EVERY:
                _save_state(
                    resume, state | {"step": step, "theta": theta.detach(), "optimiser": optimiser.state_dict()}
                )
                saved = time.monotonic()
    yield Progress("Fine-tuning", steps, steps)
    return theta.detach()


def _learning_rate(peak: float, step: int, steps: int) -> float:
    """Up to the peak over the first tenth of the steps, then down to zero along a cosine."""
    return peak * min(1, (step + 1) / max(1, steps // 10)) * (1 + math.cos(math.pi * step / steps)) / 2


def _mean_loss(scope: TowerScope, theta: Tensor, batches: ImageTextBatches) -> Generator[Progress, None, float]:
    """The mean pair loss over the batches, in nats."""
    total, pairs = 0.0, 0
    for index in range(len(batches)):
        yield Progress("Measuring the loss", index, len(batches))
        with torch.no_grad():
            losses = scope.loss.pair_losses(scope.similarity(theta, batches[index]))
        total, pairs = total + losses.sum().item(), pairs + len(losses)
    yield Progress("Measuring the loss", len(batches), len(batches))
    return total / pairs


def _find_unreadable(encoder: Encoder, pairs: Pairs, skip_failures: bool) -> Generator[Progress, None, dict[int, str]]:
    """Decodes every image once, so that none ends the training half-way.

    Returns:
        ``{index: reason}`` of those that cannot be read

    Raises:
        EcifError: for the first of them, unless it is skipped
    """
    images = Images(pairs.paths, encoder.preprocess)
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


def _digest(settings: FitSettings, pairs: Pairs, encoder: Encoder, scope: TowerScope) -> str:
    """Of all that the result depends on: settings, pairs, weights and where the scope starts."""
    keys = [pair_key(path, caption) for path, caption in zip(pairs.paths, pairs.captions, strict=True)]
    digest = hashlib.blake2b(json.dumps([asdict(settings), encoder.fingerprint, keys]).encode(), digest_size=16)
    digest.update(scope.start.cpu().numpy().tobytes())
    return digest.hexdigest()


def _save_state(resume: Path, state: dict[str, Any]) -> None:
    temporary = resume.with_name(f"{resume.name}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, resume)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        raise EcifError(
            f"The state of the fit cannot be saved to {resume} ({error}). Make room, and run again"
        ) from error


def _load_state(resume: Path, digest: str, overwrite: bool) -> dict[str, Any] | None:
    """The saved state of the same fit, or None for a new start.

    Raises:
        EcifError: if there is a state that is damaged or of another fit, and it
            may not be overwritten
    """
    if not resume.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(resume, map_location="cpu", weights_only=True)
        problem = None if state["digest"] == digest else "is of a fit with other settings, pairs or weights"
    except Exception as error:  # torch raises many kinds on damaged files
        problem = f"is damaged ({type(error).__name__})"
    if problem is None:
        logger.info("Going on from step %d, saved in %s", state["step"], resume)
        return state
    if overwrite:
        return None
    raise EcifError(f"{resume} {problem}. Delete it, or set overwrite=True, to start anew")


def _diverged(settings: FitSettings) -> EcifError:
    return EcifError(
        f"The loss is not finite any more with learning_rate={settings.learning_rate}. Use a smaller one, and "
        "overwrite=True if a saved state is left"
    )


def _warn_preprocessing(encoder: Encoder, path: Path) -> None:
    """Says so if open_clip prepares images in another way once the model is loaded from a file."""
    usual = asdict(PreprocessCfg())
    special = {
        name: value
        for name, value in open_clip.get_model_preprocess_cfg(encoder.model).items()
        if name != "size" and value != usual[name]
    }
    if special and not parse_model_name(encoder.name)[0]:
        logger.warning(
            "open_clip forgets how %s prepares images when it loads weights from a file. This plugin remembers; "
            "elsewhere load %s with force_preprocess_cfg=%s, or its embeddings are off",
            encoder.name,
            path,
            special,
        )
