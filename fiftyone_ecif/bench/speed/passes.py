"""Direct scoring beside a plain forward pass and beside autograd, and stored gradients beside hooks.

All in CPU seconds of one thread, which what else a machine does changes least.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn
from torch.func import grad

from fiftyone_ecif.bench.speed.stopwatch import side_by_side
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.head_gradients import HeadProjection
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, OneByOne
from fiftyone_ecif.influence.projections import BasisProjection, gradient_basis, principal_projection
from fiftyone_ecif.influence.scope import Scope
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.influence.tower_gradients import TOLERANCE
from fiftyone_ecif.models.tower_scope import TowerScope, scope_parameters

Row = dict[str, Any]
_CONTEXT = 16
_SIDE = 32  # pixels
_WIDTHS = 768, 512  # of the features of ViT-B-32, image and text
_EMBEDDING = 512
_SCALE = 100.0  # of a trained CLIP
_SCALE_IN_TRAINING = 20.0  # of a network that is fitted to a few made-up pairs, which it knows by heart at a higher one
_THINGS, _MADE_UP = 16, 256  # that there are images of, and pairs
_DIRECTIONS = 128
_MOVED = 0.02  # a trained model's adapters, from where they change nothing
_SAMPLED = 3  # pairs of a batch that autograd is tried on


def network(width: int, layers: int) -> nn.Module:
    """An open_clip model with random weights and the temperature of a trained one."""
    torch.manual_seed(0)
    tower = {"width": width, "layers": layers}
    model: Any = open_clip.CLIP(
        embed_dim=width,
        vision_cfg=tower | {"image_size": _SIDE, "patch_size": 4, "head_width": 32},
        text_cfg=tower | {"context_length": _CONTEXT, "vocab_size": 1000, "heads": width // 32},
    )
    nn.init.constant_(model.get_parameter("logit_scale"), math.log(_SCALE))
    model.eval().requires_grad_(False)
    return cast(nn.Module, model)


def problem(text: str, pairs: int, width: int, layers: int) -> tuple[Scope, Any, Callable[[], Any]]:
    """A scope by its name, a batch, and the plain forward pass of that batch."""
    generator = torch.Generator().manual_seed(0)
    if text == "heads":
        heads = [torch.randn(w, _EMBEDDING, generator=generator) / w**0.5 for w in _WIDTHS]
        scope = HeadScope(heads[0], heads[1], _SCALE)
        batch = tuple(torch.randn(pairs, w, generator=generator).double() for w in _WIDTHS)
        return scope, batch, lambda: scope.similarity(scope.start, batch)
    model: Any = network(width, layers)
    choice = parse_scope(text)
    pixels = torch.randn(pairs, 3, _SIDE, _SIDE, generator=generator)
    tokens = torch.randint(1, 1000, (pairs, _CONTEXT), generator=generator)
    names = scope_parameters(model, choice, (pixels[:2], tokens[:2]))
    tower = TowerScope(model, names, SoftmaxLoss(), choice.rank)

    @torch.no_grad()
    def forward() -> None:
        model(pixels, tokens)

    return tower, (pixels, tokens), forward


def _entered(scope: Scope, batch: Any) -> Any:
    """What the towers take from where they are cut; the batch where they are not."""
    if not isinstance(scope, TowerScope):
        return batch
    return tuple(scope.enter(tower, side) for tower, side in zip(("image", "text"), batch, strict=True))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Has torch compute with one thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def direct(text: str, pairs: int, width: int, layers: int, repeats: int) -> Row:
    """Direct scoring of a batch, a plain forward pass of it, and autograd pair by pair.

    ``enter`` is what comes before the part of the towers that varies, which is
    computed once for all passes: ``over_forward`` is with it, ``again`` is
    another pass without.

    Autograd is one forward pass for all and a backward pass for each pair, timed
    on a few and extrapolated; ``difference`` is the largest of those pairs'
    scores over the largest score.
    """
    scope, inputs, forward = problem(text, pairs, width, layers)
    theta = scope.start
    vector = torch.randn(len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
    batch = _entered(scope, inputs)
    ways = {
        "forward": forward,
        "enter": lambda: _entered(scope, inputs),
        "direct": lambda: batch_influence(scope, theta, batch, vector, pairs),
        "gradient": lambda: grad(lambda at: scope.loss.pair_losses(scope.similarity(at, batch)).sum())(theta),
    }
    found = side_by_side(repeats, ways, clock=time.process_time)
    scores = sum(batch_influence(scope, theta, batch, vector, pairs))
    assert isinstance(scores, Tensor)

    start = time.process_time()
    at = theta.clone().requires_grad_(True)
    similarity = scope.similarity(at, inputs)
    whole = scope.loss.pair_losses(similarity).sum()
    common = time.process_time() - start
    expected, seconds = [], []
    for row in range(_SAMPLED):
        start = time.process_time()
        rest = torch.arange(pairs) != row
        change = whole - scope.loss.pair_losses(similarity[rest][:, rest]).sum()
        (gradient,) = torch.autograd.grad(change, at, retain_graph=True)
        expected.append((gradient @ vector).item() / pairs)
        seconds.append(time.process_time() - start)
    autograd = common + pairs * sorted(seconds)[_SAMPLED // 2]
    exact = torch.tensor(expected, dtype=scores.dtype)
    return {
        "scope": text,
        "parameters": len(theta),
        "batch": pairs,
        **found,
        "autograd": autograd,
        "over_forward": (found["enter"] + found["direct"]) / found["forward"],
        "again": found["direct"] / found["forward"],
        "over_autograd": autograd / found["direct"],
        "difference": ((scores[:_SAMPLED] - exact).abs().max() / scores.abs().max()).item(),
    }


@one_thread()
def cached(text: str, pairs: int, width: int, layers: int, repeats: int) -> Row:
    """Stored gradients of both roles beside those that hooks see, in as many coordinates; random weights."""
    scope, batch, _ = problem(text, pairs, width, layers)
    if not isinstance(scope, HeadScope):
        return {"scope": text, "weights": "random"} | _deep(scope, scope.start, batch, batch, repeats)
    projection = principal_projection(scope, scope.start, [batch])
    ways = {
        "stored": lambda: projection.removal_gradients(scope.start, batch),
        "hooks": _head_hooks(scope, projection.heads, batch),
    }
    found = side_by_side(repeats, ways, clock=time.process_time)
    return {"scope": text, "batch": pairs, "rank": projection.rank, **found, "ratio": found["stored"] / found["hooks"]}


@one_thread()
def cached_trained(text: str, pairs: int, repeats: int) -> Row:
    """Likewise for a deep scope of a small trained model, on the pairs that it was trained on.

    Captions are as long as they are. Hooks run the model as it is, which takes them at the length of the context.
    """
    from fiftyone_ecif.bench.fidelity.world import make_world  # which needs FiftyOne

    world = make_world(400, 100, 300)
    encoder, choice = world.encoder, parse_scope(text)
    scope = TowerScope(encoder.model, encoder.scope_names(choice), encoder.loss, choice.rank)
    pixels, tokens = world.batches(text, torch.arange(pairs), pairs, 0)[0]
    padded = nn.functional.pad(tokens, (0, encoder.model.context_length - tokens.shape[1]))
    theta = scope.start + _MOVED * torch.randn(len(scope.start), generator=torch.Generator().manual_seed(0))
    return {"scope": text, "weights": "trained"} | _deep(
        scope, theta, (pixels.float(), tokens), (pixels.float(), padded), repeats
    )


@one_thread()
def cached_fitted(text: str, pairs: int, width: int, layers: int, repeats: int, steps: int = 100) -> Row:
    """Likewise for a network of any size, fitted to made-up pairs for some steps."""
    model, pixels, tokens = _fitted(width, layers, steps)
    batch, choice = (pixels[:pairs], tokens[:pairs]), parse_scope(text)
    scope = TowerScope(model, scope_parameters(model, choice, batch), SoftmaxLoss(), choice.rank)
    theta = scope.start + _MOVED * torch.randn(len(scope.start), generator=torch.Generator().manual_seed(0))
    return {"scope": text, "weights": f"{steps} steps"} | _deep(scope, theta, batch, batch, repeats)


def _fitted(width: int, layers: int, steps: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and images of sixteen things in noise and captions of sixteen words, some of which are others."""
    model: Any = network(width, layers)
    nn.init.constant_(model.logit_scale, math.log(_SCALE_IN_TRAINING))
    random = torch.Generator().manual_seed(0)
    thing = torch.randint(0, _THINGS, (_MADE_UP,), generator=random)
    pixels = torch.randn(_THINGS, 3, _SIDE, _SIDE, generator=random)[thing]
    pixels = pixels + 0.7 * torch.randn(pixels.shape, generator=random)
    tokens, others = (torch.randint(1, 1000, (count, _CONTEXT), generator=random) for count in (_THINGS, _MADE_UP))
    tokens = torch.where(torch.rand(_MADE_UP, _CONTEXT, generator=random) < 0.3, others, tokens[thing])
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW([value for name, value in model.named_parameters() if name != "logit_scale"], lr=5e-4)
    for _ in range(steps):
        batch = torch.randperm(_MADE_UP, generator=random)[:64]
        images, captions, scale = model(pixels[batch], tokens[batch])[:3]
        loss: Any = SoftmaxLoss().pair_losses(scale * images @ captions.T).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    return model, pixels, tokens


