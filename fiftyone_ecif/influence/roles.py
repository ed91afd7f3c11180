"""The part that a pair plays in the loss of its batch, by name. No heavy imports: forms read the names."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fiftyone_ecif.errors import EcifError

Approximation = Literal["exact", "taylor", "as_printed"]
Part = Literal["both", "positive", "negative"]


class Role(NamedTuple):
    """What a user's ``role=`` means: which part of what a pair does in its batch is taken, and how.

    Attributes:
        approximation: of the part from serving as a negative: exact, to first
            order, or the paper's formula as printed, which is wrong and here
            for comparison only.
        part: from the pair's own loss, from serving as a negative, or both.
    """

    approximation: Approximation
    part: Part


_ROLES = {
    "exact": Role("exact", "both"),
    "taylor": Role("taylor", "both"),
    "positive": Role("exact", "positive"),
    "negative": Role("exact", "negative"),
    "as_printed": Role("as_printed", "both"),
}
#: How a pair's part in its batch is taken, by name; the first is the default.
ROLES = tuple(_ROLES)


def parse_role(text: str) -> Role:
    """Reads a role.

    >>> parse_role("negative")
    Role(approximation='exact', part='negative')

    Raises:
        EcifError: if there is none of that name
    """
    if text not in _ROLES:
        raise EcifError(f"role={text!r} is not available. Use one of {', '.join(ROLES)}")
    return _ROLES[text]
