"""Decoys: pairs that are known to be wrong, since their caption was taken from another pair.

What finds them among the pairs that are audited finds wrong captions, and how well it does is
known without a label. Searches of spectra are judged by decoys in the same way (Elias and Gygi 2007),
and learn from them (Percolator, Kaell et al. 2007).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fiftyone_ecif.misalignment.canonical import Rows
from fiftyone_ecif.misalignment.evidence import KINDS

DRAWN = (8, 8, 64)  # random captions of which the most similar one is taken, for each of KINDS; but any for the first
_ROWS = 1024  # whose candidates are compared at a time


class Decoys(NamedTuple):
    """Pairs that are known to be wrong.

    Attributes:
        image: the row that the image is of, shape ``(M,)``.
        caption: the row that the caption is of, likewise.
        kind: places in ``KINDS``, likewise.
    """

    image: Tensor
    caption: Tensor
    kind: np.ndarray


def draw_decoys(texts: Rows, fold: Tensor, same_caption: Tensor, usable: Tensor, seed: int = 0) -> Decoys:
    """Gives images a caption of another pair of their fold, one of each kind.

    A subtle mistake is only possible where there is a caption to be mistaken for, so of the
    subtle decoys the half is kept whose captions are the most alike.

    Args:
        texts: caption features, shape ``(N, w)``.
        fold: of each pair: a decoy is of one fold, so heads that were fitted without one have seen
            neither its image nor its caption. Shape ``(N,)``.
        same_caption: group numbers; captions of one are never exchanged. Shape ``(N,)``.
        usable: rows of images and captions to draw from.
        seed (0): fixes the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    centred = normalize(texts[usable].float() - texts[usable].float().mean(0), dim=1)
    drawn: list[tuple[Tensor, Tensor, int]] = []
    for kind, (name, count) in enumerate(zip(KINDS, DRAWN, strict=True)):
        found = []
        for number in torch.unique(fold[usable]):
            places = torch.nonzero(fold[usable] == number).flatten()
            for part in torch.split(places, _ROWS):
                others = places[torch.randint(len(places), (len(part), count), generator=generator)]
                if len(places) <= count:
                    others = places.expand(len(part), -1)
                alike = torch.einsum("nd,nkd->nk", centred[part], centred[others])
                if kind == 0:
                    alike = torch.rand(alike.shape, generator=generator)
                own = same_caption[usable[part]][:, None] == same_caption[usable[others]]
                best = alike.masked_fill(own, -torch.inf).max(1)
                found.append(
                    torch.stack([part.double(), others.gather(1, best.indices[:, None])[:, 0], best.values.double()])
                )
        image, caption, similarity = torch.cat(found, dim=1)
        least = similarity.median() if name == KINDS[-1] else -2.0
        keep = similarity.isfinite() & (similarity >= least)
        drawn.append((usable[image[keep].long()], usable[caption[keep].long()], kind))
    kinds = np.concatenate([np.full(len(image), kind) for image, _, kind in drawn])
    return Decoys(torch.cat([image for image, _, _ in drawn]), torch.cat([caption for _, caption, _ in drawn]), kinds)