def _deep(
    scope: Scope, theta: Tensor, batch: tuple[Tensor, Tensor], of_hooks: tuple[Tensor, Tensor], repeats: int
) -> Row:
    """Of one batch, and of the same as hooks take it.

    ``error`` is the length of what is missing to exact gradients over the length of those.
    """
    assert isinstance(scope, TowerScope)
    pairs = len(batch[0])
    objective = ContrastiveLoss(scope, _AsTheyAre(batch), pairs)
    projection = BasisProjection(scope, gradient_basis(theta, [(objective, _DIRECTIONS)]))
    ways = {
        "stored": lambda: projection.removal_gradients(theta, batch),
        "hooks": _linear_hooks(scope.model, of_hooks),
    }
    found = side_by_side(repeats, ways, clock=time.process_time)
    kept, exact = (
        torch.stack(projection.removal_gradients(theta, batch, tolerance=tolerance)) for tolerance in (TOLERANCE, 0.0)
    )
    error = ((kept - exact).norm() / exact.norm()).item()
    ratio = found["stored"] / found["hooks"]
    return {"batch": pairs, "rank": projection.rank, **found, "ratio": ratio, "error": error}


class _AsTheyAre(OneByOne):
    """Pixels and tokens in one batch."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.partition, self._batch = [torch.arange(len(batch[0]))], batch

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._batch

    def regrouped(self, partition: Sequence[Tensor]) -> _AsTheyAre:
        """The same batch."""
        return self


def _head_hooks(scope: HeadScope, projections: tuple[HeadProjection, ...], batch: Any) -> Callable[[], Any]:
    """LoGra of both heads: projected inputs times projected output gradients of the batch's loss."""

    def run() -> list[Tensor]:
        outputs = [each.detach().requires_grad_(True) for each in scope.embed(scope.start, batch)]
        images, captions = (nn.functional.normalize(each, dim=1) for each in outputs)
        loss = scope.loss.pair_losses(scope.logits(scope.start, images @ captions.T)).sum()
        return [
            torch.einsum("na,nb->nab", inputs @ each.input, slope @ each.output)
            for inputs, slope, each in zip(batch, torch.autograd.grad(loss, outputs), projections, strict=True)
        ]

    return run


def _linear_hooks(model: Any, batch: Any) -> Callable[[], Any]:
    """LoGra of all linear layers that hooks see, of 4 by 4 random directions each."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    generator = torch.Generator().manual_seed(0)
    sides = [
        [torch.randn(size, 4, generator=generator).to(layer.weight) for size in layer.weight.shape[::-1]]
        for layer in layers
    ]

    def run() -> list[Tensor]:
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        handles = [
            layer.register_forward_hook(lambda _, inputs, output, n=n: seen.update({n: (inputs[0], output)}))
            for n, layer in enumerate(layers)
        ]
        model.requires_grad_(True)
        images, captions, scale = model(*batch)[:3]
        loss = SoftmaxLoss().pair_losses(scale * images @ captions.T).sum()
        kept = sorted(seen)
        slopes = torch.autograd.grad(loss, [seen[n][1] for n in kept])
        model.requires_grad_(False)
        for handle in handles:
            handle.remove()
        return [
            torch.einsum("nta,ntb->nab", seen[n][0] @ sides[n][0], slope @ sides[n][1])
            for n, slope in zip(kept, slopes, strict=True)
        ]

    return run
