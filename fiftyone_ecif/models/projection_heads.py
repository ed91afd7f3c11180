"""The linear projections that towers end in: where their weights are in an open_clip model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Where the last projection of each tower may be, by open_clip's classes of towers; the first that is there counts.
HEAD_PATHS = {
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
        """What features are multiplied with, on the CPU in float64, which not every device has.

        Args:
            model: that the head is in.

        Returns:
            shape ``(w, d)``; with a bias, which is the last row, ``(w + 1, d)``
        """
        weight = model.get_parameter(self.weight).detach().cpu().double()
        rows = [weight.T if self.transposed else weight]
        if self.bias:
            rows.append(model.get_parameter(self.bias).detach().cpu().double()[None])
        return torch.cat(rows)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parameters that a matrix stands for.

        Args:
            matrix: as :meth:`matrix` gives it.

        Returns:
            weight and bias by name, in the model's layout
        """
        weight = matrix[:-1] if self.bias else matrix
        found = {self.weight: weight.T if self.transposed else weight}
        return found | ({self.bias: matrix[-1]} if self.bias else {})

    def identity(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameters that make the head pass its input through.

        Args:
            model: that the head is in.

        Returns:
            weight and bias by name, on the model's device and in its precision
        """
        weight = model.get_parameter(self.weight)
        width = weight.shape[1 if self.transposed else 0]
        replaced = {self.weight: torch.eye(width, dtype=weight.dtype, device=weight.device)}
        if self.bias:
            replaced[self.bias] = torch.zeros(width, dtype=weight.dtype, device=weight.device)
        return replaced


def named_head(model: nn.Module, tower: str) -> Head | None:
    """The layer of a tower that is named like a final projection, or None.

    Whether the tower ends in it is another matter: something may come after it.

    Args:
        model: an open_clip model.
        tower: ``"image"`` or ``"text"``.
    """
    for path in HEAD_PATHS[tower]:
        found: Any = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.Linear):
            return Head(f"{path}.weight", f"{path}.bias" if found.bias is not None else None, transposed=True)
        if isinstance(found, nn.Parameter):
            return Head(path, None, transposed=False)
    return None
