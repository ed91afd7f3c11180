"""Embeddings that were made elsewhere, in place of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Never

from fiftyone_ecif.devices import choose_device
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import ScopeChoice
from fiftyone_ecif.models.dual_encoder import DualEncoder
from fiftyone_ecif.store.keys import digest

_HEADS = ["identity map behind the image embeddings", "identity map behind the caption embeddings"]


class GivenEmbeddings(DualEncoder):
    """Embeddings of pairs from any model of any library.

    What is attributed are linear maps behind them that start as the identity.

    Args:
        images: shape ``(N, d)``.
        captions: likewise, in the same space.
        scale: what cosines are multiplied with in the softmax loss, the inverse temperature.
        device (None): where the maps are fitted and solved for; by default a GPU where there is one.

    Attributes:
        rows: both embeddings.
    """

    def __init__(self, images: np.ndarray, captions: np.ndarray, scale: float, device: str | None = None) -> None:
        self.name, self.device, self.loss = "embeddings", choose_device(device), SoftmaxLoss()
        self.rows, self.scale = (images, captions), scale
        self.fingerprint = digest([str(scale), *(np.ascontiguousarray(side).data for side in (images, captions))])

    def scope(self, choice: ScopeChoice, seed: int = 0) -> Scope:
        """Two identity maps, shape ``(d, d)`` each."""
        image, text = (torch.eye(side.shape[1], dtype=torch.float64) for side in self.rows)
        return HeadScope(
            image, text, self.scale, loss=self.loss, with_scale=choice.with_scale, placement=self.placement
        )

    def scope_names(self, choice: ScopeChoice) -> list[str]:
        """What is attributed, in words."""
        return [*_HEADS, "logit_scale"] if choice.with_scale else list(_HEADS)

    def parameter_names(self) -> list[str]:
        """The same."""
        return [*_HEADS, "logit_scale"]

    def check_saves(self, choice: ScopeChoice) -> None:
        """Always refused.

        Raises:
            EcifError: as there is no model
        """
        self._refuse()

    def preprocess(self, image: Image.Image) -> Tensor:
        """Never called: nothing is encoded."""
        self._refuse()

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Never called: nothing is encoded."""
        self._refuse()

    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """Never called: nothing is encoded."""
        self._refuse()

    def save(self, path: Path, scope: Scope, theta: Tensor) -> None:
        """Never called, as :meth:`check_saves` refuses."""
        self._refuse()

    def _refuse(self) -> Never:
        raise EcifError(
            "The run is of embeddings, so there is no model to encode with or to write. Use a run of a model"
        )
