"""Detectors of misaligned pairs, by name: a caption that does not belong to its image.

No heavy imports: forms read the names. Arrays in, scores out: every detector
gives each pair a number, **higher = more suspicious**. In what follows ``u``,
``v`` are the unit embeddings of images and captions, ``s_ij = u_i . v_j``,
``t`` is the temperature of the model and ``g_n`` the removal gradient of a pair
(see :mod:`fiftyone_ecif.influence.head_gradients`).

Influence tells about the pairs that a model was trained on, and misleads about
others: see :attr:`Detector.needs_training`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import TYPE_CHECKING

from typing_extensions import override

from fiftyone_ecif.progress import Progress
from fiftyone_ecif.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fiftyone_ecif.misalignment.embeddings import DetectorInputs
    from fiftyone_ecif.misalignment.findings import Findings


class Detector(ABC):
    """What gives each pair a number, **higher = more suspicious**.

    Attributes:
        name: what it is chosen by.
        says: when it finds a pair suspicious, in a few words.
        source: where it comes from.
        needs: names of detectors whose scores it reads. Those among them that presume training are not there
            where there was none.
        needs_training: whether it presumes that the model was trained on the pairs, so that their gradients are
            there.
        needs_target: whether it needs validation pairs, so that the influence on them is there.
        refits: whether it fits heads anew. Such detectors come after all that compare pairs with the model as it is.
    """

    name: str
    says: str
    source: str = ""
    needs: tuple[str, ...] = ()
    needs_training = False
    needs_target = False
    refits = False

    @abstractmethod
    def score(
        self, inputs: DetectorInputs, found: Findings
    ) -> np.ndarray | Tensor | Generator[Progress, None, np.ndarray | Tensor]:
        """How suspicious each pair is, shape ``(N,)``; where that takes long, as a generator of its progress.

        Args:
            inputs: the pairs and the model.
            found: what other detectors have said so far, those that it needs among them.

        Raises:
            EcifError: if it cannot be computed for these pairs
        """


DETECTORS: Registry[Detector] = Registry("detector")


@DETECTORS.register
class Calibrated(Detector):
    """Many signals, weighed by how well they find decoys: log odds that a pair looks like one.

    Signals of the weights as loaded and of heads made without the pair, from
    :mod:`fiftyone_ecif.misalignment.gathering`; weighed in
    :mod:`fiftyone_ecif.misalignment.judgement`.
    """

    name = "calibrated"
    says = "what tells wrong captions from right ones here, learned from pairs that are known to be wrong"
    source = "ours; decoys as in Percolator (doi 10.1038/nmeth1113)"
    refits = True

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Generator[Progress, None, np.ndarray]:
        from fiftyone_ecif.misalignment.gathering import gather_evidence
        from fiftyone_ecif.misalignment.judgement import judge

        found.evidence = yield from gather_evidence(inputs)
        found.judgement = judge(found.evidence)
        return found.judgement.score


@DETECTORS.register
class ClipScore(Detector):
    """``1 - s_ii``."""

    name = "clip_score"
    says = "image and caption are far apart"
    source = "CLIPScore, arXiv 2104.08718"

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Tensor:
        return inputs.model.distance


@DETECTORS.register
class NegClipLoss(Detector):
    """``-s_ii + t/2 (logsumexp_j s_ij/t + logsumexp_j s_ji/t)``, the mean over 10 random partitions into batches.

    False negatives, pairs that share the image or the caption, are left out.
    """

    name = "neg_clip_loss"
    says = "other images and captions fit better"
    source = "negCLIPLoss, arXiv 2405.19547"

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Tensor:
        from fiftyone_ecif.misalignment.losses import neg_clip_losses

        return neg_clip_losses(inputs)


@DETECTORS.register
class Lemon(Detector):
    """``d_i + 5 a_i + 5 b_i`` with 30 neighbours.

    ``d_i = 1 - s_ii``, ``a_i`` is the mean over the nearest images ``j`` of
    ``(1 - v_i.v_j) e^(-0.1 (1 - u_i.u_j)) e^(-5 d_j)``, and ``b_i`` likewise over
    the nearest captions.
    """

    name = "lemon"
    says = "far apart, and from the neighbours too; weights of the paper"
    source = "LEMoN with fixed weights, arXiv 2407.18941"

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Tensor:
        from fiftyone_ecif.misalignment.embeddings import NEIGHBOURS

        a, b = inputs.model.disagreement(NEIGHBOURS)
        return inputs.model.distance + 5 * a + 5 * b


@DETECTORS.register
class LemonZ(Detector):
    """The three terms of :class:`Lemon` standardised and added, 5 neighbours."""

    name = "lemon_z"
    says = "the same, all parts weighing alike"
    source = "LEMoN's terms, arXiv 2407.18941"

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Tensor:
        return inputs.model.lemon_z()


@DETECTORS.register
class DeepKnn(Detector):
    """The mean of ``1 - v_i.v_j`` over the 30 nearest images ``j``."""

    name = "deep_knn"
    says = "similar images have other captions"
    source = "deep k-NN, arXiv 2004.12289, with the caption for the label"

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Tensor:
        from fiftyone_ecif.misalignment.embeddings import NEIGHBOURS

        space = inputs.model
        return space.other_distance(space.neighbours[0], space.captions, NEIGHBOURS).mean(1)


@DETECTORS.register
class CrossFit(Detector):
    """``1 - s_ii`` where both heads were fitted without the pair, in five folds."""

    name = "cross_fit"
    says = "far apart for heads fitted without the pair"
    source = "confident learning, arXiv 1911.00068"
    refits = True

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Generator[Progress, None, np.ndarray]:
        from fiftyone_ecif.misalignment.cross_fitting import refit_held_out

        return (yield from refit_held_out(inputs))


@DETECTORS.register
class Loss(Detector):
    """The pair's own loss in its batch."""

    name = "loss"
    says = "the pair's own loss"

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> Tensor:
        from fiftyone_ecif.misalignment.losses import own_losses

        return own_losses(inputs)


