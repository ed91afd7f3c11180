"""What influence is measured on: the mean loss of some target pairs, as a function of a scope's parameters.

Which losses there are by name is in ``target_losses``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.nn.functional import cross_entropy, normalize
from typing_extensions import Self, override

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.objective import Batches
from fiftyone_ecif.influence.scope import Scope


class Target(ABC):
    """A mean of losses of target pairs.

    Args:
        scope: what varies.
        batches: the target pairs.

    Attributes:
        processes: the processes that share the batches.
        twins: a number for the image and one for the caption of each row, shape ``(M, 2)``, equal where those are;
            None if no two are.
    """

    processes: ProcessGroup = ALONE
    twins: Tensor | None = None

    def __init__(self, scope: Scope, batches: Batches) -> None:
        self.scope, self.batches = scope, batches
        self.pairs = sum(len(rows) for rows in batches.partition)

    @abstractmethod
    def batch_losses(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        """The losses of the pairs ``rows``, which are a batch, shape ``(n,)``."""

    @abstractmethod
    def batch_mistakes(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        """Which of the pairs of a batch the model gets wrong, bool, shape ``(n,)``."""

    def part(self, partition: Sequence[Tensor]) -> Self:
        """The same on some of its batches only."""
        other = copy.copy(self)
        other.batches = self.batches.regrouped(partition)
        other.pairs = sum(len(rows) for rows in partition)
        return other

    def right_matches(self, rows: Tensor) -> Tensor:
        """Which captions belong to which images of a batch, bool, shape ``(n, n)``.

        Of one image all captions do, and of one caption all images.
        """
        if self.twins is None:
            return torch.eye(len(rows), dtype=torch.bool)
        found = self.twins[rows.to(self.twins.device)]
        return (found[:, None] == found).any(-1)

    def losses(self, theta: Tensor) -> Tensor:
        """The loss of each target pair, in the order of the rows, shape ``(M,)``."""
        return self._each(self.batch_losses, theta)

    def mistakes(self, theta: Tensor) -> Tensor:
        """Which target pairs the model gets wrong, bool, shape ``(M,)``."""
        return self._each(self.batch_mistakes, theta)

    def loss(self, theta: Tensor) -> Tensor:
        """The mean loss, a scalar."""
        return self.losses(theta).mean()

    def gradient_and_value(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the mean loss, shape ``(p,)``, and its value."""
        gradient, value = torch.zeros_like(theta), theta.new_zeros(())
        for rows, batch in self._own():
            part, loss = grad_and_value(lambda at, r=rows, b=batch: self.batch_losses(at, r, b).sum())(theta)
            gradient, value = gradient + part / self.pairs, value + loss / self.pairs
        return self.processes.total(gradient), self.processes.total(value)

    def _own(self) -> Any:
        """The rows and the inputs of the batches that this process takes."""
        return ((self.batches.partition[n], self.batches[n]) for n in self.processes.share(range(len(self.batches))))

    def _each(self, function: Callable[[Tensor, Tensor, Any], Tensor], theta: Tensor) -> Tensor:
        with torch.no_grad():
            own = [(rows, function(theta, rows, batch).cpu()) for rows, batch in self._own()]
        places, values = (torch.cat(parts) for parts in zip(*self.processes.gather(own), strict=True))
        return values[places.argsort()]


class PairTarget(Target):
    """A loss of pairs that compete in batches.

    Args:
        scope: what varies.
        batches: the target pairs.
        function: unit image and caption embeddings and similarity matrix to ``(n,)``.
    """

    def __init__(self, scope: Scope, batches: Batches, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(scope, batches)
        self.function = function

    @override
    def batch_losses(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        images, captions = (normalize(part, dim=1) for part in self.scope.embed(theta, batch))
        losses = self.function(images, captions, self.scope.logits(theta, images @ captions.T))
        if losses.shape != (len(rows),):
            raise EcifError(
                f"The target loss returned shape {tuple(losses.shape)} for {len(rows)} pairs. Return one loss a pair"
            )
        return losses

    def batch_mistakes(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        """Retrieval within the batch fails: a caption that is not the image's, or an image that is not, is closer."""
        similarity = self.scope.similarity(theta, batch)
        return retrieval_margin(similarity, self.right_matches(rows), reduce=torch.maximum) > 0


class RetrievalTarget(PairTarget):
    """The mean of :func:`retrieval_margin` in both directions.

    Args:
        scope: what varies.
        batches: the target pairs.
    """

    def __init__(self, scope: Scope, batches: Batches) -> None:
        super().__init__(scope, batches, lambda images, captions, logits: retrieval_margin(logits))

    @override
    def batch_losses(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        return retrieval_margin(self.scope.similarity(theta, batch), self.right_matches(rows))


def retrieval_margin(
    logits: Tensor,
    right_matches: Tensor | None = None,
    reduce: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a + b) / 2,
) -> Tensor:
    """How far the strongest wrong match is above the strongest right one, both directions reduced to one, ``(n,)``.

    Positive where retrieval fails:

    >>> retrieval_margin(torch.tensor([[5.0, 1.0], [3.0, 2.0]])).tolist()
    [-3.0, 0.0]

    Args:
        logits: the similarity matrix, shape ``(n, n)``.
        right_matches (None): which captions belong to which images, bool, shape ``(n, n)``; by default each to its own.
        reduce: of both directions; by default their mean.
    """
    right = torch.eye(len(logits), dtype=torch.bool) if right_matches is None else right_matches
    right = right.to(logits.device)

    def margin(rows: Tensor, right: Tensor) -> Tensor:
        best = rows.masked_fill(~right, -torch.inf).amax(1)
        alone = right.all(1)  # nothing to mistake it for
        wrong = torch.where(alone, best, rows.masked_fill(right, -torch.inf).amax(1))
        return wrong - best

    return reduce(margin(logits, right), margin(logits.T, right.T))


class ZeroShotTarget(Target):
    """Zero-shot classification of the images.

    Args:
        scope: what varies.
        batches: the target pairs; their captions are not used.
        labels: the class of each row, shape ``(M,)``.
        prompts: what the text tower takes for the prompts of all classes,
            ``templates`` for each class after another.
        templates: prompts a class; their unit embeddings are averaged.
    """

    def __init__(self, scope: Scope, batches: Batches, labels: Tensor, prompts: Any, templates: int = 1) -> None:
        super().__init__(scope, batches)
        self.labels, self.prompts, self.templates = labels, prompts, templates

    def class_logits(self, theta: Tensor, batch: Any) -> Tensor:
        """Shape ``(n, classes)``."""
        images = normalize(self.scope.embed_images(theta, batch[0]), dim=1)
        prompts = normalize(self.scope.embed_captions(theta, self.prompts), dim=1)
        classes = normalize(prompts.view(-1, self.templates, prompts.shape[1]).mean(1), dim=1)
        return self.scope.logits(theta, images @ classes.T)

    def predictions(self, theta: Tensor) -> Tensor:
        """The class that the model gives to each image, shape ``(M,)``."""
        return self._each(lambda at, rows, batch: self.class_logits(at, batch).argmax(1), theta)

    @override
    def batch_losses(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        logits = self.class_logits(theta, batch)
        return cross_entropy(logits, self.labels[rows].to(logits.device), reduction="none")

    @override
    def batch_mistakes(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        logits = self.class_logits(theta, batch)
        return logits.argmax(1) != self.labels[rows].to(logits.device)


def fill_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all classes, those of one class next to each other."""
    return [template.replace("{}", name) for name in classes for template in templates]
