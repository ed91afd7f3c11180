"""What speaks against pairs, and against decoys: pairs that are known to be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Models that pairs are seen by: the weights as loaded, heads fitted without the pair from there, heads in closed
#: form without the pair, and the features that all of them start from.
MODELS = LOADED, FITTED, CANONICAL, FEATURES = "loaded", "fitted", "canonical", "features"
#: What only the weights as loaded are asked: heads that were fitted to other pairs claim the captions of those.
MATCHING = "matching"
#: Signals, and what they say in a curator's words.
WORDS = {
    "distance": "image and caption are far apart",
    "competition": "other images or captions fit better",
    "margin": "other images or captions fit better",
    MATCHING: "other images or captions fit better",
    "image_agreement": "images like it have other captions",
    "caption_agreement": "captions like it have other images",
    "image_influence": "training on it hurts pairs like it",
    "caption_influence": "training on it hurts pairs like it",
}
#: Signals of a model that compares images with captions.
SIGNALS = tuple(name for name in WORDS if name != MATCHING)
#: Those of features alone, which need no model that compares the two.
FEATURE_SIGNALS = ("image_agreement", "caption_agreement")
#: The part of the tables with the pairs that are like each.
NEAR = "near"
#: Decoys by how like the wrong caption is to the right one.
KINDS = ("random", "similar", "subtle")


@dataclass(frozen=True)
class Evidence:
    """Signals of pairs and of decoys.

    Attributes:
        names: ``model:signal`` of each column.
        pairs: shape ``(N, S)``, float32, higher = more suspicious.
        decoys: likewise, shape ``(M, S)``.
        kind: of each decoy, a place in :data:`KINDS`; shape ``(M,)``.
        fold: of each pair: signals of fitted and canonical heads are by heads made without it. Shape ``(N,)``.
        decoy_fold: of each decoy, likewise.
        sampled: which pairs the decoys stand beside; all, unless they are very many. Bool, shape ``(N,)``.
        seen: whether the weights as loaded were fitted to the pairs, so that what they say of them tells little.
        near: rows of the pairs whose images are most like each one's, the nearest first, shape ``(N, k)``; None if
            that is not known.
        alike: cosine of their centred image features, likewise.
    """

    names: tuple[str, ...]
    pairs: np.ndarray
    decoys: np.ndarray
    kind: np.ndarray
    fold: np.ndarray
    decoy_fold: np.ndarray
    sampled: np.ndarray
    seen: bool = False
    near: np.ndarray | None = None
    alike: np.ndarray | None = None

    def tables(self) -> dict[str, dict[str, np.ndarray]]:
        """Columns of pairs and of decoys, from which :meth:`from_tables` makes it again."""
        pairs, decoys = (dict(zip(self.names, rows.T, strict=True)) for rows in (self.pairs, self.decoys))
        return {
            "pairs": {**pairs, "fold": self.fold, "sampled": self.sampled},
            **({} if self.near is None else {NEAR: {"row": self.near, "cosine": self.alike}}),
            "decoys": {**decoys, "fold": self.decoy_fold, "kind": self.kind},
        }

    @classmethod
    def from_tables(
        cls, names: Sequence[str], pairs: Mapping[str, Any], decoys: Mapping[str, Any], seen: bool
    ) -> Evidence:
        """What :meth:`tables` gave, and what it does not hold; who is like whom is left out."""
        of_pairs, of_decoys = (np.stack([table[name] for name in names], axis=1) for table in (pairs, decoys))
        return cls(
            tuple(names),
            of_pairs,
            of_decoys,
            decoys["kind"],
            pairs["fold"],
            decoys["fold"],
            pairs["sampled"].astype(bool),
            seen,
        )
