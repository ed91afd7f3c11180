"""An open_clip model: its frozen features and the heads behind them.

The features of a tower are what enters its final projection. They are computed
by running the tower with that projection replaced by the identity, which works
alike for a bare parameter (``visual.proj``), a linear layer and the output
projection of an attention pool.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from open_clip.factory import parse_model_name
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from .errors import EcifError
from .heads import HeadScope

open_clip.add_model_config(Path(__file__).parent / "model_configs")

_HEADS = {
    "image": ("visual.proj", "visual.attnpool.c_proj", "visual.head.proj"),
    "text": ("text_projection", "text.text_projection", "text.proj"),
}


@dataclass(frozen=True)
class Head:
    """The last, linear layer of a tower: where its weight is in the model.

    Attributes:
        weight: the parameter's name.
        bias: the bias's name, or None.
        transposed: whether the weight is stored as ``(d, w)``, as in ``nn.Linear``.
    """

    weight: str
    bias: str | None
    transposed: bool

    def matrix(self, model: nn.Module) -> Tensor:
        """Shape ``(w, d)``, in float64; with a bias, ``(w + 1, d)``."""
        weight = model.get_parameter(self.weight).detach().double()
        rows = [weight.T if self.transposed else weight]
        if self.bias:
            rows.append(model.get_parameter(self.bias).detach().double()[None])
        return torch.cat(rows)

    def identity(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameters that make the head pass its input through."""
        weight = model.get_parameter(self.weight)
        width = weight.shape[1 if self.transposed else 0]
        replaced = {self.weight: torch.eye(width, dtype=weight.dtype, device=weight.device)}
        if self.bias:
            replaced[self.bias] = torch.zeros(width, dtype=weight.dtype, device=weight.device)
        return replaced


