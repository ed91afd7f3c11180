"""What other data-attribution methods make of a CLIP model, as baselines.

Those methods are made for a loss that is a sum over samples. In a contrastive
batch each pair is also a negative of the others, so "the gradient of sample i"
can mean three things, none of which is the gradient of what removing it changes:

* :func:`hook_gradients`: what flows through the sample's own activations;
* :func:`anchor_gradients`: of the pair's own loss;
* :func:`frozen_gradients`: of its own loss, the others' embeddings being constants.

Each method scores the pairs by ``(1/N) grad f . C^-1 g_i`` with gradients ``g_i``
and a curvature ``C`` of its own: what it takes for the change of the target's mean
loss if the pair were removed, so positive = valuable, as everywhere in this
package. They are re-implementations on the tensors in scope, and are given bare
parameters such as ``in_proj_weight`` too, which the libraries' hooks miss.

Shapes: ``N`` pairs, ``p`` parameters, gradients ``(N, p)``, scores ``(N,)`` in
float64, rows in the order of the pairs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn.functional import normalize

from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.objective import Batches
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.models.tower_scope import TowerScope

_DAMPING = 0.1  # relative to the mean eigenvalue, in all of these methods but TRAK
_CHUNK = 16  # samples differentiated at once


class TensorSlice(NamedTuple):
    """Where one parameter tensor lies in a flat vector."""

    start: int
    stop: int
    shape: torch.Size


def tensor_slices(scope: HeadScope | TowerScope) -> list[TensorSlice]:
    """One for each tensor of a scope; a head scope's ``logit_scale`` is in none."""
    slices, start = [], 0
    for tensor in scope.split(scope.start):
        slices.append(TensorSlice(start, start + tensor.numel(), tensor.shape))
        start += tensor.numel()
    return slices


def hook_gradients(scope: Scope, theta: Tensor, batch: Any) -> Tensor:
    """The gradient of the whole batch's loss that flows through each pair's own embeddings, shape ``(n, p)``.

    What libraries see that record activations and output gradients by hooks
    (LogIX, kronfluence, dattri): ``dL_B/du_i`` and ``dL_B/dv_i`` pulled back
    through pair ``i`` alone. They add up to the gradient of ``L_B``, but for
    ``logit_scale``, which has no activations and gets zero. A pair's part counts
    how all losses move with its embeddings, but not how the pair, by its own loss
    and as a negative, moves the embeddings of the others.
    """

    def loss(images: Tensor, captions: Tensor) -> Tensor:
        return scope.loss.pair_losses(scope.logits(theta, images @ captions.T)).sum()

    return _pull_back(scope, theta, batch, grad(loss, argnums=(0, 1))(*_embeddings(scope, theta, batch)))


def anchor_gradients(scope: Scope, theta: Tensor, batch: Any) -> Tensor:
    """The gradient of each pair's own loss, the others of the batch being its negatives, shape ``(n, p)``.

    The positive role alone: it moves the negatives' embeddings too, but misses
    what the pair is to the others' losses.
    """
    gradients: Tensor = jacrev(lambda at: scope.loss.pair_losses(scope.similarity(at, batch)), chunk_size=_CHUNK)(theta)
    return gradients


