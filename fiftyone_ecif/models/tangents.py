"""Layers with a forward-mode rule of their own: torch's computes what is zero, or what is known.

torch multiplies with the derivative of weights that have none, and finds the
derivative of a softmax by a softmax of its own. In reverse mode, and in reverse
mode twice, these layers are as torch's.
"""

from __future__ import annotations

from typing import Any

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
        outputs = functional.linear(x, weight, bias)
        return outputs if a is None or b is None else torch.addmm(outputs, x @ a.T, b.T)

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
        found = _add_products(bias_moves, (x_moves, weight), (x, weight_moves))
        if a is not None:
            inner, inner_moves = x @ a.T, _add_products(None, (x, a_moves), (x_moves, a))
            if inner_moves is not None and b_moves is not None:
                inner_moves, inner = torch.cat([inner_moves, inner], 1), None
                b, b_moves = torch.cat([b, b_moves], 1), None
            found = _add_products(found, (inner_moves, b), (inner, b_moves))
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


def _add_products(start: Tensor | None, *products: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """``start + sum rows @ side^T`` of what is there, None if nothing is."""
    for rows, side in products:
        if rows is not None and side is not None:
            start = rows @ side.T if start is None else torch.addmm(start, rows, side.T)
    return start


def _along_shares(shares: Tensor, moves: Tensor) -> Tensor:
    weighted = shares * moves
    return weighted - shares * weighted.sum(-1, keepdim=True)
