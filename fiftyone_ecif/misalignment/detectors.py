"""Detectors of misaligned pairs, by name. No heavy imports: forms read the names."""

from __future__ import annotations

from abc import ABC

from fiftyone_ecif.registry import Registry


class Detector(ABC):
    """What gives each pair a number, **higher = more suspicious**.

    Attributes:
        name: what it is chosen by.
        says: when it finds a pair suspicious, in a few words.
        source: where it comes from.
        evidence: what a high score says against a pair, for its reasons; None if it is not told.
        needs_training: whether it presumes that the model was trained on the pairs.
        needs_target: whether it needs validation pairs.
    """

    name: str
    says: str
    source: str = ""
    evidence: str | None = None
    needs_training = False
    needs_target = False


DETECTORS: Registry[Detector] = Registry("detector")


@DETECTORS.register
class Fused(Detector):
    """Several detectors together."""

    name = "fused"
    says = "several detectors together"
    source = "ours"


@DETECTORS.register
class ClipScore(Detector):
    """Image and caption are far apart."""

    name = "clip_score"
    says = "image and caption are far apart"
    source = "CLIPScore, arXiv 2104.08718"
    evidence = "low similarity"


@DETECTORS.register
class NegClipLoss(Detector):
    """Other images and captions fit better."""

    name = "neg_clip_loss"
    says = "other images and captions fit better"
    source = "negCLIPLoss, arXiv 2405.19547"


@DETECTORS.register
class Lemon(Detector):
    """Far apart, and from the neighbours too; weights of the paper."""

    name = "lemon"
    says = "far apart, and from the neighbours too; weights of the paper"
    source = "LEMoN with fixed weights, arXiv 2407.18941"


@DETECTORS.register
class LemonZ(Detector):
    """The same, all parts weighing alike."""

    name = "lemon_z"
    says = "the same, all parts weighing alike"
    source = "LEMoN's terms, arXiv 2407.18941"


@DETECTORS.register
class DeepKnn(Detector):
    """Similar images have other captions."""

    name = "deep_knn"
    says = "similar images have other captions"
    source = "deep k-NN, arXiv 2004.12289, with the caption for the label"
    evidence = "neighbours disagree"


@DETECTORS.register
class CrossFit(Detector):
    """Far apart for heads fitted without the pair."""

    name = "cross_fit"
    says = "far apart for heads fitted without the pair"
    source = "confident learning, arXiv 1911.00068"


@DETECTORS.register
class TrustedFit(Detector):
    """Lemon_z for heads fitted without the pair and all suspects."""

    name = "trusted_fit"
    says = "lemon_z for heads fitted without the pair and all suspects"
    source = "ours"


@DETECTORS.register
class Loss(Detector):
    """The pair's own loss."""

    name = "loss"
    says = "the pair's own loss"


@DETECTORS.register
class SelfInfluence(Detector):
    """The model knows the pair by heart."""

    name = "self_influence"
    says = "the model knows the pair by heart"
    source = "arXiv 2002.08484 with the curvature of arXiv 1703.04730"
    needs_training = True


@DETECTORS.register
class LooLoss(Detector):
    """The pair's loss had it not been trained on."""

    name = "loo_loss"
    says = "the pair's loss had it not been trained on"
    needs_training = True


@DETECTORS.register
class GlobalInfluence(Detector):
    """Harms the loss of validation pairs."""

    name = "global_influence"
    says = "harms the loss of validation pairs"
    source = "ECIF, arXiv 2411.11667"
    needs_training = True
    needs_target = True


@DETECTORS.register
class NeighbourInfluence(Detector):
    """Harms the loss of similar pairs."""

    name = "neighbour_influence"
    says = "harms the loss of similar pairs"
    source = "ours"
    evidence = "harms its neighbours"
    needs_training = True
