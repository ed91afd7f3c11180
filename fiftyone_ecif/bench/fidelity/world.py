"""The small world that benchmarks run in: real pairs, a trained open_clip model, its features.

The pairs are the demo's scenes of handwritten digits, a fifth of the training
captions spoiled. The model, ``ecif-tiny``, is a two-layer ViT with a two-layer
text tower, trained on them from scratch.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn

from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.demo import scenes, training
from fiftyone_ecif.influence.heads import FeatureBatches
from fiftyone_ecif.influence.objective import Batches, random_partition
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.influence.target_losses import Contrastive
from fiftyone_ecif.influence.targets import Target
from fiftyone_ecif.models.inputs import ImageTextBatches
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.models.tower_scope import TowerScope
from fiftyone_ecif.store.files import cache_folder
from fiftyone_ecif.store.keys import digest

MODEL = "ecif-tiny"


@dataclass(frozen=True)
class World:
    """Pairs and a model.

    Attributes:
        pairs: the training pairs, then the validation pairs.
        training: how many are training pairs.
        encoder: the model.
        network: its weights in float64, so that retraining reaches its minimum to many digits.
        paths: image files of all pairs.
    """

    pairs: list[scenes.Pair]
    training: int
    encoder: OpenClipEncoder
    network: nn.Module
    paths: list[str]

    @property
    def validation(self) -> int:
        """How many validation pairs there are."""
        return len(self.pairs) - self.training

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Of images and captions of all pairs, float64."""
        images = [rows for _, rows, _ in self.encoder.image_features(self.paths, 256, 0)]
        texts = self.encoder.text_features([pair.caption for pair in self.pairs], 256)
        return torch.cat(images).double(), torch.cat(list(texts)).double()

    def scope(self, text: str) -> Scope:
        """A scope by its name."""
        choice = parse_scope(text)
        if choice.heads:
            return self.encoder.scope(choice)
        return TowerScope(self.network, self.encoder.scope_names(choice), self.encoder.loss, choice.rank)

    def batches(self, text: str, rows: Tensor, batch_size: int, seed: int) -> Batches:
        """Some pairs in random batches, as a scope takes them."""
        partition = random_partition(len(rows), batch_size, seed)
        if parse_scope(text).heads:
            images, texts = self.features
            return FeatureBatches(images[rows], texts[rows], partition)
        files = self.encoder.images([self.paths[row] for row in rows.tolist()])
        tokens = self.encoder.tokens([self.pairs[row].caption for row in rows.tolist()])
        return _Double(files, tokens, self.encoder.device, partition, self.encoder.finish)

    def target(self, text: str, scope: Scope, batch_size: int, count: int | None = None) -> Target:
        """The contrastive loss of the first validation pairs, all by default."""
        rows = torch.arange(self.training, self.training + (count or self.validation))
        batches = self.batches(text, rows, batch_size, seed=0)
        return Contrastive().make(scope, batches)


class _Double(ImageTextBatches):
    """Pixels in float64."""

    def images_of(self, rows: Tensor, keep: bool = True) -> Tensor:
        """In the precision of the network."""
        return super().images_of(rows, keep).double()


def make_world(training_pairs: int, validation: int, steps: int, seed: int = 0, noise: float = 0.2) -> World:
    """Makes the pairs and trains the model on them; kept in the cache folder for the next call.

    Args:
        training_pairs: how many to train on.
        validation: how many to hold out.
        steps: batches that the model is trained on.
        seed (0): fixes everything.
        noise (0.2): share of training captions to spoil.
    """
    recipe = [training_pairs, validation, steps, seed, noise, inspect.getsource(scenes), inspect.getsource(training)]
    folder = cache_folder() / "bench" / digest(repr(recipe), size=8)
    pairs = scenes.make_pairs(training_pairs, noise, seed, validation)
    paths = [folder / f"{number:05d}.png" for number in range(len(pairs))]
    checkpoint = folder / "model.pt"
    if not checkpoint.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for pair, path in zip(pairs, paths, strict=True):
            Image.fromarray(pair.image).save(path)
        captions = [pair.caption for pair in pairs[:training_pairs]]
        work = training.train(paths[:training_pairs], captions, checkpoint, steps, seed, model=MODEL)
        follow(work, progress=False)
    encoder = OpenClipEncoder(MODEL, str(checkpoint), "cpu")
    network = copy.deepcopy(encoder.model).double()
    return World(pairs, training_pairs, encoder, network, [str(path) for path in paths])
