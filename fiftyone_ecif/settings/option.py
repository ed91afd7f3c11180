"""One option: its default, what it may be and what it means; and tables of them as frozen dataclasses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from textwrap import fill
from typing import Any, TypeVar

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.store.files import bare, looks_like_a_path, user_path

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its default.

    Attributes:
        help: what it is, in a phrase without a full stop.
        label: its name where people read it: in forms and reports.
        choices: the names it can be, if they are given; asked for anew each time.
        others: whether it can be something beside the choices, which the table then judges.
        least: the least number it may be.
        above: what a number must be greater than.
        why_least: what is said of a lower one, if it is more than that it is too low.
        kind: of the value: ``str``, ``bool``, ``int`` or ``float``.
        many: whether it is a sequence of such values.
        path: whether it can be a path, whose blanks and quotes are taken off and whose ``~`` is the home.
        flag: of the shell, if it is not the name; ``""`` if it has none.
    """

    help: str
    label: str
    kind: type
    choices: Callable[[], Iterable[str]] | None = None
    others: bool = False
    least: float | None = None
    above: float | None = None
    why_least: str = ""
    many: bool = False
    path: bool = False
    flag: str | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to be said after ``name=value``; None if nothing is."""
        if self.kind not in (int, float):
            return None
        if self.kind is int and not isinstance(value, Integral):
            return "must be a whole number"
        usable = isinstance(value, int | float | Integral) and math.isfinite(value)
        if not usable or (self.above is not None and value <= self.above):
            return f"must be a {'positive number' if self.above is not None else 'number from 0 up'}, such as 0.1"
        if self.least is not None and value < self.least:
            number = (
                "must be a number from 0 up, such as 0.1" if self.kind is float else f"must be at least {self.least}"
            )
            return self.why_least or number
        return None


def option(default: Any, help: str, *, label: str, kind: type | None = None, **known: Any) -> Any:
    """A field of :class:`Settings`.

    Args:
        default: its value where nobody chooses one.
        help: see :class:`Option`.
        label: likewise.
        kind (None): likewise; by default that of the default.
        **known: likewise.
    """
    many = isinstance(default, tuple)
    made = Option(help, label, kind or (str if many or default is None else type(default)), many=many, **known)
    return field(default=default, metadata={"option": made})


def same(table: type[Settings], name: str, **changes: Any) -> Any:
    """The option of another table, with changes.

    Args:
        table: the other table.
        name: of the option there.
        **changes: ``default``, or what :class:`Option` holds.
    """
    default = changes.pop("default", getattr(table, name))
    return field(default=default, metadata={"option": replace(table.options()[name], **changes)})


@dataclass(frozen=True)
class Settings:
    """A table of options and what was chosen of each. What cannot be is refused when it is made.

    Raises:
        EcifError: if a value is out of its range, or not among the choices
    """

    def __post_init__(self) -> None:
        for name, known in self.options().items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue  # left open
            if (wrong := known.problem(value)) is not None:
                raise EcifError(f"{name}={value!r} {wrong}")
            if known.choices is not None and not known.others:
                check_choices(name, value, known.choices())
            if known.path and isinstance(value, str):
                self._set(name, str(user_path(value)) if looks_like_a_path(bare(value)) else bare(value))
            if known.many:
                self._set(name, tuple(value))
            elif known.kind in (int, float):
                self._set(name, known.kind(value))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options by name, in order."""
        return {each.name: each.metadata["option"] for each in fields(cls) if "option" in each.metadata}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The value of each option where nobody chooses one."""
        return {name: getattr(cls, name) for name in cls.options()}

    @classmethod
    def take(cls: type[S], given: dict[str, Any]) -> S:
        """The settings that are among some arguments, which are taken out of them."""
        return cls(**{name: given.pop(name) for name in cls.options() if name in given})

    def _set(self, name: str, value: Any) -> None:
        """Puts a value into its usual form while this is made."""
        object.__setattr__(self, name, value)


def check_choices(name: str, value: Any, known: Iterable[str]) -> None:
    """Checks that a value, or each of several, is among what is known.

    Raises:
        EcifError: if it is not, with what is
    """
    known = list(known)
    for each in value if isinstance(value, list | tuple) else [value]:
        if each not in known:
            raise EcifError(f"{name}={each!r} is not available. Use one of {', '.join(known)}")


def check_known(given: Mapping[str, Any], *tables: type[Settings]) -> None:
    """Checks that no argument is left that belongs to no table.

    Raises:
        EcifError: for the first that is, with what is known
    """
    if given:
        known = [name for table in tables for name in table.options()]
        raise EcifError(f"There is no option {next(iter(given))!r}. Options: {', '.join(known)}")


def documented(*tables: type[Settings]) -> Callable[[F], F]:
    """Gives a function that takes ``**options`` the signature and the description of these tables' options.

    In its docstring ``{options}`` is replaced by the description of each.
    """

    def document(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {each.name for each in own}
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for table in tables
            for name, default in table.defaults().items()
            if name not in taken
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        function.__doc__ = (function.__doc__ or "").replace("        {options}\n", _description(tables))
        return function

    return document


def _description(tables: Sequence[type[Settings]]) -> str:
    lines = []
    for table in tables:
        for name, known in table.options().items():
            default = getattr(table, name)
            shown = "" if default is None or default == () else f" ({default!r})"
            text = f"{name}{shown}: {known.help}"
            lines.append(fill(text, 84, initial_indent=" " * 8, subsequent_indent=" " * 12) + "\n")
    return "".join(lines)
