"""Deep scopes: parameters inside the towers of an open_clip model, or adapters on them.

The parameters are put into the model functionally (``torch.func``), by name, so
that everything that has a name can be attributed: linear layers, convolutions,
open_clip's bare ``in_proj_weight``, ``visual.proj`` and ``text_projection``, and
the 0-dim ``logit_scale``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.losses import BatchLoss
from fiftyone_ecif.influence.objective import Batches
from fiftyone_ecif.influence.scope import SampleGradients, Scope, gradients_one_by_one
from fiftyone_ecif.influence.scope_choice import ScopeChoice
from fiftyone_ecif.models.entered_batches import EnteredBatches
from fiftyone_ecif.models.flat_layers import FlatLayers, merge
from fiftyone_ecif.models.inputs import ImageTextBatches
from fiftyone_ecif.models.layer_calls import SampleLayers
from fiftyone_ecif.models.tower_cut import Activations, Resumed, TowerCut
from fiftyone_ecif.models.towers import Tower, differentiable_attention
from fiftyone_ecif.models.used_parameters import Probe, used_parameters

_INPUTS_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class TowerScope(Scope):
    """Named parameters of a model, each in full or through a low-rank adapter, as one flat vector.

    An adapter of rank ``r`` on a weight ``W`` of shape ``(m, n)`` is ``W + B A``
    with ``A`` of shape ``(r, n)`` and ``B`` of shape ``(m, r)`` (LoRA, arXiv
    2106.09685, with alpha = r). New adapters start with ``B = 0``, so they
    change nothing before they are fitted.

    Args:
        model: an open_clip model in evaluation mode.
        names: parameters to attribute, as in ``model.named_parameters()``.
        loss: what the model is trained with.
        rank (None): of the adapters; by default the parameters themselves vary.
        adapters (None): ``{name: (A, B)}`` of adapters that are already part of
            the model's weights; random new ones otherwise.
        seed (0): of new adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss: BatchLoss,
        rank: int | None = None,
        adapters: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.names, self.loss, self.rank = model, list(names), loss, rank
        self._towers = {tower: Tower(model, tower) for tower in ("image", "text")}
        self._cuts = {
            tower: TowerCut(run, {f"model.{name}": model.get_parameter(name).detach() for name in self._own(tower)})
            for tower, run in self._towers.items()
        }
        self._hidden: set[str] = set()  # what has an adapter and is used where that is not seen
        weights = {name: model.get_parameter(name).detach() for name in names}
        if rank is None:
            pieces = list(weights.values())
        else:
            adapters = adapters or new_adapters(weights, rank, seed)
            pieces = [part.to(weights[name]) for name in names for part in adapters[name]]
            # what the adapters are added to: the weights without them
            weights = {
                name: weight - (adapters[name][1].to(weight) @ adapters[name][0].to(weight)).view_as(weight)
                for name, weight in weights.items()
            }
        self._base = weights
        self._shapes = [piece.shape for piece in pieces]
        self.start = torch.cat([piece.flatten() for piece in pieces])

    def split(self, theta: Tensor) -> list[Tensor]:
        """The tensors inside a flat vector: one a name, or ``A`` and ``B`` of each name's adapter."""
        pieces = torch.split(theta, [shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """The model's parameters in scope at ``theta``, by name."""
        pieces = self.split(theta)
        if self.rank is None:
            return dict(zip(self.names, pieces, strict=True))
        return {
            name: merge(self._base[name], a, b)
            for name, a, b in zip(self.names, pieces[::2], pieces[1::2], strict=True)
        }

    def adapters(self, theta: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapters at ``theta``: ``{name: (A, B)}``; none if the parameters themselves vary."""
        if self.rank is None:
            return {}
        pieces = self.split(theta)
        return dict(zip(self.names, zip(pieces[::2], pieces[1::2], strict=True), strict=True))

    def enter(self, tower: str, inputs: Tensor) -> Tensor | Activations:
        """What the part of a tower takes that parameters in scope reach; the inputs where it is not cut.

        Args:
            tower: ``"image"`` or ``"text"``.
            inputs: preprocessed images ``(n, 3, h, w)`` or tokens ``(n, t)``; not inside a function that is
                differentiated.
        """
        entered = self._cuts[tower].enter(inputs)
        return inputs if entered is None else entered

    def entered(self, batches: Batches) -> Batches:
        """The same pairs, from where the towers are cut."""
        return EnteredBatches(batches, self.enter) if isinstance(batches, ImageTextBatches) else batches

    def entered_captions(self, captions: Tensor) -> Tensor | Activations:
        """The same captions, from where the text tower is cut."""
        return self.enter("text", captions)

    def embed_images(self, theta: Tensor, images: Tensor | Activations) -> Tensor:
        """Image embeddings before normalisation, shape ``(n, d)``, of preprocessed images ``(n, 3, h, w)``."""
        return self._embed("image", theta, images)

    def embed_captions(self, theta: Tensor, captions: Tensor | Activations) -> Tensor:
        """Caption embeddings before normalisation, shape ``(n, d)``, of tokens ``(n, t)``."""
        return self._embed("text", theta, captions)

    def logits(self, theta: Tensor, cosine: Tensor) -> Tensor:
        """Cosine similarities times ``exp(logit_scale)``, plus ``logit_bias`` where the model has one."""
        changed = self.parameters(theta) if self.rank is None else {}  # adapters are on matrices only
        model: Any = self.model
        similarity: Tensor = changed.get("logit_scale", model.logit_scale).exp() * cosine
        if getattr(model, "logit_bias", None) is not None:
            similarity = similarity + changed.get("logit_bias", model.logit_bias)
        return similarity

    def logit_parameters(self, theta: Tensor) -> list[int]:
        """Places in ``theta`` of ``logit_scale`` and ``logit_bias``, as far as they are in scope."""
        places, start = [], 0
        for name, shape in zip(self.names, self._shapes, strict=False):
            if name in ("logit_scale", "logit_bias"):
                places.append(start)
            start += shape.numel()
        return places if self.rank is None else []

    @override
    def sample_gradients(
        self, theta: Tensor, tower: str, inputs: Tensor | Activations, basis: Tensor | None = None
    ) -> SampleGradients:
        """As :meth:`Scope.sample_gradients`: from the inputs of layers and the gradients of their outputs.

        What is not in a layer that can be seen is differentiated one sample after another.
        """
        mine = self._own(tower)
        weights = {name: value for name, value in self.parameters(theta).items() if name in mine}
        with differentiable_attention():  # whose derivative is also the faster one
            layers = SampleLayers(partial(self._run, tower, weights), inputs, weights, self.adapters(theta))
        places = self._places()
        rest = [torch.arange(places[name].start, places[name].stop) for name in weights if name not in layers.names]
        within = torch.cat(rest).to(theta.device) if rest else None
        if within is not None:

            def embed(at: Tensor, samples: Tensor | Activations) -> Tensor:
                return self._embed(tower, theta.index_copy(0, within, at), samples)

            others = gradients_one_by_one(embed, theta[within], inputs, None if basis is None else basis[within])

        def along(directions: Tensor) -> Tensor:
            found = theta.new_zeros(len(directions), len(theta) if basis is None else basis.shape[1])
            for name, rows in layers.gradients(directions) if layers.names else ():
                if basis is None:
                    found[:, places[name]] += rows
                else:
                    found.addmm_(rows, basis[places[name]])
            if within is not None:
                rows = others(directions)
                found = found.index_add(1, within, rows) if basis is None else found + rows
            return found

        return SampleGradients(layers.embeddings, along)

    def _places(self) -> dict[str, slice]:
        """Where the parameters of each name, or its adapter's, are in the flat vector."""
        each = 1 if self.rank is None else 2
        places, start = {}, 0
        for number, name in enumerate(self.names):
            size = sum(shape.numel() for shape in self._shapes[each * number : each * (number + 1)])
            places[name] = slice(start, start + size)
            start += size
        return places

    def _own(self, tower: str) -> list[str]:
        """Names of parameters of a tower in scope; those of the logits are counted to the text tower's."""
        return [name for name in self.names if name.startswith("visual.") == (tower == "image")]

    def _embed(self, tower: str, theta: Tensor, inputs: Tensor | Activations) -> Tensor:
        own = self._own(tower)
        adapters = {name: pair for name, pair in self.adapters(theta).items() if name in own}
        weights = self.parameters(theta) if self.rank is None else self._base
        weights = {name: weights[name] for name in own}
        for name in self._hidden.intersection(adapters):
            weights[name] = merge(weights[name], *adapters.pop(name))
        with differentiable_attention(), FlatLayers(weights, adapters) as layers:
            embeddings = self._run(tower, weights, inputs)
        if layers.unused:
            self._hidden |= layers.unused
            return self._embed(tower, theta, inputs)
        return embeddings

    def _run(self, tower: str, weights: Mapping[str, Tensor], inputs: Tensor | Activations) -> Tensor:
        run, changed = self._towers[tower], {f"model.{name}": value for name, value in weights.items()}
        if isinstance(inputs, Tensor):
            return cast(Tensor, functional_call(run, changed, (inputs,)))
        with Resumed(inputs) as rest:
            return cast(Tensor, functional_call(run, changed, (rest.inputs,)))


def new_adapters(weights: Mapping[str, Tensor], rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapters that change nothing yet: random ``A`` of unit output variance, ``B = 0``.

    Args:
        weights: matrices of shape ``(m, n)``, or ``(m, n, 1, 1)``, by name.
        rank: of the adapters.
        seed: of the random numbers, which are drawn on the CPU: the same on every device.

    Returns:
        ``{name: (A, B)}`` of shapes ``(rank, n)`` and ``(m, rank)``, like the weights in precision and device
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, weight in weights.items():
        rows, columns = weight.flatten(1).shape
        random = torch.randn(rank, columns, generator=generator, dtype=torch.float64) / columns**0.5
        made[name] = random.to(weight), weight.new_zeros(rows, rank)
    return made


def scope_parameters(model: nn.Module, choice: ScopeChoice, probe: Probe) -> list[str]:
    """Names of the parameters that a choice of scope means in this model, of those that embeddings depend on.

    A block is what the towers repeat: a residual block of a transformer (also
    one of Swin's or ConvNeXt's in their stages), a bottleneck of a ResNet, an
    encoder layer of transformers' text towers. Adapters are on the matrices of
    attention and MLP in them, 1 x 1 convolutions of an MLP included, and on
    those of pools by attention.

    Args:
        model: an open_clip model.
        choice: any but the heads.
        probe: images and tokens that the towers can take.

    Raises:
        EcifError: if there are none, or a tower has fewer blocks than are asked for
    """
    names = [name for name, _ in model.named_parameters()]
    used = used_parameters(model, probe)
    if choice.pattern:
        chosen = [name for name in names if re.search(choice.pattern, name)]
        if not chosen:
            raise EcifError(
                f"scope={choice.text!r} is no scope, and as a regular expression it matches none of the model's "
                f"parameters ({', '.join(names[:3])}, ..., {names[-1]}). Use heads, lora, blocks:1, or another pattern"
            )
        if not used.intersection(chosen):
            raise EcifError(
                f"scope={choice.text!r} matches only parameters that the loss does not depend on, such as {chosen[0]}. "
                "Use heads, lora, blocks:1, or another pattern"
            )
        return [name for name in chosen if name in used]
    blocks = _blocks(model, used)
    last = {tower: found[-choice.blocks :] if choice.blocks else found for tower, found in blocks.items()}
    for tower, found in last.items():
        if len(found) < (choice.blocks or 1):
            raise EcifError(
                f"scope={choice.text!r} asks for {choice.blocks or 1} blocks, but the {tower} tower has {len(found)}. "
                "Use fewer, or a regular expression over parameter names"
            )
    within = tuple(f"{module}." for found in last.values() for module in found)
    if choice.rank is None:
        return [name for name in names if name.startswith(within) and name in used]
    pools = tuple(f"{name}." for name, _ in model.named_modules() if re.search(r"attn_?pool$", name))
    return [name for name in names if name.startswith(within + pools) and name in used and _is_matrix(model, name)]


def _is_matrix(model: nn.Module, name: str) -> bool:
    """Whether a parameter is what a layer of attention or of an MLP multiplies with."""
    home, _, end = name.rpartition(".")
    layer, weight = model.get_submodule(home), model.get_parameter(name)
    if end == "weight":
        of_mlp = isinstance(layer, nn.Conv2d) and weight.shape[2:] == (1, 1) and "mlp" in home.split(".")
        return (isinstance(layer, nn.Linear) or of_mlp) and "rel_pos" not in home
    return weight.ndim == 2 and end in _INPUTS_OF_ATTENTION


def _blocks(model: nn.Module, used: set[str]) -> dict[str, list[str]]:
    """The blocks of both towers, first to last, of those with parameters that are used.

    They are numbered modules that are not inside another one; what is called a
    layer is one where nothing in its tower is called a block.
    """
    found: dict[str, list[str]] = {"image": [], "text": []}
    in_use = {name.rpartition(".")[0] for name in used}
    for kind in (r"blocks?\.\d+$", r"layers?\d*\.\d+$"):
        known = {tower: bool(blocks) for tower, blocks in found.items()}
        for name, _ in model.named_modules():
            tower = "image" if name.startswith("visual.") else "text"
            nested = any(name.startswith(f"{other}.") for other in found[tower])
            if known[tower] or nested or not re.search(kind, name):
                continue
            if any(f"{module}.".startswith(f"{name}.") for module in in_use):
                found[tower].append(name)
    return found