@DETECTORS.register
class SelfInfluence(Detector):
    """The change of the pair's own loss if it had not been trained on, in nats."""

    name = "self_influence"
    says = "the model knows the pair by heart"
    source = "arXiv 2002.08484 with the curvature of arXiv 1703.04730"
    needs_training = True

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> np.ndarray:
        assert inputs.gradients is not None
        return inputs.gradients.self_influence()


@DETECTORS.register
class LooLoss(Detector):
    """The pair's own loss if it had not been trained on: ``loss + self_influence``, in nats."""

    name = "loo_loss"
    says = "the pair's loss had it not been trained on"
    needs_training = True

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> np.ndarray:
        loss: np.ndarray = Loss().score(inputs, found).numpy() + SelfInfluence().score(inputs, found)
        return loss


@DETECTORS.register
class GlobalInfluence(Detector):
    """Minus the influence on a validation set: how the ECIF paper looks for misaligned pairs."""

    name = "global_influence"
    says = "harms the loss of validation pairs"
    source = "ECIF, arXiv 2411.11667"
    needs_training = True
    needs_target = True

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> np.ndarray:
        assert inputs.influence is not None
        return -inputs.influence


@DETECTORS.register
class NeighbourInfluence(Detector):
    """What the pair does to the loss of its neighbours, the nearest 30 images and 30 captions.

    Minus the mean over them, ``m``, of ``cos(H^-1 g_n, g_m)``, taken with the
    positive part of ``g`` and with the whole, and added.
    """

    name = "neighbour_influence"
    says = "harms the loss of similar pairs"
    source = "ours"
    needs_training = True

    @override
    def score(self, inputs: DetectorInputs, found: Findings) -> np.ndarray:
        from fiftyone_ecif.misalignment.neighbour_influence import neighbour_influence

        assert inputs.gradients is not None
        near = [side.rows for side in inputs.model.neighbours]
        positive, curvature = inputs.gradients.positive, inputs.gradients.curvature
        whole = positive + inputs.gradients.negative
        agreement = neighbour_influence(positive, curvature, near) + neighbour_influence(whole, curvature, near)
        harm: np.ndarray = -agreement
        return harm
