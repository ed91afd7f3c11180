"""Training a scope on pairs from a state that is saved every now and then.

Batches and learning rate depend on the seed and the step only: a fit that was
stopped goes on from its last saved state to the numbers that it would have
reached.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.objective import Batches, random_partition
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.progress import Progress
from fiftyone_ecif.settings.fine_tuning import FitSettings
from fiftyone_ecif.store.files import atomic_path

logger = logging.getLogger(__name__)

_SAVE_EVERY = 10.0  # seconds of training
_BETAS = (0.9, 0.98)  # of AdamW, as CLIP was trained with


def train_scope(
    scope: Scope, batches: Batches, settings: FitSettings, state: dict[str, Any], resume: Path
) -> Generator[Progress, None, Tensor]:
    """Trains from a state to the end, saving the state every now and then.

    Args:
        scope: what is trained.
        batches: the training pairs; each epoch regroups them.
        settings: of the fit.
        state: ``theta``, the ``optimiser``'s state or None, and the ``step`` to go on from.
        resume: the file that the state is saved to.

    Raises:
        EcifError: if the loss is not finite any more, or the state cannot be saved

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
            loss = _pair_losses(scope, theta, shuffled[index]).mean()
            if not loss.isfinite():
                raise diverged(settings)
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


def mean_loss(scope: Scope, theta: Tensor, batches: Batches) -> Generator[Progress, None, float]:
    """The mean pair loss over the batches, in nats.

    Args:
        scope: what it is a function of.
        theta: its parameters, shape ``(p,)``.
        batches: the pairs.
    """
    total, pairs = 0.0, 0
    for index in range(len(batches)):
        yield Progress("Measuring the loss", index, len(batches))
        with torch.no_grad():
            losses = _pair_losses(scope, theta, batches[index])
        total, pairs = total + losses.sum().item(), pairs + len(losses)
    yield Progress("Measuring the loss", len(batches), len(batches))
    return total / pairs


def _pair_losses(scope: Scope, theta: Tensor, batch: Any) -> Tensor:
    return scope.loss_of(batch).pair_losses(scope.similarity(theta, batch))


def _save_state(resume: Path, state: dict[str, Any]) -> None:
    try:
        with atomic_path(resume) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        raise EcifError(
            f"The state of the fit cannot be saved to {resume} ({error}). Make room, and run again"
        ) from error


def load_state(resume: Path, digest: str, by_content: Callable[[], str], overwrite: bool) -> dict[str, Any] | None:
    """The saved state of the same fit, or None for a new start.

    Args:
        resume: the file that it may be in.
        digest: of all that the fit depends on, images by their place and time of change.
        by_content: the same with images by their bytes, asked for where they are not at that place.
        overwrite: whether to start anew where there is a state that cannot be gone on from.

    Raises:
        EcifError: if there is a state that is damaged or of another fit, and it
            may not be overwritten
    """
    if not resume.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(resume, map_location="cpu", weights_only=True)
        same = state["digest"] == digest or state.get("content") == by_content()
        problem = None if same else "is of a fit with other settings, pairs or weights"
    except Exception as error:  # torch raises many kinds on damaged files
        problem = f"is damaged ({type(error).__name__})"
    if problem is None:
        logger.info("Going on from step %d, saved in %s", state["step"], resume)
        return state
    if overwrite:
        return None
    raise EcifError(f"{resume} {problem}. Delete it, or set overwrite=True, to start anew")


def diverged(settings: FitSettings) -> EcifError:
    """What to raise when the loss is not finite any more."""
    return EcifError(
        f"The loss is not finite any more with learning_rate={settings.learning_rate}. Use a smaller one, and "
        "overwrite=True if a saved state is left"
    )
