"""What a user's ``scope=`` means. No heavy imports: forms and settings read it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fiftyone_ecif.errors import EcifError

DEFAULT_RANK = 4


@dataclass(frozen=True)
class ScopeChoice:
    """What a user's ``scope=`` means.

    Attributes:
        text: as given.
        heads: whether both final projections are meant.
        with_scale: whether ``logit_scale`` is attributed with them.
        rank: of low-rank adapters on the attention and MLP weights, if those are meant.
        blocks: only the last so many blocks of both towers.
        pattern: a regular expression that parameter names are searched for.
    """

    text: str
    heads: bool = False
    with_scale: bool = False
    rank: int | None = None
    blocks: int | None = None
    pattern: str | None = None


def parse_scope(text: str) -> ScopeChoice:
    """Reads ``heads``, ``heads+logit_scale``, ``lora[:RANK[:BLOCKS]]``, ``blocks:K`` or a regular expression.

    Raises:
        EcifError: if it is none of these
    """
    if text in ("heads", "heads+logit_scale"):
        return ScopeChoice(text, heads=True, with_scale=text != "heads")
    if found := re.fullmatch(r"lora(?::([1-9][0-9]{0,5}))?(?::([1-9][0-9]{0,5}))?", text):
        return ScopeChoice(text, rank=int(found[1] or DEFAULT_RANK), blocks=int(found[2]) if found[2] else None)
    if found := re.fullmatch(r"blocks:([1-9][0-9]{0,5})", text):
        return ScopeChoice(text, blocks=int(found[1]))
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise EcifError(f"scope={text!r} is no regular expression ({error}). Use heads, lora or blocks:1") from error
    if not text or re.fullmatch(r"(lora|blocks|heads)\W.*|blocks", text):
        raise EcifError(f"scope={text!r} is not known. Use heads, heads+logit_scale, lora:4, lora:4:2, blocks:1 ...")
    return ScopeChoice(text, pattern=text)
