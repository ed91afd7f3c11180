"""All that this software does, done with one small model, and held against open_clip's own code."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from fiftyone_ecif.bench.models.small import WORDS, small_model
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.newton_step import removal_step
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.misalignment.detection import run_detectors
from fiftyone_ecif.misalignment.detectors import DETECTORS
from fiftyone_ecif.misalignment.duplicates import find_duplicates
from fiftyone_ecif.misalignment.embeddings import DetectorInputs
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.models.tower_scope import TowerScope
from fiftyone_ecif.progress import result_of

SCOPES = ("heads", "heads+logit_scale", "blocks:1", "lora:2:1")
_PAIRS, _BATCH, _COMPARED = 24, 12, 5
_PROXIMAL = (1.0, 10.0, 100.0)  # noise and random words may be told apart by an embedding that shrinks to nothing


def model_names() -> list[str]:
    """The models that the installed open_clip has a configuration of."""
    folder = Path(open_clip.__file__).parent / "model_configs"
    return sorted(path.stem for path in folder.glob("*.json"))


def lacking(name: str) -> str | None:
    """What is not installed of what a model needs, or None."""
    needs = "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]
    return "transformers" if needs and importlib.util.find_spec("transformers") is None else None


def examine(name: str, folder: Path) -> dict[str, Any]:
    """Does all with a small model of the structure of one of open_clip's.

    Args:
        name: of open_clip's model.
        folder: for what is written.

    Returns:
        ``heads`` (the weights that the towers end in), ``block`` (the last of each tower), ``worst`` (the largest
        relative error of five pairs' influence against gradients through open_clip's model, over all scopes),
        ``fit`` (relative gradient norm that it reached), ``proximal`` (the least of 1, 10 and 100 with which it
        did), ``edit`` (loss that is reported minus the loss that plain
        open_clip has with the checkpoint), ``detectors`` (how many gave finite scores)
    """
    small, weights = small_model(name, folder)
    encoder = OpenClipEncoder(small, str(weights), "cpu")
    images, captions = _pairs(encoder)
    tokens, padded = encoder.tokens(captions), encoder.tokenizer(captions)
    names = {text: encoder.scope_names(parse_scope(text)) for text in SCOPES}
    heads = encoder.scope(parse_scope("heads"))
    assert isinstance(heads, HeadScope)
    features = encoder.features("image", images), encoder.features("text", tokens)
    encoder.model.double()
    pixels = encoder.finish(images).double()
    errors = {}
    for text in SCOPES:
        scope = encoder.scope(parse_scope(text))
        batch = (
            tuple(part[:_BATCH].double() for part in features)
            if isinstance(scope, HeadScope)
            else (pixels[:_BATCH], tokens[:_BATCH])
        )
        errors[text] = _error(encoder, scope, batch, (pixels[:_BATCH], padded[:_BATCH]))
    batches = FeatureBatches(*features, random_partition(_PAIRS, _BATCH, 0))
    objective, theta, relative = _fit(heads, batches)
    return {
        "heads": [head.weight for head in encoder.heads.values()],
        "offset": [head.has_offset for head in encoder.heads.values()],
        "block": _last_blocks(names["blocks:1"]),
        "errors": errors,
        "worst": max(errors.values()),
        "fit": relative,
        "proximal": objective.proximal,
        "edit": _edit(encoder, small, folder, objective, theta, (pixels, padded)),
        "detectors": _detect(objective, theta),
    }


def _pairs(encoder: OpenClipEncoder) -> tuple[Tensor, list[str]]:
    size: Any = encoder.model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    images = torch.randint(256, (_PAIRS, 3, height, width), generator=torch.Generator().manual_seed(1))
    draw = np.random.default_rng(0)
    return images.to(torch.uint8), [" ".join(draw.choice(WORDS[6:], 5)) for _ in range(_PAIRS)]


def _error(encoder: OpenClipEncoder, scope: Scope, batch: Any, inputs: tuple[Tensor, Tensor]) -> float:
    """Of the influence of some pairs along a random direction, against plain autograd, relative to its size."""
    direction = torch.randn(len(scope.start), generator=torch.Generator().manual_seed(2)).to(scope.start)
    found = sum(batch_influence(scope, scope.start, batch, direction, 1))
    theta = scope.start.double().requires_grad_()
    similarity = _similarity(encoder, scope, theta, inputs)
    losses = scope.loss.pair_losses(similarity)
    expected = []
    for pair in range(_COMPARED):
        rest = torch.arange(len(similarity)) != pair
        removal = losses.sum() - scope.loss.pair_losses(similarity[rest][:, rest]).sum()
        (gradient,) = torch.autograd.grad(removal, theta, retain_graph=True)
        expected.append(gradient.dot(direction.double()))
    wanted = torch.stack(expected)
    assert isinstance(found, Tensor)
    return float((found[:_COMPARED] - wanted).abs().max() / wanted.abs().max())


def _similarity(encoder: OpenClipEncoder, scope: Scope, theta: Tensor, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """As open_clip's model computes it, with parameters of a scope put into it."""
    maps: list[Tensor | None] = [None, None]
    if isinstance(scope, TowerScope):
        changed = scope.parameters(theta)
    else:
        assert isinstance(scope, HeadScope)
        changed = {}
        for place, (head, matrix) in enumerate(zip(encoder.heads.values(), scope.split(theta), strict=True)):
            changed |= head.tensors(matrix)
            maps[place] = matrix if head.weight is None else None
        if scope.with_scale:
            changed["logit_scale"] = theta[-1]
    plain = {f"model.{name}": value for name, value in changed.items()}
    images, captions, scale, bias = functional_call(_Plain(encoder.model), plain, inputs)
    u, v = (
        normalize(side if appended is None else side @ appended, dim=1)
        for side, appended in zip((images, captions), maps, strict=True)
    )
    similarity: Tensor = scale.exp() * u @ v.T + bias
    return similarity


