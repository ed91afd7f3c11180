"""Seconds and memory of scoring, beside what it is to be measured against.

``ratios`` are of seconds measured in turns in one run:

* ``embed``: scoring the heads from images and captions to fields, over FiftyOne's
  embeddings of both; goal at most 1.15;
* ``direct_forward``: direct scoring over a plain forward pass, the worst scope; at most 2.5;
* ``direct_autograd``: autograd pair by pair over direct scoring, the worst scope; at least 100;
* ``cached_hook_logra``: stored gradients of the heads, both roles, over LoGra by hooks; at most 2;
* ``rescore_bandwidth``: bytes a second in scoring a new target from the store over those in
  reading its files from the disk; at least 0.5;
* ``growth_exponent``: of seconds in the number of pairs; at most 1.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import torch

from fiftyone_ecif.bench.speed import embedding, growth, libraries, passes, stored
from fiftyone_ecif.bench.tables import table

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        photographs: pairs that are embedded and scored.
        scopes: of direct scoring.
        batch: pairs in its batch.
        width, layers: of both towers of the model.
        depth: layers of the model whose last blocks are a scope, as many as a base model has.
        deep_batch: pairs in the batch of stored gradients of a deep scope.
        stored: pairs in the synthetic store.
        growth: numbers of synthetic pairs.
        repeats: of all that is measured in turns.
    """

    photographs: int = 768
    scopes: tuple[str, ...] = ("heads", "lora", "blocks:2", ".")
    batch: int = 256
    width: int = 192
    layers: int = 6
    depth: int = 12
    deep_batch: int = 64
    stored: int = 1_000_000
    growth: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    repeats: int = 3


QUICK = Sizes(
    photographs=256,
    width=128,
    layers=4,
    stored=100_000,
    growth=(1_000, 5_000, 30_000),
)

TITLES = {
    "embed": "From images and captions to scores, beside FiftyOne's embeddings (seconds)",
    "direct": "Direct scoring, beside a plain forward pass and autograd (CPU seconds of one thread)",
    "cached": "Stored gradients of both roles, beside LoGra by hooks (CPU seconds of one thread)",
    "store": "Scoring from the store, beside reading its files",
    "growth": "Growth with the number of pairs",
    "peers": "Other libraries on one job (CPU seconds)",
}


def run(
    sizes: Sizes, peers: bool, say: Callable[[str], None] = print, keep: Callable[[Row], None] = lambda found: None
) -> Row:
    """Measures everything.

    Args:
        sizes: how much.
        peers: whether to install other libraries into an environment of their own and run them too.
        say: told what is measured next.
        keep: called with what is found so far, after each part.
    """
    sections: dict[str, Callable[[], list[Row]]] = {
        "embed": lambda: embedding.embed(sizes.photographs, max(1, sizes.repeats - 2)),
        "direct": lambda: [
            passes.direct(
                scope,
                sizes.batch,
                sizes.width,
                sizes.depth if scope.startswith("blocks") else sizes.layers,
                sizes.repeats,
            )
            for scope in sizes.scopes
        ],
        "cached": lambda: [
            passes.cached("heads", sizes.batch, sizes.width, sizes.layers, sizes.repeats),
            passes.cached("lora:2", sizes.deep_batch, sizes.width, sizes.layers, sizes.repeats),
            passes.cached_trained("lora:2", sizes.deep_batch, sizes.repeats),
            passes.cached_fitted("lora:2", sizes.deep_batch, sizes.width, sizes.layers, sizes.repeats),
        ],
        "store": lambda: stored.rescore(sizes.stored, sizes.repeats),
        "growth": lambda: [growth.measure(pairs) for pairs in sizes.growth],
        "peers": lambda: libraries.measure() if peers else [],
    }
    found: Row = {"machine": _machine(), "date": date.today().isoformat()}
    for name, measure in sections.items():
        say(TITLES[name])
        found[name] = measure()
        keep(found)
    found["memory_mib"] = {str(row["pairs"]): row["memory_mib"] for row in found["growth"]}
    found["ratios"] = ratios(found)
    keep(found)
    return found


def ratios(found: Mapping[str, list[Row]]) -> dict[str, float]:
    """What :mod:`fiftyone_ecif.bench.speed` says, from the rows."""
    total = {row["who"]: row["total"] for row in found["embed"]}
    speed = {row["what"]: row["mb_per_s"] for row in found["store"] if row["files"] == "cold"}
    pairs, seconds = (np.log([row[name] for row in found["growth"]]) for name in ("pairs", "seconds"))
    return {
        "embed": total["ecif"] / total["fiftyone"],
        "direct_forward": max(row["over_forward"] for row in found["direct"]),
        "direct_autograd": min(row["over_autograd"] for row in found["direct"]),
        "cached_hook_logra": next(row["ratio"] for row in found["cached"] if row["scope"] == "heads"),
        "rescore_bandwidth": speed["new target"] / speed["read"],
        "growth_exponent": float(np.polyfit(pairs, seconds, 1)[0]) if len(pairs) > 1 else math.nan,
    }


def markdown(found: Mapping[str, Any]) -> str:
    """All tables, under a heading each."""
    parts = [f"{found['machine']}, {found['date']}.\n", table([found["ratios"]]) + "\n"]
    parts += [f"### {title}\n\n{table(found[name])}\n" for name, title in TITLES.items() if found[name]]
    return "\n".join(parts)


def _machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, {gpu}, torch {torch.__version__}"
