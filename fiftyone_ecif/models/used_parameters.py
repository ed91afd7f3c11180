"""Which parameters the embeddings depend on: a model may have more, such as a decoder that writes captions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fiftyone_ecif.models.towers import Tower, differentiable_attention

_OF_LOGITS = ("logit_scale", "logit_bias")

Probe = tuple[Tensor, Tensor]


def used_parameters(model: nn.Module, probe: Probe) -> set[str]:
    """Names of the parameters whose gradient on a probe batch is not exactly zero.

    Those of the logits, which the loss always depends on, are among them. A
    gradient is dropped as soon as it has been looked at, so little memory is
    needed beside that of a forward pass.

    Args:
        model: an open_clip model in evaluation mode.
        probe: images and tokens that the towers can take.
    """
    used = {name for name, _ in model.named_parameters() if name in _OF_LOGITS}
    for tower, inputs in zip(("image", "text"), probe, strict=True):
        run = Tower(model, tower)
        leaves = {name: value.detach().requires_grad_() for name, value in run.named_parameters()}
        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_look, used, name.removeprefix("model."))
            )
        with torch.enable_grad(), differentiable_attention():
            embeddings = functional_call(run, leaves, (inputs,))
            cotangent = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
            (embeddings * cotangent.to(embeddings)).sum().backward()
    return used


def _look(used: set[str], name: str, leaf: Tensor) -> None:
    assert leaf.grad is not None
    if leaf.grad.any():
        used.add(name)
    leaf.grad = None
