"""What influence is measured on: the mean loss of some target pairs, as a function of a scope's parameters.

Which losses there are by name is in ``target_losses``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot
from typing_extensions import Self, override

from fiftyone_ecif.distributed import ALONE, ProcessGroup
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.losses import equal_pairs
from fiftyone_ecif.influence.objective import Batches
from fiftyone_ecif.influence.scope import Scope


class Matches(NamedTuple):
    """The strongest wrong match of each pair beside its strongest right one, in each direction of retrieval.

    The directions are the caption for an image and the image for a caption, or the class for an image: ``k`` of them.

    Attributes:
        wrong: which row's caption or image, or which class, shape ``(n, k)``.
        wrong_similarity: its cosine similarity, shape ``(n, k)``; ``-inf`` where every match is right.
        right: likewise of the strongest right match.
        right_similarity: its cosine similarity.
    """

    wrong: Tensor
    wrong_similarity: Tensor
    right: Tensor
    right_similarity: Tensor

    @property
    def mistakes(self) -> Tensor:
        """Which pairs have a wrong match above all right ones in some direction, bool, shape ``(n,)``."""
        return (self.wrong_similarity > self.right_similarity).any(1)


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
    def batch_matches(self, theta: Tensor, rows: Tensor, batch: Any) -> Matches:
        """What the model confuses the pairs of a batch with."""

    def on(self, scope: Scope) -> Self:
        """The same for another scope."""
        other = copy.copy(self)
        other.scope = scope
        return other

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
        return equal_pairs(self.twins, rows)

    def losses(self, theta: Tensor) -> Tensor:
        """The loss of each target pair, in the order of the rows, shape ``(M,)``."""
        return self._each(self.batch_losses, theta)

    def mistakes(self, theta: Tensor) -> Tensor:
        """Which target pairs the model gets wrong, bool, shape ``(M,)``."""
        return self._each(lambda at, rows, batch: self.batch_matches(at, rows, batch).mistakes, theta)

    def loss(self, theta: Tensor) -> Tensor:
        """The mean loss, a scalar."""
        return self.losses(theta).mean()

    def gradient_and_value(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the mean loss, shape ``(p,)``, and its value."""
        at = theta.detach().clone().requires_grad_()
        gradient, value = torch.zeros_like(theta), theta.new_zeros(())
        for rows, batch in self._own():
            loss = self.batch_losses(at, rows, batch).sum() / self.pairs
            gradient, value = gradient + torch.autograd.grad(loss, at)[0], value + loss.detach()
        return self.processes.total(gradient), self.processes.total(value)

    def _own(self) -> Any:
        """The rows and the inputs of the batches that this process takes."""
        return ((self.batches.partition[n], self.batches[n]) for n in self.processes.share(range(len(self.batches))))

    def _each(self, function: Callable[[Tensor, Tensor, Any], Tensor], theta: Tensor) -> Tensor:
        with torch.no_grad():
            own = [(rows, function(theta, rows, batch).cpu()) for rows, batch in self._own()]
        places, values = (torch.cat(parts) for parts in zip(*self.processes.gather(own), strict=True))
        return values[places.argsort()]


class MatchTarget(Target):
    """A loss of images and captions that are to be matched in batches."""

    @override
    def batch_matches(self, theta: Tensor, rows: Tensor, batch: Any) -> Matches:
        """Retrieval within the batch: of a caption for each image, and of an image for each caption."""
        images, captions = (normalize(part, dim=1) for part in self.scope.embed(theta, batch))
        cosine, right = images @ captions.T, self.right_matches(rows).to(images.device)
        sides = _strongest(cosine, right), _strongest(cosine.T, right.T)
        found, at = Matches(*(torch.stack(parts, 1) for parts in zip(*sides, strict=True))), rows.to(images.device)
        return found._replace(wrong=at[found.wrong], right=at[found.right])


class ContrastiveTarget(MatchTarget):
    """The mean of the loss that the model is trained with, without equal pairs as negatives where batches tell them."""

    @override
    def batch_losses(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        return self.scope.loss_of(batch).pair_losses(self.scope.similarity(theta, batch))


class RetrievalTarget(MatchTarget):
    """The mean of :func:`retrieval_margin` in both directions."""

    @override
    def batch_losses(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        return retrieval_margin(self.scope.similarity(theta, batch), self.right_matches(rows))


class PairTarget(MatchTarget):
    """A function of each batch.

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


def retrieval_margin(logits: Tensor, right_matches: Tensor | None = None) -> Tensor:
    """How far the strongest wrong match is above the strongest right one, averaged over both directions, ``(n,)``.

    Positive where retrieval fails:

    >>> retrieval_margin(torch.tensor([[5.0, 1.0], [3.0, 2.0]])).tolist()
    [-3.0, 0.0]

    Args:
        logits: the similarity matrix, shape ``(n, n)``.
        right_matches (None): which captions belong to which images, bool, shape ``(n, n)``; by default each to its own.
    """
    right = torch.eye(len(logits), dtype=torch.bool) if right_matches is None else right_matches
    right = right.to(logits.device)

    def margin(rows: Tensor, right: Tensor) -> Tensor:
        best = rows.masked_fill(~right, -torch.inf).amax(1)
        alone = right.all(1)  # nothing to mistake it for
        wrong = torch.where(alone, best, rows.masked_fill(right, -torch.inf).amax(1))
        return wrong - best

    return (margin(logits, right) + margin(logits.T, right.T)) / 2


def _strongest(cosine: Tensor, right: Tensor) -> Matches:
    """The strongest matches of one direction among ``(n, candidates)``, as places among these, ``(n,)`` each."""
    wrong_similarity, wrong = cosine.masked_fill(right, -torch.inf).max(1)
    right_similarity, right_place = cosine.masked_fill(~right, -torch.inf).max(1)
    return Matches(wrong, wrong_similarity, right_place, right_similarity)


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

    def class_similarity(self, theta: Tensor, batch: Any) -> Tensor:
        """Cosine similarity of each image with each class, shape ``(n, classes)``."""
        images = normalize(self.scope.embed_images(theta, batch[0]), dim=1)
        prompts = normalize(self.scope.embed_captions(theta, self.prompts), dim=1)
        classes = normalize(prompts.view(-1, self.templates, prompts.shape[1]).mean(1), dim=1)
        return images @ classes.T

    def predictions(self, theta: Tensor) -> Tensor:
        """The class that the model gives to each image, shape ``(M,)``."""
        return self._each(lambda at, rows, batch: self.class_similarity(at, batch).argmax(1), theta)

    @override
    def batch_losses(self, theta: Tensor, rows: Tensor, batch: Any) -> Tensor:
        logits = self.scope.logits(theta, self.class_similarity(theta, batch))
        return cross_entropy(logits, self.labels[rows].to(logits.device), reduction="none")

    @override
    def batch_matches(self, theta: Tensor, rows: Tensor, batch: Any) -> Matches:
        cosine = self.class_similarity(theta, batch)
        right = one_hot(self.labels[rows].to(cosine.device), cosine.shape[1]).bool()
        return Matches(*(part[:, None] for part in _strongest(cosine, right)))


def fill_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all classes, those of one class next to each other."""
    return [template.replace("{}", name) for name in classes for template in templates]
