"""Layers with a forward-mode rule of their own: torch's computes what is zero, or what is known.

torch multiplies with the derivative of weights that have none, finds that of a
softmax by a softmax of its own, and that of a layer norm in many passes over
memory. In reverse mode, and in reverse mode twice, these layers are as torch's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

Gradients = tuple["Tensor | None", ...]


class Linear(torch.autograd.Function):
    """A linear layer on a matrix, with or without an adapter: ``x W^T + bias + (x A^T) B^T``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
        """Shape ``(n, m)``.

        Args:
            x: shape ``(n, w)``.
            weight: shape ``(m, w)``.
            bias: shape ``(m,)``, or None.
            a: shape ``(r, w)``; None without an adapter.
            b: shape ``(m, r)``; None without an adapter.
        """
        adapter = (None, None) if a is None else (x @ a.T, b)
        return _sum_of_products(bias, (x, weight), adapter)  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what the derivatives need."""
        x, weight, _, a, b = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, a, b)
        ctx.save_for_forward(x, weight, a, b)

    @staticmethod
    def jvp(
        ctx: Any,
        x_moves: Tensor | None,
        weight_moves: Tensor | None,
        bias_moves: Tensor | None,
        a_moves: Tensor | None,
        b_moves: Tensor | None,
    ) -> Tensor:
        """How the output moves as the inputs do, those that move."""
        x, weight, a, b = ctx.saved_tensors
        inner, inner_moves = None, None
        if a is not None:
            inner, inner_moves = x @ a.T, _sum_of_products(None, (x, a_moves), (x_moves, a))
        found = _sum_of_products(bias_moves, (x_moves, weight), (x, weight_moves), (inner_moves, b), (inner, b_moves))
        assert found is not None
        return found if found.ndim == 2 else found.expand(len(x), -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> Gradients:
        """Gradients of what needs them."""
        if slope is None:
            return (None,) * 5
        x, weight, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        adapter = (None, None) if a is None else (b.T, a.T)
        return (
            Linear.apply(slope, weight.T, None, *adapter) if needs[0] else None,
            slope.T @ x if needs[1] else None,
            slope.sum(0) if needs[2] else None,
            (slope @ b).T @ x if needs[3] else None,
            slope.T @ (x @ a.T) if needs[4] else None,
        )


class Softmax(torch.autograd.Function):
    """A softmax over the last dimension."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor) -> Tensor:
        """Of the shape of the scores."""
        return scores.softmax(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps what the derivatives need."""
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, moves: Tensor) -> Tensor:
        """How the shares move as the scores do."""
        return _along_shares(ctx.saved_tensors[0], moves)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        """The gradient: the Jacobian is symmetric."""
        return _along_shares(ctx.saved_tensors[0], slope)


def _sum_of_products(start: Tensor | None, *products: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """``start + sum rows @ side^T`` of what is there, None if nothing is.

    Each sum of two matrices would be a pass over memory, so that narrow rows are put beside others.
    """
    there = [(rows, side) for rows, side in products if rows is not None and side is not None]
    if not there:
        return start
    wide = [each for each in there if each[0].shape[1] > each[1].shape[0]]
    narrow = [each for each in there if each[0].shape[1] <= each[1].shape[0]]
    beside = [tuple(torch.cat(parts, 1) for parts in zip(*narrow, strict=True))] if len(narrow) > 1 else narrow
    for rows, side in [*wide, *beside]:
        start = rows @ side.T if start is None else torch.addmm(start, rows, side.T)
    return start


class LayerNorm(torch.autograd.Function):
    """A layer norm over the last dimensions, with or without weight and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Of the shape of ``x``."""
        return functional.layer_norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what the derivatives need."""
        x, ctx.shape, weight, _, ctx.eps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx: Any, *moved: Tensor | None) -> Tensor:
        """How the output moves as the inputs do, those that move."""
        x, weight = ctx.saved_tensors
        moves, _, weight_moves, bias_moves, _ = moved
        parts = [] if bias_moves is None else [bias_moves.expand_as(x)]
        if moves is not None:
            along = _along_norm(x, ctx.shape, ctx.eps, moves)
            parts.append(along if weight is None else along * weight)
        if weight_moves is not None:
            parts.append(functional.layer_norm(x, ctx.shape, None, None, ctx.eps) * weight_moves)
        return cast(Tensor, sum(parts))

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> Gradients:
        """Gradients of what needs them."""
        if slope is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        own, _, of_weight, of_bias, _ = ctx.needs_input_grad
        dims = list(range(x.ndim - len(ctx.shape)))
        normed = functional.layer_norm(x, ctx.shape, None, None, ctx.eps) if of_weight else None
        return (
            _along_norm(x, ctx.shape, ctx.eps, slope if weight is None else slope * weight) if own else None,
            None,
            None if normed is None else (slope * normed).sum(dims),
            slope.sum(dims) if of_bias else None,
            None,
        )


def _along_norm(x: Tensor, shape: list[int], eps: float, moves: Tensor) -> Tensor:
    """A layer norm's Jacobian at ``x``, which is symmetric, times ``moves``."""
    _, mean, spread = torch.native_layer_norm(x, shape, None, None, eps)
    only = [True, False, False]
    along: Tensor = torch.ops.aten.native_layer_norm_backward(moves, x, shape, mean, spread, None, None, only)[0]
    return along


def _along_shares(shares: Tensor, moves: Tensor) -> Tensor:
    """A softmax's Jacobian, which is symmetric, times ``moves``."""
    along: Tensor = torch.ops.aten._softmax_backward_data(moves, shares, -1, shares.dtype)
    return along
