"""How much the fidelity benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
ROUGH = 1e-2  # relative residual at which scores have long stopped changing


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        pairs: training pairs of the heads scope.
        lora: the LoRA scope.
        lora_pairs: its training pairs, the first of those.
        sensitivity_pairs: training pairs where settings are varied.
        validation: validation pairs.
        steps: batches that the model is trained on.
        removals: pairs that are left out one by one, a seed.
        subsets: half-subsets that are retrained on.
        lora_subsets: likewise for LoRA.
        seeds: of the partition and of what is removed.
        fractions: shares of the pairs to remove in the curves.
        edits: shares of the LoRA scope's pairs to remove in edits.
        directions: that gradients of the LoRA scope are kept in.
        epochs: that AdamW may take to come as near to the minimum as an edit.
    """

    pairs: int = 1024
    lora: str = "lora:2"
    lora_pairs: int = 192
    sensitivity_pairs: int = 1024
    validation: int = 1024
    steps: int = 400
    removals: int = 40
    subsets: int = 60
    lora_subsets: int = 50
    seeds: int = 3
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    edits: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    directions: int = 128
    epochs: int = 200


QUICK = Sizes(
    lora="lora:2:1",
    lora_pairs=96,
    sensitivity_pairs=256,
    steps=250,
    removals=20,
    subsets=50,
    lora_subsets=12,
    seeds=1,
    fractions=(0.1, 0.3),
    edits=(0.1,),
    directions=32,
    epochs=40,
)