class _Plain(nn.Module):
    """What open_clip's model computes, without the loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Any, Any, Any, Any]:
        """Embeddings before normalisation, the logarithm of the scale, and the bias."""
        model = self.model
        bias = getattr(model, "logit_bias", None)
        return (
            model.encode_image(pixels, normalize=False),
            model.encode_text(tokens, normalize=False),
            model.logit_scale,
            0.0 if bias is None else bias,
        )


def _fit(scope: HeadScope, batches: FeatureBatches) -> tuple[ContrastiveLoss, Tensor, float]:
    """The objective with the least pull to the start with which it has a minimum, that minimum, and how near it is.

    Raises:
        EcifError: if it has none with any
    """
    for proximal in _PROXIMAL:
        objective = ContrastiveLoss(scope, batches, _PAIRS, proximal)
        try:
            *_, (theta, relative) = minimise(objective)
        except EcifError:
            if proximal == _PROXIMAL[-1]:
                raise
        else:
            break
    return objective, theta, relative


def _last_blocks(names: Sequence[str]) -> list[str]:
    """The modules that hold the parameters of each tower."""
    found = []
    for tower in (True, False):
        parts = [name.split(".") for name in names if name.startswith("visual.") == tower]
        shared = next(
            (place for place, ends in enumerate(zip(*parts, strict=False)) if len(set(ends)) > 1), len(parts[0])
        )
        found.append(".".join(parts[0][:shared]))
    return found


def _edit(
    encoder: OpenClipEncoder,
    small: str,
    folder: Path,
    objective: ContrastiveLoss,
    theta: Tensor,
    inputs: tuple[Tensor, Tensor],
) -> float:
    """How far the loss after an edit is from that of plain open_clip with the checkpoint."""
    scope, batch = objective.scope, objective.batches[0]
    rows = objective.batches.partition[0]
    edited = theta + result_of(removal_step(objective, theta, rows[:3], "hessian")).vector
    if any(head.weight is None for head in encoder.heads.values()):  # which a checkpoint has no place for
        scope = encoder.scope(parse_scope("blocks:1"))
        edited = scope.start * 1.01
        batch = tuple(side[rows] for side in inputs)
    reported = scope.loss.pair_losses(scope.similarity(edited, batch)).mean().item()
    path = folder / "edited.safetensors"
    encoder.save(path, scope, edited)
    model: Any = open_clip.create_model(small, pretrained=str(path)).eval().double()
    with torch.no_grad():
        images, captions, scale, bias = _Plain(model)(*(side[rows] for side in inputs))
        similarity = scale.exp() * normalize(images, dim=1) @ normalize(captions, dim=1).T + bias
    return reported - float(scope.loss.pair_losses(similarity).mean())


def _detect(objective: ContrastiveLoss, theta: Tensor) -> int:
    """How many detectors gave a finite score to each pair."""
    assert isinstance(objective.batches, FeatureBatches)
    images = objective.batches.images
    duplicates = find_duplicates(images[:], [f"caption {row}" for row in range(_PAIRS)])
    names = [name for name, one in DETECTORS.items() if not one.needs_target]
    findings = result_of(run_detectors(DetectorInputs(objective, theta, duplicates), names))
    return sum(bool(np.isfinite(scores).all()) for scores in findings.scores.values())
