"""What can be chosen by name: every entry is made in one place and known everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar

from fiftyone_ecif.errors import EcifError


class Named(Protocol):
    """What has a name to be chosen by."""

    name: str


T = TypeVar("T", bound=Named)
C = TypeVar("C", bound=type)


class Registry(Mapping[str, T]):
    """Entries by name, in the order in which they were registered.

    >>> class Metric:
    ...     name = "cosine"
    >>> metrics = Registry("metric")
    >>> metrics.register(Metric).name
    'cosine'
    >>> list(metrics)
    ['cosine']
    >>> metrics["euclid"]
    Traceback (most recent call last):
    fiftyone_ecif.errors.EcifError: metric='euclid' is not available. Use one of cosine

    Args:
        noun: the option that an entry is chosen by, for messages.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._entries: dict[str, T] = {}

    def register(self, entry: C) -> C:
        """Adds an entry: a class without arguments, of which one is made. Can be used as a decorator.

        Raises:
            EcifError: if the name is taken
        """
        made: T = entry()
        if made.name in self._entries:
            raise EcifError(f"There is a {self.noun} {made.name!r} already. Choose another name")
        self._entries[made.name] = made
        return entry

    def withdraw(self, name: str) -> None:
        """Takes an entry back, such as one that a test added."""
        del self._entries[name]

    def table(self) -> str:
        """A Markdown table of all entries: ``name``, ``says`` and ``source``, where any of them has it."""
        columns = {
            column: [getattr(entry, column, "") for entry in self.values()] for column in ("name", "says", "source")
        }
        told = [[column, "---", *cells] for column, cells in columns.items() if any(cells)]
        return "\n".join(f"| {' | '.join(row)} |" for row in zip(*told, strict=True))

    def __getitem__(self, name: str) -> T:
        """The entry of a name.

        Raises:
            EcifError: if there is none, with what is known
        """
        if name not in self:
            raise EcifError(f"{self.noun}={name!r} is not available. Use one of {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries  # a mapping's own would take an EcifError for a KeyError

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
