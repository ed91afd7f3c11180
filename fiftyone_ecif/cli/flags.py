"""Flags of a command from a table of options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from fiftyone_ecif.settings.option import Option, Settings


class Among(click.Choice[str]):
    """A choice among names that are asked for when they are needed, so that what is registered later counts too.

    Args:
        names: gives them.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names
        super().__init__(())

    @property
    def choices(self) -> tuple[str, ...]:
        """The names as they are now."""
        return tuple(self._names())

    @choices.setter
    def choices(self, _: Any) -> None:
        pass  # click sets what it was made with


def flags(*tables: type[Settings]) -> Callable[[Any], Any]:
    """Adds a flag for each option of some tables to a command, which takes them as keyword arguments."""

    def add(command: Any) -> Any:
        for table in reversed(tables):
            for name, known in reversed(table.options().items()):
                if known.flag != "":
                    command = _flag(name, known, getattr(table, name))(command)
        return command

    return add


def _flag(name: str, known: Option, default: Any) -> Any:
    flag = known.flag or f"--{name.replace('_', '-')}"
    help = known.help.removeprefix("whether to ")
    told: dict[str, Any] = {"default": default, "help": f"{help[0].upper()}{help[1:]}."}
    if known.kind is bool:
        # what is on by itself can be switched off; what decides by itself can be switched on
        return click.option(f"{flag}/--no-{flag[2:]}" if default else flag, name, is_flag=True, **told)
    told["type"] = Among(known.choices) if known.choices else known.kind
    shown = default is not None and default != ()
    return click.option(flag, name, multiple=known.many, show_default=shown, **told)