class Encoder:
    """A loaded open_clip model.

    Args:
        model: a model name of open_clip, or ``local-dir:…`` / ``hf-hub:…``.
        pretrained: a pretrained tag of that model, or the path of a checkpoint;
            None only for the two forms that bring their own weights.
        device (None): where the towers run: ``"cpu"``, ``"cuda"`` or another torch
            device; by default a GPU where there is one.

    Attributes:
        fingerprint: hex digest of all that the features depend on:
            architecture, weights, preprocessing and tokenizer.

    Raises:
        EcifError: if the model, the tag, the checkpoint or the device does not
            exist, or the model has no softmax loss or no linear heads
    """

    def __init__(self, model: str, pretrained: str | None = None, device: str | None = None) -> None:
        self.device = choose_device(device)
        check_names(model, pretrained)
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model, pretrained=pretrained, device=self.device
            )
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip, the hub and torch raise many kinds here
            raise EcifError(
                f"open_clip could not load model {model!r} with pretrained={pretrained!r}: {error}"
            ) from error
        self.model.eval().requires_grad_(False)
        if getattr(self.model, "logit_bias", None) is not None:
            raise EcifError(f"{model} is trained with a sigmoid loss; influence is available for softmax models only")
        self.heads = {tower: _find_head(self.model, model, tower) for tower in _HEADS}
        self.fingerprint = self._fingerprint(model)
        self._verified: set[str] = set()

    def scope(self) -> HeadScope:
        """Both heads as they were loaded, in float64, on the CPU."""
        scale = self.model.logit_scale.detach().double().exp().item()
        image, text = (self.heads[tower].matrix(self.model).cpu() for tower in ("image", "text"))
        if not (torch.isfinite(image).all() and torch.isfinite(text).all() and np.isfinite(scale)):
            raise EcifError("The model's weights hold NaN or infinity. Load another checkpoint")
        return HeadScope(image, text, scale)

    def head_parameters(self) -> list[str]:
        """Names of the parameters in the head scope."""
        return [name for head in self.heads.values() for name in (head.weight, head.bias) if name]

    def image_features(
        self, paths: Sequence[str], batch_size: int, num_workers: int
    ) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
        """Encodes image files.

        Yields:
            for each batch, the indices into ``paths`` that were read, their
            features of shape ``(n, w)`` in float32, and ``{index: reason}`` of
            those that could not be read
        """
        loader: DataLoader[Any] = DataLoader(
            _Images(paths, self.preprocess), batch_size=batch_size, num_workers=num_workers, collate_fn=list
        )
        for batch in loader:
            good = [(index, image) for index, image, reason in batch if reason is None]
            failures = {index: reason for index, _, reason in batch if reason is not None}
            images = torch.stack([image for _, image in good]) if good else torch.empty(0)
            yield [index for index, _ in good], self._features("image", images), failures

    def text_features(self, captions: Sequence[str], batch_size: int) -> Iterator[Tensor]:
        """Encodes captions; a caption longer than the model's context is cut, as in training.

        Yields:
            the features of each batch, shape ``(n, w)``, in float32
        """
        for start in range(0, len(captions), batch_size):
            yield self._features("text", self.tokenizer(list(captions[start : start + batch_size])))

    @torch.no_grad()
    def _features(self, tower: str, inputs: Tensor) -> Tensor:
        if not len(inputs):
            return inputs
        head, inputs = self.heads[tower], inputs.to(self.device)
        encode = _Tower(self.model, tower)
        replaced = {f"model.{name}": value for name, value in head.identity(self.model).items()}
        features: Tensor = functional_call(encode, replaced, (inputs,)).float()
        if head.bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        if tower not in self._verified:
            matrix = head.matrix(self.model)
            expected = encode(inputs[:2]).double()
            if not torch.allclose(
                features[:2].double() @ matrix, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item()
            ):
                raise EcifError(
                    f"The {tower} tower does more after {head.weight} than project, so scope='heads' does not fit it"
                )
            self._verified.add(tower)
        return features.cpu()

    def _fingerprint(self, name: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        made_of = [
            open_clip.get_model_config(name) or name,  # the same weights can serve two architectures
            open_clip.get_model_preprocess_cfg(self.model),
            type(self.tokenizer).__name__,
            getattr(self.tokenizer, "context_length", None),
        ]
        digest.update(json.dumps(made_of, sort_keys=True, default=str).encode())
        for key, value in self.model.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def choose_device(device: str | None) -> str:
    """The device to compute on.

    Raises:
        EcifError: if a GPU is asked for and there is none
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise EcifError(f"device={device!r} was asked for, but torch finds no GPU here. Use device='cpu'")
    return device


def check_names(model: str, pretrained: str | None) -> None:
    """Checks a model name and its weights without loading anything.

    Raises:
        EcifError: if open_clip does not know the model, or ``pretrained`` is
            neither a tag of it nor a file
    """
    if parse_model_name(model)[0]:  # hf-hub: and local-dir: bring their weights
        return
    known = open_clip.list_models()
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
        raise EcifError(f"open_clip has no model {model!r}." + (f" Did you mean {' or '.join(near)}?" if near else ""))
    tags = open_clip.list_pretrained_tags_by_model(model)
    offer = f"one of its tags ({', '.join(tags)})" if tags else "(open_clip has no tags for it)"
    if not pretrained:
        raise EcifError(f"pretrained is needed for {model}: {offer} or the path of a checkpoint")
    if pretrained not in tags and not Path(pretrained).is_file():
        raise EcifError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model}. Give {offer} or a checkpoint"
        )


def _find_head(model: nn.Module, name: str, tower: str) -> Head:
    for path in _HEADS[tower]:
        found: Any = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Linear):
            return Head(f"{path}.weight", f"{path}.bias" if found.bias is not None else None, transposed=True)
        if isinstance(found, nn.Parameter):
            return Head(path, None, transposed=False)
    raise EcifError(
        f"The {tower} tower of {name} does not end in a linear projection, so scope='heads' does not fit it"
    )


class _Tower(nn.Module):
    """One tower as a module, so that ``functional_call`` can replace its head."""

    def __init__(self, model: Any, tower: str) -> None:
        super().__init__()
        self.model: Any = model
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        encode = self.model.encode_image if self.tower == "image" else self.model.encode_text
        return cast(Tensor, encode(inputs))


class _Images(Dataset[Any]):
    """``(index, image, None)`` of each file, or ``(index, None, reason)``."""

    def __init__(self, paths: Sequence[str], preprocess: Any) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str | None]:
        try:
            with Image.open(self.paths[index]) as image:
                return index, self.preprocess(image), None
        except Exception as error:  # PIL raises many kinds on damaged files
            return index, None, str(error) or type(error).__name__
