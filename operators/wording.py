"""What the library says in Python's words, said in the words of the App's forms."""

from __future__ import annotations

import re
from typing import Any

from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings

_OPTIONS = {
    name: known
    for table in (MisalignmentSettings, InfluenceSettings, JobSettings)
    for name, known in table.options().items()
}
_LABELS = {name: known.label for name, known in _OPTIONS.items()} | {
    "brain_key": "Key",
    "count": "Pairs",
    "limit": "Mistakes",
    "share": "Share",
    "threshold": "Score",
    "direction": "Which end",
    "target": "Validation pairs",
}
_FUNCTIONS = {
    "compute_influence": "Compute ECIF influence",
    "compute_misalignment": "Detect misaligned pairs",
    "review_misalignment": "Review misalignment",
    "tag_by_influence": "Tag by influence",
    "export_pairs": "Export pairs",
    "edit_model": "Edit model",
}
_PHRASES = {"with keep_gradients=True": "with scope 'heads'"}
_BARE = {name: label for name, label in _LABELS.items() if "_" in name} | {"proximal": _LABELS["proximal"]}
_VALUE = r"""(?:True|False|None|'[^']*'|"[^"]*"|\[[^\]]*\]|[^\s,;)]*[^\s,;).])"""
_GIVEN = re.compile(rf"\b(?:(?P<verb>[Ss]et|[Ss]ay|with) )?(?P<name>{'|'.join(_LABELS)})=(?P<value>{_VALUE})")
_NAMED = re.compile(rf"(?<![\w'.])(?P<name>{'|'.join([*_FUNCTIONS, *_BARE])})(?![\w'=.])")


def in_words(message: Any) -> str:
    """A message as the App says it: options by their labels, ticks for ``True`` and ``False``, operators by title.

    >>> in_words("brain_key='a b' is not a name")
    "Key 'a b' is not a name"
    >>> in_words("Run compute_influence again with overwrite=True")
    "Run Compute ECIF influence again with 'Replace the run' ticked"
    """
    text = str(message)
    for said, words in _PHRASES.items():
        text = text.replace(said, words)
    return _NAMED.sub(_name, _GIVEN.sub(_give, text))


def _give(found: re.Match[str]) -> str:
    verb, label, value = found["verb"], _LABELS[found["name"]], found["value"]
    if value not in ("True", "False"):
        shown = "nothing" if value == "None" else value
        return f"{verb} {label} {shown}" if verb else f"{label} {shown}"
    tick = "tick" if value == "True" else "untick"
    if verb == "with":
        return f"with {label!r} {tick}ed"
    if verb:
        return f"{tick.capitalize() if verb[0].isupper() else tick} {label!r}"
    return f"{tick.capitalize()}ing {label!r}"


def _name(found: re.Match[str]) -> str:
    name = found["name"]
    return _FUNCTIONS.get(name) or repr(_BARE[name])