def frozen_gradients(scope: Scope, theta: Tensor, batch: Any, output: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of an output of each pair while the others' embeddings are constants, shape ``(n, p)``.

    Args:
        scope: what varies.
        theta: its parameters, shape ``(p,)``.
        batch: what :meth:`Scope.similarity` takes.
        output: of each pair as a function of the similarity matrix, ``(n, n)`` to
            ``(n,)``: the pair losses, or TRAK's :func:`trak_output`.
    """
    images, captions = _embeddings(scope, theta, batch)
    through_pairs = jacrev(lambda u, v: output(scope.logits(theta, u @ v.T)), argnums=(0, 1))(images, captions)
    through_scale: Tensor = jacrev(lambda at: output(scope.logits(at, images @ captions.T)))(theta)
    return _pull_back(scope, theta, batch, [each.diagonal().T for each in through_pairs]) + through_scale


def _embeddings(scope: Scope, theta: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    images, captions = batch
    return (
        normalize(scope.embed_images(theta, images), dim=1),
        normalize(scope.embed_captions(theta, captions), dim=1),
    )


def _pull_back(scope: Scope, theta: Tensor, batch: Any, cotangents: Sequence[Tensor]) -> Tensor:
    """Cotangents of the unit embeddings of each pair, each ``(n, d)``, to the parameters, pair by pair."""

    def along(at: Tensor, image: Tensor, caption: Tensor, to_image: Tensor, to_caption: Tensor) -> Tensor:
        u, v = _embeddings(scope, at, (image[None], caption[None]))
        return u[0] @ to_image + v[0] @ to_caption

    gradients: Tensor = vmap(grad(along), in_dims=(None, 0, 0, 0, 0), chunk_size=_CHUNK)(theta, *batch, *cotangents)
    return gradients


def tracin(gradients: Tensor, target_gradient: Tensor) -> np.ndarray:
    """Dot products with the target's gradient at the final checkpoint (arXiv 2002.08484): no curvature.

    The learning rate is left out, so only ratios of the scores mean something.
    """
    return _scores(gradients.double() @ target_gradient.double())


def hook_logra(gradients: Tensor, target_gradient: Tensor, slices: Sequence[TensorSlice], rank: int = 32) -> np.ndarray:
    """LoGra, as in LogIX (arXiv 2405.13954): each matrix projected, the damped covariance of the result as curvature.

    Takes hook gradients for per-sample ones, and their covariance, an empirical
    Fisher matrix, for the Hessian of a loss that couples the pairs. Each matrix
    is projected on both sides onto the principal directions of its gradients;
    other tensors are skipped, as hooks on linear layers do.

    Args:
        gradients: shape ``(N, p)``.
        target_gradient: shape ``(p,)``.
        slices: the tensors in it.
        rank (32): of the projection on either side.
    """
    total = target_gradient.new_zeros(len(gradients), dtype=torch.float64)
    for samples, target in _tensors(gradients, target_gradient, slices):
        if target.ndim != 2:
            continue
        left, right = (basis[:, -rank:] for basis in _kronecker_basis(samples))
        projected = (left.T @ samples @ right).flatten(1)
        curvature = projected.T @ projected / len(projected)
        curvature.diagonal().add_(_DAMPING * curvature.diagonal().mean())
        total += projected @ torch.linalg.solve(curvature, (left.T @ target @ right).flatten())
    return _scores(total)


def datainf(gradients: Tensor, target_gradient: Tensor, slices: Sequence[TensorSlice]) -> np.ndarray:
    """DataInf (arXiv 2310.00902): the inverse of a mean is replaced by the mean of inverses, tensor by tensor.

    ``C^-1 = (1/N) sum_i (g_i g_i^T + damping)^-1`` in closed form. Takes hook
    gradients for per-sample ones, and their outer products for a Hessian of a
    loss that couples the pairs.

    Args:
        gradients: shape ``(N, p)``.
        target_gradient: shape ``(p,)``.
        slices: the tensors in it.
    """
    total = target_gradient.new_zeros(len(gradients), dtype=torch.float64)
    for samples, target in _tensors(gradients, target_gradient, slices):
        samples, target = samples.flatten(1), target.flatten()
        squares = samples.square().sum(1)
        damping = _DAMPING * squares.mean() / len(target)
        solved = (target - samples.T @ (samples @ target / (damping + squares)) / len(samples)) / damping
        total += samples @ solved
    return _scores(total)


def ekfac(gradients: Tensor, target_gradient: Tensor, slices: Sequence[TensorSlice]) -> np.ndarray:
    """EK-FAC, as in kronfluence (arXiv 2308.03296, 1806.03884): diagonal in a Kronecker-factored basis.

    Takes hook gradients for per-sample ones, and their second moments for the
    Hessian of a loss that couples the pairs. The factors of a matrix's basis are
    ``E[G G^T]`` and ``E[G^T G]`` of its gradients ``G``, not of layer inputs and
    output gradients, which a gradient does not keep. Where ``G`` is an outer
    product (the heads), each sample's input is thereby weighted by the square
    of its output gradient and vice versa, which changes nothing under K-FAC's
    assumption that the two are independent; in a layer over tokens the two
    bases differ further. Other tensors keep their diagonal.

    Args:
        gradients: shape ``(N, p)``.
        target_gradient: shape ``(p,)``.
        slices: the tensors in it.
    """
    total = target_gradient.new_zeros(len(gradients), dtype=torch.float64)
    for samples, target in _tensors(gradients, target_gradient, slices):
        if target.ndim == 2:
            left, right = _kronecker_basis(samples)
            samples, target = left.T @ samples @ right, left.T @ target @ right
        moments = samples.square().mean(0)
        total += (samples * (target / (moments + _DAMPING * moments.mean()))).flatten(1).sum(1)
    return _scores(total)


def _tensors(
    gradients: Tensor, target_gradient: Tensor, slices: Sequence[TensorSlice]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples' and the target's gradients of each tensor that has any, in float64.

    ``(N, a, b)`` and ``(a, b)`` of a matrix, ``(N, d)`` and ``(d,)`` of other tensors.
    """
    for start, stop, shape in slices:
        samples, target = gradients[:, start:stop], target_gradient[start:stop]
        if samples.any():
            form = shape if len(shape) == 2 else (-1,)
            yield samples.double().view(len(samples), *form), target.double().view(form)


def _kronecker_basis(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the mean ``G G^T`` and ``G^T G`` of matrices ``(N, a, b)``, as columns, weakest first."""
    return (
        torch.linalg.eigh(torch.einsum("nab,ncb->ac", samples, samples)).eigenvectors,
        torch.linalg.eigh(torch.einsum("nab,nac->bc", samples, samples)).eigenvectors,
    )


def trak_output(similarity: Tensor) -> Tensor:
    """TRAK's output function of each pair, ``log p / (1 - p)`` of picking its caption plus that of its image.

    ``f_i = -logsumexp_{j != i} (S_ij - S_ii) - logsumexp_{j != i} (S_ji - S_ii)``, shape ``(n,)``. Source:
    Section 5.1 of arXiv 2303.14186, with the temperature in, which makes each part the log odds.
    """
    others = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool, device=similarity.device), -torch.inf)
    return 2 * similarity.diagonal() - others.logsumexp(1) - others.logsumexp(0)


def trak_weight(similarity: Tensor) -> Tensor:
    """TRAK's slope of a pair's loss in its output, ``1 - p`` with ``p`` the mean of both directions, shape ``(n,)``."""
    return 1 - (similarity.softmax(1) + similarity.softmax(0)).diagonal() / 2


def trak(gradients: Tensor, weights: Tensor, target_gradient: Tensor, projection: Tensor) -> np.ndarray:
    """TRAK (arXiv 2303.14186), repaired: one Newton step of a logistic regression on projected gradients.

    The library takes the negatives of an output from a random sample of the data
    and its slope within the batch it is given, which is one pair, where slope and
    score are zero; here both are of the training batch, the negatives frozen. The
    pair is still no negative of the others, and the curvature ``Phi^T Phi`` lacks
    the weights ``p (1 - p)`` of a Newton step.

    Args:
        gradients: of the outputs, shape ``(N, p)``.
        weights: slopes of the losses in the outputs, shape ``(N,)``.
        target_gradient: shape ``(p,)``.
        projection: shape ``(p, k)``.
    """
    features = (gradients @ projection.to(gradients)).double()
    kernel = features.T @ features / len(features)
    kernel.diagonal().add_(1e-6 * kernel.diagonal().mean())
    solved = torch.linalg.solve(kernel, target_gradient.double() @ projection.double())
    return _scores(-weights * (features @ solved))  # the loss falls as the output rises


def gaussian_projection(parameters: int, dimensions: int = 512, seed: int = 0) -> Tensor:
    """Random directions that keep dot products on average, shape ``(p, k)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(parameters, dimensions, generator=generator) / math.sqrt(dimensions)


def _scores(products: Tensor) -> np.ndarray:
    """``(1/N) grad f . C^-1 g_i`` from the products, in float64."""
    scores: np.ndarray = (products.double() / len(products)).cpu().numpy()
    return scores


@dataclass
class Problem:
    """Pairs, a model and a target; per-sample gradients are computed once and shared by the methods.

    Attributes:
        scope: what varies.
        theta: its parameters, shape ``(p,)``.
        batches: the training pairs.
        pairs: ``N``, how many they are.
        target_gradient: the gradient of the target's mean loss, shape ``(p,)``.
    """

    scope: HeadScope | TowerScope
    theta: Tensor
    batches: Batches
    pairs: int
    target_gradient: Tensor

    @cached_property
    def hook(self) -> Tensor:
        """:func:`hook_gradients` of all pairs, shape ``(N, p)``."""
        return self.stacked(lambda batch: hook_gradients(self.scope, self.theta, batch), len(self.theta))

    @cached_property
    def anchor(self) -> Tensor:
        """:func:`anchor_gradients` of all pairs, shape ``(N, p)``."""
        return self.stacked(lambda batch: anchor_gradients(self.scope, self.theta, batch), len(self.theta))

    @cached_property
    def frozen(self) -> Tensor:
        """:func:`frozen_gradients` of the losses of all pairs, shape ``(N, p)``."""
        losses = self.scope.loss.pair_losses
        return self.stacked(lambda batch: frozen_gradients(self.scope, self.theta, batch, losses), len(self.theta))

    @cached_property
    def outputs(self) -> Tensor:
        """:func:`frozen_gradients` of TRAK's output of all pairs, shape ``(N, p)``."""
        return self.stacked(lambda batch: frozen_gradients(self.scope, self.theta, batch, trak_output), len(self.theta))

    def towards(self, target_gradient: Tensor) -> Problem:
        """The same pairs with another target; the gradients that are computed are shared."""
        other = copy.copy(self)
        other.target_gradient = target_gradient
        return other

    @cached_property
    def slices(self) -> list[TensorSlice]:
        """The tensors in scope."""
        return tensor_slices(self.scope)

    def stacked(self, function: Callable[[Any], Tensor], *shape: int) -> Tensor:
        """A function of each batch, ``(n, *shape)``, in the order of the pairs and float32, ``(N, *shape)``."""
        rows = torch.empty(self.pairs, *shape, device=self.theta.device)
        for indices, batch in zip(self.batches.partition, self.batches, strict=True):
            rows[indices] = function(batch).to(rows)
        return rows


def _trak(problem: Problem) -> np.ndarray:
    scope, theta = problem.scope, problem.theta
    weights = problem.stacked(lambda batch: trak_weight(scope.similarity(theta, batch)))
    return trak(problem.outputs, weights, problem.target_gradient, gaussian_projection(len(theta)).to(theta.device))


#: The methods by name. TracIn comes with each meaning of a sample's gradient.
PEERS: dict[str, Callable[[Problem], np.ndarray]] = {
    "tracin": lambda problem: tracin(problem.hook, problem.target_gradient),
    "tracin_anchor": lambda problem: tracin(problem.anchor, problem.target_gradient),
    "tracin_frozen": lambda problem: tracin(problem.frozen, problem.target_gradient),
    "hook_logra": lambda problem: hook_logra(problem.hook, problem.target_gradient, problem.slices),
    "trak": _trak,
    "datainf": lambda problem: datainf(problem.hook, problem.target_gradient, problem.slices),
    "ekfac": lambda problem: ekfac(problem.hook, problem.target_gradient, problem.slices),
}
