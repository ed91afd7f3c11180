"""Losses that influence is measured on, by name. No heavy imports: forms read the names."""

from __future__ import annotations

from abc import ABC

from fiftyone_ecif.registry import Registry


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


TARGET_LOSSES: Registry[TargetLoss] = Registry("target_loss")


@TARGET_LOSSES.register
class Contrastive(TargetLoss):
    """The pairs' own contrastive loss."""

    name = "contrastive"
    says = "to match images and captions"
    unit = "nats"


@TARGET_LOSSES.register
class ZeroShot(TargetLoss):
    """Zero-shot classification."""

    name = "zero_shot"
    says = "to name the class of an image"
    unit = "nats"
    needs_labels = True


@TARGET_LOSSES.register
class RetrievalMargin(TargetLoss):
    """The margin of retrieval."""

    name = "retrieval_margin"
    says = "how far the own caption is ahead of the others"
    unit = "units of the target loss"
