"""Losses that influence is measured on, by name. No heavy imports: forms read the names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from fiftyone_ecif.influence.objective import Batches
    from fiftyone_ecif.influence.scope import Scope
    from fiftyone_ecif.influence.targets import Target

    PairFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class Classes(NamedTuple):
    """The classes of target pairs, for a loss that is about them.

    Attributes:
        labels: the class of each row, shape ``(M,)``.
        prompts: what the text tower takes for the prompts of all classes, those
            of one class next to each other.
        templates: prompts a class.
    """

    labels: Tensor
    prompts: Any
    templates: int


class TargetLoss(ABC):
    """A loss of target pairs.

    Attributes:
        name: what it is chosen by.
        says: what it measures, in a few words.
        unit: of its values and of influence on it.
        needs_labels: whether it is about classes, which the target's pairs must then have.
    """

    name: str
    says: str
    unit: str
    needs_labels = False

    @abstractmethod
    def make(self, scope: Scope, batches: Batches, classes: Classes | None = None) -> Target:
        """The mean of the loss over target pairs, as a function of a scope's parameters.

        Args:
            scope: what varies.
            batches: the target pairs.
            classes (None): of the pairs, for a loss that needs labels.

        Raises:
            EcifError: if it needs labels, and there are none
        """


class PairLoss(TargetLoss):
    """A loss of pairs that compete in batches."""

    @abstractmethod
    def pair_losses(self, scope: Scope, images: Tensor, captions: Tensor, logits: Tensor) -> Tensor:
        """The loss of each pair of a batch, shape ``(n,)``, higher = worse.

        Args:
            scope: what varies.
            images: unit embeddings, shape ``(n, d)``.
            captions: likewise.
            logits: the similarity matrix, shape ``(n, n)``.
        """

    @override
    def make(self, scope: Scope, batches: Batches, classes: Classes | None = None) -> Target:
        from fiftyone_ecif.influence.targets import PairTarget

        return PairTarget(scope, batches, partial(self.pair_losses, scope))


TARGET_LOSSES: Registry[TargetLoss] = Registry("target_loss")


@TARGET_LOSSES.register
class Contrastive(TargetLoss):
    """The pairs' own contrastive loss in random batches."""

    name = "contrastive"
    says = "to match images and captions"
    unit = "nats"

    @override
    def make(self, scope: Scope, batches: Batches, classes: Classes | None = None) -> Target:
        from fiftyone_ecif.influence.targets import ContrastiveTarget

        return ContrastiveTarget(scope, batches)


@TARGET_LOSSES.register
class ZeroShot(TargetLoss):
    """Cross entropy of choosing an image's class by prompts such as "a photo of a {}." (arXiv 2103.00020)."""

    name = "zero_shot"
    says = "to name the class of an image"
    unit = "nats"
    needs_labels = True

    @override
    def make(self, scope: Scope, batches: Batches, classes: Classes | None = None) -> Target:
        from fiftyone_ecif.influence.targets import ZeroShotTarget

        if classes is None:
            raise EcifError(f"target_loss={self.name!r} needs the classes of the target. Give label_field")
        return ZeroShotTarget(scope, batches, *classes)


@TARGET_LOSSES.register
class RetrievalMargin(TargetLoss):
    """Logit of the strongest wrong match minus that of the strongest right one, averaged over images and captions."""

    name = "retrieval_margin"
    says = "how far the own caption is ahead of the others"
    unit = "units of the target loss"

    @override
    def make(self, scope: Scope, batches: Batches, classes: Classes | None = None) -> Target:
        from fiftyone_ecif.influence.targets import RetrievalTarget

        return RetrievalTarget(scope, batches)


class OwnLoss(PairLoss):
    """A function of the user's own, which no name stands for.

    Args:
        function: of the unit embeddings of images and captions, ``(n, d)`` each, and the similarity matrix,
            ``(n, n)``, of a batch, returning ``(n,)``, higher = worse.
    """

    says = "what a function of your own says"
    unit = "units of the target loss"

    def __init__(self, function: PairFunction) -> None:
        self.function, self.name = function, getattr(function, "__name__", "")

    @override
    def pair_losses(self, scope: Scope, images: Tensor, captions: Tensor, logits: Tensor) -> Tensor:
        return self.function(images, captions, logits)


def find_target_loss(loss: str | PairFunction) -> TargetLoss:
    """The loss of a name, or that of a function.

    Raises:
        EcifError: if there is none of the name
    """
    return OwnLoss(loss) if callable(loss) else TARGET_LOSSES[loss]
