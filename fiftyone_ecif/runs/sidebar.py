"""How the App shows the fields of runs: together in the sidebar, in a colour for what they say.

What the user has arranged stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import fiftyone as fo
from fiftyone.core.odm import ColorScheme, SidebarGroupDocument

GROUP = "influence"
_GENERATED = ("primitives", "other")  # the groups that FiftyOne puts fields in by itself
#: What colours mean wherever the plugin uses them: a pair that harms, one that helps, one that looks misaligned.
HARMFUL, HELPFUL, SUSPICIOUS = "#d9534f", "#3fa66a", "#e08a2e"
_COLOURS = {  # of fields: none that says harmful or helpful, as a field holds both
    "influence": "#19b5fe",
    "positive": "#5f9fc4",
    "negative": "#9b6bd3",
    "rank": "#6b7f99",
    "misalignment": SUSPICIOUS,
    "reason": "#c46a00",
    "duplicate": "#8a7350",
    "trace": "#8a94a6",
}


def show_fields(dataset: Any, key: str, fields: Iterable[str]) -> None:
    """Gives fields a place in the sidebar group :data:`GROUP` and a colour, unless the user gave them one.

    Args:
        dataset: a FiftyOne dataset.
        key: of the run that wrote them.
        fields: their names.
    """
    config = dataset.app_config
    groups = config.sidebar_groups or fo.DatasetAppConfig.default_sidebar_groups(dataset)
    ours = next((group for group in groups if group.name == GROUP), None)
    if ours is None:
        ours = SidebarGroupDocument(name=GROUP)
        groups.insert(0, ours)
    scheme = config.color_scheme or ColorScheme()
    coloured = {entry["path"] for entry in scheme.fields or []}
    for field in fields:
        for group in groups:
            if group.name in _GENERATED and field in group.paths:
                group.paths.remove(field)
        if not any(field in group.paths for group in groups):
            ours.paths.append(field)
        colour = _COLOURS.get(field.removeprefix(f"{key}_"))
        if colour and field not in coloured:
            scheme.fields = [*(scheme.fields or []), {"path": field, "fieldColor": colour}]
    config.sidebar_groups, config.color_scheme = groups, scheme
    dataset.save()


def forget_fields(dataset: Any, fields: Iterable[str]) -> None:
    """Takes back the colours of fields that are gone, and the sidebar group once it is empty.

    Args:
        dataset: a FiftyOne dataset.
        fields: their names; FiftyOne takes them out of the sidebar itself.
    """
    config, gone = dataset.app_config, set(fields)
    if config.sidebar_groups:
        config.sidebar_groups = [group for group in config.sidebar_groups if group.name != GROUP or group.paths]
    if config.color_scheme and config.color_scheme.fields:
        config.color_scheme.fields = [entry for entry in config.color_scheme.fields if entry["path"] not in gone]
    dataset.save()
