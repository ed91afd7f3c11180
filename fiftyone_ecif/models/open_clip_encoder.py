"""A dual encoder made with open_clip: its frozen features and the heads behind them.

The features of a tower are what enters its last linear map, wherever that is:
a bare parameter (``visual.proj``), a linear layer, the output projection of an
attention pool, the second layer of an MLP. See ``projection_heads``.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import CenterCropOrPad, MaybeConvertMode, PreprocessCfg
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize
from torchvision.transforms.functional import pil_to_tensor
from typing_extensions import override

from fiftyone_ecif.devices import choose_device, fetch
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import ScopeChoice
from fiftyone_ecif.models.checkpoint import PREPROCESSING, load_adapters, load_preprocessing, save_checkpoint
from fiftyone_ecif.models.dual_encoder import DualEncoder
from fiftyone_ecif.models.inputs import resize_pixels
from fiftyone_ecif.models.open_clip_names import brings_weights, check_names, needs_transformers
from fiftyone_ecif.models.projection_heads import Head, find_head
from fiftyone_ecif.models.tower_scope import TowerScope, scope_parameters
from fiftyone_ecif.models.towers import Tower, causal_mask
from fiftyone_ecif.models.weights import in_short, open_clip_weights
from fiftyone_ecif.store.keys import digest

logger = logging.getLogger(__name__)
_PIXELS = 2  # how files become pixels; 1: palettes resized before they are colours, high bit depths white
_TAKES_TENSORS = Resize, CenterCrop, CenterCropOrPad, MaybeConvertMode  # of what open_clip does to images


class OpenClipEncoder(DualEncoder):
    """A loaded open_clip model.

    On a GPU the towers run in half precision, as far as their features fit
    into it, and on as many inputs at once as there is memory for.

    Args:
        model: a model name of open_clip, or ``local-dir:…`` / ``hf-hub:…``.
        pretrained: a pretrained tag of that model, or the path of a checkpoint;
            None only for the two forms that bring their own weights.
        device (None): where the towers run: ``"cpu"``, ``"cuda"`` or another torch
            device; by default a GPU where there is one.

    Attributes:
        model: of open_clip, in evaluation mode.
        tokenizer: of open_clip; :meth:`tokens` leaves out padding that changes nothing.
        loss: the sigmoid loss for a model that has a ``logit_bias``, else the softmax loss.
        heads: of the image and the text tower.
        adapters: low-rank adapters that ``fiftyone-ecif fit`` wrote beside the
            checkpoint; they are part of the loaded weights.
        fingerprint: hex digest of architecture, weights, preprocessing,
            tokenizer and precision.

    Raises:
        EcifError: if the model, the tag, the checkpoint or the device does not
            exist
    """

    def __init__(self, model: str, pretrained: str | None = None, device: str | None = None) -> None:
        self.device = choose_device(device)
        check_names(model, pretrained)
        try:
            with open_clip_weights(pretrained) as weights, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                self.model, _, transform = open_clip.create_model_and_transforms(
                    model,
                    pretrained=weights,
                    device=self.device,
                    require_pretrained=True,
                    **(load_preprocessing(pretrained) or {}),
                )
            self.tokenizer = open_clip.get_tokenizer(model)
        except EcifError:
            raise
        except ImportError as error:
            lacking = needs_transformers({"text_cfg": {"hf_tokenizer_name": model}})
            raise EcifError(f"{model} {lacking or f'cannot be made ({error})'}") from error
        except Exception as error:  # open_clip, the hub and torch raise many kinds here
            raise EcifError(
                f"open_clip could not load model {model!r} with pretrained={pretrained!r}: {in_short(error)}"
            ) from error
        self.model.eval().requires_grad_(False)
        self._geometry, self._normalise = _split(transform)
        steps = self._geometry.transforms
        if all(isinstance(step, _TAKES_TENSORS) for step in steps):
            self.preprocess_jpeg = Compose(
                [partial(resize_pixels, step) if isinstance(step, Resize) else step for step in steps]
            )
        self.loss = SoftmaxLoss() if getattr(self.model, "logit_bias", None) is None else SigmoidLoss()
        self.name = model
        unusable = [name for name, value in self.model.named_parameters() if not value.sum().isfinite()]
        if unusable:
            raise EcifError(f"The model's weight {unusable[0]} holds NaN or infinity. Load another checkpoint")
        self._half = self.device.startswith("cuda")
        self._at_once = sys.maxsize  # inputs, until memory runs out
        self._ignores_padding = False
        self._ignores_padding = self._try_without_padding()
        self.heads = {tower: self._find_head(tower) for tower in ("image", "text")}
        self.adapters = load_adapters(pretrained)
        self._known_parameters: dict[ScopeChoice, list[str]] = {}
        self.notes = [*_mismatches(said, model), *self._notes_on_heads()]
        self.fingerprint = self._fingerprint(model)

    def scope(self, choice: ScopeChoice, seed: int = 0) -> Scope:
        """The parameters that a choice means, as they were loaded.

        The heads are in float64, or in float32 on a device where that is slow;
        every other scope is in the model's own precision.

        Args:
            choice: which.
            seed (0): of new adapters.

        Raises:
            EcifError: if the model has no such parameters
        """
        names = self.scope_names(choice)
        if not choice.heads:
            if choice.rank is None:
                return TowerScope(self.model, names, self.loss)
            return TowerScope(self.model, names, self.loss, choice.rank, self.adapters, seed)
        image, text = (head.matrix(self.model) for head in self.heads.values())
        scale = self.model.logit_scale.detach().double().exp().item()
        bias = getattr(self.model, "logit_bias", None)
        shift = 0.0 if bias is None else bias.detach().double().item()
        return HeadScope(image, text, scale, shift, self.loss, choice.with_scale, self.placement)

    def scope_names(self, choice: ScopeChoice) -> list[str]:
        """Names of the model's parameters in a scope, or of those that have an adapter in it.

        Adapters that came with the checkpoint are all that ``lora`` means, whatever their rank.

        Raises:
            EcifError: if the model has no such parameters, or the checkpoint's adapters are others
        """
        if choice.heads:
            names = [name for head in self.heads.values() for name in (head.weight, head.bias) if name]
            return [*names, "logit_scale"] if choice.with_scale else names
        if choice.rank is None or self.adapters is None:
            return self._parameters(choice)
        rank = len(next(iter(self.adapters.values()))[0])
        same = choice.rank == rank and set(self._parameters(choice)) == set(self.adapters)
        if not same and choice.text != "lora":
            raise EcifError(
                f"scope={choice.text!r} does not fit the checkpoint, whose adapters have rank {rank}. Use 'lora:{rank}'"
            )
        return list(self.adapters)

    def parameter_names(self) -> list[str]:
        """Names of all parameters of the model."""
        return [name for name, _ in self.model.named_parameters()]

    def save(self, path: Path, scope: Scope, theta: Tensor) -> None:
        """Writes a checkpoint for ``open_clip.create_model(pretrained=path)``.

        Adapters and how images are prepared are written beside it, and where
        open_clip would prepare them in another way, that is said.

        Args:
            path: of the checkpoint; safetensors if it ends in that, else PyTorch's format.
            scope: of this encoder.
            theta: its parameters, shape ``(p,)``.

        Raises:
            EcifError: if a file cannot be written
        """
        adapters = scope.adapters(theta) if isinstance(scope, TowerScope) else {}
        save_checkpoint(path, self.changed_state(scope, theta), adapters, self.preprocessing)
        self._warn_of_preprocessing(path)

    def changed_state(self, scope: Scope, theta: Tensor) -> dict[str, Tensor]:
        """The model's weights with the parameters of a scope changed.

        Args:
            scope: of this encoder.
            theta: its parameters, shape ``(p,)``.

        Returns:
            the state dict, on the CPU
        """
        if isinstance(scope, TowerScope):
            changed = scope.parameters(theta)
        else:
            assert isinstance(scope, HeadScope)
            matrices = zip(self.heads.values(), scope.split(theta), strict=True)
            changed = {name: value for head, matrix in matrices for name, value in head.tensors(matrix).items()}
            if scope.with_scale:
                changed["logit_scale"] = theta[-1]
        state = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        return state | {name: value.detach().to(state[name]).contiguous() for name, value in changed.items()}

    def check_saves(self, choice: ScopeChoice) -> None:
        """Checks that a checkpoint has a place for changed parameters of a scope.

        Raises:
            EcifError: for the heads, if one of them is an identity map that was appended
        """
        lacking = [tower for tower, head in self.heads.items() if head.weight is None]
        if choice.heads and lacking:
            raise EcifError(
                f"The {lacking[0]} tower of {self.name} ends in no linear map, so a checkpoint has no place for a "
                "changed one. Use a run with scope='blocks:1'"
            )

    def _notes_on_heads(self) -> list[str]:
        return [
            f"The {tower} tower of {self.name} ends in no linear map, so scope='heads' attributes an identity map that "
            "is appended to it. scope='blocks:1' attributes the model's own weights"
            for tower, head in self.heads.items()
            if head.weight is None
        ]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared, as arguments of ``open_clip.create_model_and_transforms``."""
        made = open_clip.get_model_preprocess_cfg(self.model)
        return {
            name: made[name.removeprefix("image_")] for name in PREPROCESSING if name.removeprefix("image_") in made
        }

    @override
    def preprocess(self, image: Image.Image) -> Tensor:
        """Resizes and crops as open_clip does, to uint8 of shape ``(3, h, w)``."""
        pixels: Tensor = pil_to_tensor(self._geometry(image))
        return pixels

    @override
    def finish(self, images: Tensor) -> Tensor:
        finished: Tensor = self._normalise(images.float().div(255))
        return finished

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """What the text tower takes, on the device, shape ``(n, t)``.

        A caption longer than the context is cut, as in training. Where padding
        changes nothing, ``t`` is the length of the longest of these captions,
        which spares the tower most of its work; otherwise it is the context.
        """
        tokens: Tensor = self.tokenizer(list(captions))
        if self._ignores_padding:
            tokens = _without_padding(tokens)
        return tokens.to(self.device)

    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """What a tower's head takes, or the embeddings of a tower without one.

        Args:
            tower: ``"image"`` or ``"text"``.
            inputs: preprocessed images or tokens.

        Returns:
            shape ``(n, w)``, float32, on the CPU; the last column is one if the head has a bias

        Raises:
            EcifError: if not even one input fits into the device's memory
        """
        return self._begin(tower, inputs, self._half)()

    @override
    def start(self, tower: str, inputs: Tensor) -> Callable[[], Tensor]:
        return self._begin(tower, inputs, self._half) if self._half else super().start(tower, inputs)

    @torch.no_grad()
    def _begin(self, tower: str, inputs: Tensor, half: bool) -> Callable[[], Tensor]:
        """Gives the device all of the work; what is returned gives the features.

        They are in half precision, if that is asked for and none of them becomes too large for it.
        """
        parts: list[Callable[[], Tensor]] = []
        start = 0
        while start < len(inputs):
            part = inputs[start : start + self._at_once]
            try:
                ready = part.to(self.device, non_blocking=True)
                ready = self.finish(ready) if tower == "image" else ready
                with torch.autocast(torch.device(self.device).type, torch.float16, enabled=half):
                    features = self._run(tower, ready, self.heads[tower])
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise EcifError(
                        f"The {tower} tower of {self.name} does not fit into the memory of {self.device}, not even "
                        "for one input. Free some of it, or use device='cpu'"
                    ) from error
                self._at_once = len(part) // 2
                continue
            parts.append(fetch(features.float()))
            start += len(part)

        def give() -> Tensor:
            found = torch.cat([part() for part in parts])
            return self._begin(tower, inputs, half=False)() if half and not found.isfinite().all() else found

        return give

    def _run(self, tower: str, inputs: Tensor, head: Head | None) -> Tensor:
        """A tower's embeddings or, if a head is given, what that takes."""
        run = Tower(self.model, tower)
        features: Tensor = head.features(run, inputs) if head else run(inputs)
        return features

    def _find_head(self, tower: str) -> Head:
        """The last linear map of a tower, tried on noise and on two captions."""
        images, tokens = self._probe()
        return find_head(Tower(self.model, tower), images if tower == "image" else tokens)

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Noise and two captions, as the towers take them."""
        size = self.model.visual.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        noise = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device), self.tokens(["a photo", "of two things"])

    def _parameters(self, choice: ScopeChoice) -> list[str]:
        """Those that a scope inside the towers means."""
        if choice not in self._known_parameters:
            self._known_parameters[choice] = scope_parameters(self.model, choice, self._probe())
        return self._known_parameters[choice]

    @torch.no_grad()
    def _try_without_padding(self) -> bool:
        """Whether a caption's features stay the same without the padding behind it, tried on two."""
        tokens = self.tokens(["a photo", "of two things"])
        if causal_mask(self.model) is None:
            return False
        expected, found = (self._run("text", each, None) for each in (tokens, _without_padding(tokens)))
        return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

    def _warn_of_preprocessing(self, path: Path) -> None:
        """Says so if open_clip prepares images in another way once the model is loaded from a file."""
        usual = asdict(PreprocessCfg())
        special = {
            name: value
            for name, value in open_clip.get_model_preprocess_cfg(self.model).items()
            if name != "size" and value != usual[name]
        }
        if special and not brings_weights(self.name):
            logger.warning(
                "open_clip forgets how %s prepares images when it loads weights from a file. This plugin remembers; "
                "elsewhere load %s with force_preprocess_cfg=%s, or its embeddings are off",
                self.name,
                path,
                special,
            )

    def _fingerprint(self, name: str) -> str:
        made_of = [
            open_clip.get_model_config(name) or name,  # the same weights can serve two architectures
            open_clip.get_model_preprocess_cfg(self.model),
            type(self.tokenizer).__name__,
            getattr(self.tokenizer, "context_length", None),
            *["float16"] * self._half,
            *(astuple(head) for head in self.heads.values()),
            _PIXELS,
        ]

        def parts() -> Iterator[str | memoryview]:
            yield json.dumps(made_of, sort_keys=True, default=str)
            for key, value in self.model.state_dict().items():
                yield f"{key} {value.dtype} {tuple(value.shape)}"
                yield value.cpu().contiguous().flatten().view(torch.uint8).numpy().data

        return digest(parts())


def _mismatches(said: Sequence[warnings.WarningMessage], model: str) -> Iterator[str]:
    """What open_clip only warns of: that weights were trained with another model than they are loaded into."""
    for text in dict.fromkeys(str(each.message) for each in said if "open_clip" in Path(each.filename).parts):
        other = model.removesuffix("-quickgelu") if model.endswith("-quickgelu") else f"{model}-quickgelu"
        remedy = f". Use model={other!r}" if "QuickGELU" in text and other in open_clip.list_models() else ""
        yield f"open_clip warns: {text.rstrip('.')}{remedy}"


def _split(transform: Compose) -> tuple[Compose, Normalize]:
    """What open_clip does to an image before it is a tensor of floats, and after."""
    *geometry, _, normalise = transform.transforms  # between them is the step to floats in [0, 1]
    assert isinstance(normalise, Normalize)
    return Compose(geometry), normalise


def _without_padding(tokens: Tensor) -> Tensor:
    """The columns up to the last that is not zero in all rows."""
    return tokens[:, : int(tokens.any(0).nonzero().max()) + 1]
