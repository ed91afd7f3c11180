"""What the library needs of a model with an image and a text tower, whatever it is made with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.influence.heads import FeatureBatches
from fiftyone_ecif.influence.losses import BatchLoss
from fiftyone_ecif.influence.objective import Batches
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import ScopeChoice
from fiftyone_ecif.models.inputs import Images, ImageTextBatches, loaded
from fiftyone_ecif.store.disk_matrix import DiskMatrix

T = TypeVar("T")
_PROMPTS_AT_ONCE = 128


class DualEncoder(ABC):
    """A loaded model with an image and a text tower, trained to match images and captions.

    A subclass says how inputs are prepared, what the frozen part of a tower
    makes of them, which parameters a scope means and how weights are written;
    how files and captions are read in batches follows from that. The model is
    in evaluation mode: what it computes depends on its inputs alone.

    Attributes:
        name: of the model, as it was asked for.
        device: where the towers run, such as ``"cpu"``.
        loss: what the model is trained with.
        fingerprint: hex digest of all that the features depend on: features
            are cached under it.
        notes: what is to be known of the model before its numbers are trusted, a sentence each.
        preprocess_jpeg: makes of a decoded JPEG file, uint8 of shape ``(3, h, w)``, what :meth:`preprocess` makes of
            the image, faster; None if such files are read like all others.
    """

    name: str
    device: str
    loss: BatchLoss
    fingerprint: str
    notes: Sequence[str] = ()
    preprocess_jpeg: Callable[[Tensor], Tensor] | None = None

    def finish(self, images: Tensor) -> Tensor:
        """Preprocessed images, ``(n, ...)``, on the device, as the image tower takes them: by default as they are."""
        return images

    @property
    def placement(self) -> Placement:
        """Where the heads are computed, and in which precision."""
        return Placement.of_heads(self.device)

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """Makes an image a tensor of one shape for all, which :meth:`finish` takes; several threads call it."""

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> Tensor:
        """What the text tower takes, on the device, shape ``(n, t)``; ``t`` may differ from call to call."""

    @abstractmethod
    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """What the final projection of a tower takes: all before it is frozen in a scope of the heads.

        Args:
            tower: ``"image"`` or ``"text"``.
            inputs: images as they come out of ``preprocess``, or tokens, ``n`` of them, at least one; on any device.

        Returns:
            shape ``(n, w)``, float32, on the CPU, without gradient; the last
            column is one if the projection has a bias. If the tower adds
            something to the projection, that follows, ``(n, d)``. If a tower has
            no final projection, its embeddings

        Raises:
            EcifError: if not even one input fits into memory
        """

    def start(self, tower: str, inputs: Tensor) -> Callable[[], Tensor]:
        """Begins with :meth:`features`, whose arguments it takes; what is returned gives them.

        By default all is done then. A model on a device of its own can begin, and be given more meanwhile.
        """
        return partial(self.features, tower, inputs)

    @abstractmethod
    def scope(self, choice: ScopeChoice, seed: int = 0) -> Scope:
        """The parameters that a choice means, as they were loaded.

        Args:
            choice: which. For the heads, an :class:`influence.heads.HeadScope`
                on features; every other scope is one on images and tokens.
            seed (0): of new adapters.

        Raises:
            EcifError: if the model has no such parameters
        """

    @abstractmethod
    def scope_names(self, choice: ScopeChoice) -> list[str]:
        """Names of the model's parameters in a scope, or of those that have an adapter in it.

        Raises:
            EcifError: if the model has no such parameters
        """

    @abstractmethod
    def parameter_names(self) -> list[str]:
        """Names of all parameters of the model, those of :meth:`scope_names` among them."""

    @abstractmethod
    def save(self, path: Path, scope: Scope, theta: Tensor) -> None:
        """Writes a checkpoint that can be given as ``pretrained`` with the same model name.

        Args:
            path: of the checkpoint. What goes with the weights, such as
                adapters and how images are prepared, is written beside it.
            scope: of this encoder.
            theta: its parameters, shape ``(p,)``; all others stay as they were loaded.

        Raises:
            EcifError: if a file cannot be written
        """

    def check_saves(self, choice: ScopeChoice) -> None:  # noqa: B027 - most models save every scope
        """Checks that :meth:`save` can write changed parameters of a scope.

        Args:
            choice: the scope.

        Raises:
            EcifError: if it cannot
        """

    @property
    def batch_size(self) -> int:
        """Inputs that are worth encoding at once."""
        return 512 if self.device.startswith("cuda") else 128

    def image_features(
        self, paths: Sequence[str], batch_size: int, num_workers: int
    ) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
        """Encodes image files, which threads read in the meantime.

        Args:
            paths: of the files.
            batch_size: images at once.
            num_workers: threads that read them; 0 for none but this one.

        Yields:
            for each batch, the indices into ``paths`` that were read, their
            features of shape ``(n, w)`` in float32, and ``{index: reason}`` of
            those that could not be read
        """
        pin = self.device.startswith("cuda")
        begun = (
            ((indices, failures), self.start("image", images) if indices else partial(torch.empty, 0))
            for indices, images, failures in loaded(self.images(paths), batch_size, num_workers, pin)
        )
        for (indices, failures), features in _one_ahead(begun):
            yield indices, features(), failures

    def images(self, paths: Sequence[str]) -> Images:
        """Image files, to be read when they are asked for."""
        return Images(paths, self.preprocess, self.preprocess_jpeg)

    def text_features(self, captions: Sequence[str], batch_size: int) -> Iterator[Tensor]:
        """Encodes captions; a caption longer than the model's context is cut, as in training.

        Args:
            captions: their texts.
            batch_size: captions at once.

        Yields:
            the features of each batch, shape ``(n, w)``, in float32
        """
        parts = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
        with ThreadPoolExecutor(1) as pool:  # the next ones are split into tokens meanwhile
            tokens = _one_ahead(pool.submit(self.tokens, part) for part in parts)
            for features in _one_ahead(self.start("text", each.result()) for each in tokens):
                yield features()

    def prompts(self, choice: ScopeChoice, texts: Sequence[str]) -> Tensor:
        """Texts as the text tower of a scope takes them.

        Returns:
            features of shape ``(n, w)`` where heads are computed, else tokens
            of shape ``(n, t)`` on the device
        """
        if choice.heads:
            features = torch.cat(list(self.text_features(texts, _PROMPTS_AT_ONCE)))
            return features.to(self.placement.device, self.placement.dtype)
        return self.tokens(texts)

    def batches(
        self,
        choice: ScopeChoice,
        paths: Sequence[str],
        captions: Sequence[str],
        partition: Sequence[Tensor],
        features: tuple[Tensor | DiskMatrix, Tensor | DiskMatrix] | None = None,
        twins: Tensor | None = None,
    ) -> Batches:
        """Pairs in batches, as a scope takes them.

        Args:
            choice: the scope.
            paths: image files that can be read.
            captions: one for each.
            partition: the row indices of each batch.
            features (None): of images and captions, ``(N, w_image)`` and
                ``(N, w_text)``, which the heads need; no other scope reads them.
            twins (None): by which equal pairs are told, shape ``(N, 2)`` (``losses.equal_pairs``), where these are not
                to be each other's negatives.
        """
        if choice.heads:
            assert features is not None
            return FeatureBatches(*features, partition, self.placement, twins)
        images, tokens = self.images(paths), self.tokens(captions)
        return ImageTextBatches(images, tokens, self.device, partition, self.finish, twins)


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same, but each is asked for before the one ahead of it is given."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
