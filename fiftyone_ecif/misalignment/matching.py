"""Who has a claim to whom, if each image has one caption and each caption one image.

Another image to which a caption fits better speaks against the caption's own only if that image has none that fits it
better still. In a matching of images with captions, in which each edge weighs ``exp(w)``, belief propagation finds the
odds of every edge (Bayati, Shah and Sharma 2008; Vontobel 2013): ``m_ik = -log sum_{l != k} exp(w_il + n_il)`` says
how free image ``i`` is for caption ``k``, ``n_ik = -log sum_{j != i} exp(w_jk + m_jk)`` how free the caption is for
the image, and ``w + m + n`` are the log odds that they belong together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 15
_DAMPING = 0.5
_LEAST = 1e-6  # share of a sum up to which float32 tells what is left of it


class Freedom(NamedTuple):
    """How free captions are for images, or images for captions.

    Attributes:
        known: for each of those that were matched, shape ``(R, R)``; a row is of the one that asks.
        others: for any that was not, shape ``(R,)``.
    """

    known: Tensor
    others: Tensor

    def asked_by(self, places: Tensor) -> Tensor:
        """For some of the matched ones, -1 being any other; shape ``(M, R)``."""
        places = places.to(self.known.device)
        return torch.where((places >= 0)[:, None], self.known[places], self.others)


def match(weights: Tensor, same_image: Tensor, same_caption: Tensor) -> tuple[Freedom, Freedom]:
    """Belief propagation between images and captions.

    Args:
        weights: of each image with each caption, shape ``(R, R)``.
        same_image: group numbers: images of one are the same and not held against each other, shape ``(R,)``.
        same_caption: likewise.

    Returns:
        how free captions are for images, and images for captions
    """
    captions = torch.zeros_like(weights)
    for _ in range(_STEPS):
        images, any_image = _free(weights + captions, same_caption)
        found, any_caption = _free((weights + images).T, same_image)
        captions = torch.lerp(captions, found.T, _DAMPING)
    return Freedom(captions, any_caption), Freedom(images.T, any_image)


def _free(claims: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the logarithm of the sum of each row, without each column's group, ``(R, R)``, and with all, ``(R,)``."""
    most = claims.max(1, keepdim=True).values
    share = (claims - most).exp()
    whole = share.sum(1, keepdim=True)
    own = share.new_zeros(len(share), int(groups.max()) + 1).index_add_(1, groups, share)[:, groups]
    left = (whole - own).clamp_min(_LEAST * whole)
    return -(most + left.log()), -(most + whole.log())[:, 0]
