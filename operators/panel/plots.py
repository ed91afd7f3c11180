"""Plotly figures of the panel, small enough for a browser whatever the number of pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fiftyone_ecif.runs.score_table import ScoreTable, drawn, is_probability
from fiftyone_ecif.runs.sidebar import HARMFUL, HELPFUL, SUSPICIOUS
from fiftyone_ecif.samples.selection import DIRECTIONS
from fiftyone_ecif.store.keys import digest

_COLOURS = {"harmful": HARMFUL, "valuable": HELPFUL, "suspicious": SUSPICIOUS}
_TAGS = {  # tags that say the same
    **{"harmful": HARMFUL, "valuable": HELPFUL, "suspect": SUSPICIOUS},
    **{"misaligned": "#a8620f", "aligned": "#2aa198"},
}
_OTHER_TAGS = ("#7a6ff0", "#c77dba", "#5aa9c9", "#b7a24a", "#8a7350", "#4f6fb5", "#b58fd6", "#a0a83c")
_STEEP = 5  # how many times the usual bar the highest is where a logarithmic axis is needed
_LONGEST = 70  # letters of a caption that is hovered over
_CHANCES = (0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 0.999)  # on the axis of a probability
_REST, _SELECTED = "#8a94a6", "#e04fd0"


def histogram_bars(board: ScoreTable, field: str, direction: str, threshold: float | None) -> list[dict[str, Any]]:
    """One bar a bin, those beyond the cut in the colour of its end."""
    edges, counts = board.histogram(field)
    places = drawn(field, edges)
    if threshold is None:
        beyond = np.zeros(len(counts), dtype=bool)
    elif DIRECTIONS[direction] == "lowest":
        beyond = edges[:-1] <= threshold
    else:
        beyond = edges[1:] >= threshold
    return [
        {
            "type": "bar",
            "x": ((places[:-1] + places[1:]) / 2).tolist(),
            "y": counts.tolist(),
            "width": np.diff(places).tolist(),
            "text": [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)],
            "textposition": "none",
            "marker": {"color": [_COLOURS[direction] if taken else _REST for taken in beyond], "line": {"width": 0}},
            "hovertemplate": "%{y} pairs with a score of %{text}<extra></extra>",
            "name": "pairs",
        }
    ]


def histogram_layout(board: ScoreTable, field: str) -> dict[str, Any]:
    """Layout of the histogram; counts on a logarithmic axis where few pairs are extreme."""
    counts = board.histogram(field).counts
    few = bool(counts.max(initial=0) > _STEEP * np.median(counts))
    scale = {"type": "log", "dtick": 1} if few else {"type": "linear", "rangemode": "tozero"}
    return {
        "height": 210,
        "margin": {"t": 8, "b": 36, "l": 44, "r": 8},
        "bargap": 0,
        "showlegend": False,
        "dragmode": "select",
        "selectdirection": "h",
        "xaxis": {**_axis(field), "zeroline": not is_probability(field)},
        "yaxis": {
            **scale,
            "title": {"text": f"pairs{few * ' (logarithmic)'}", "font": {"size": 11}},
            "fixedrange": True,
        },
    }


def _axis(field: str) -> dict[str, Any]:
    """Of a score; probabilities are drawn by their log odds, and said as they are."""
    axis: dict[str, Any] = {"title": {"text": axis_title(field), "font": {"size": 11}}}
    if is_probability(field):
        axis["tickvals"] = drawn(field, np.array(_CHANCES)).tolist()
        axis["ticktext"] = [f"{chance:.3g}" for chance in _CHANCES]
    return axis


def axis_title(field: str) -> str:
    """A score by its name, and what its ends mean."""
    if field.endswith("_misalignment"):
        return f"{field} (right: more suspicious)"
    return f"{field} (left of 0: harmful, right: valuable)" if "_influence" in field else field


def tag_colours(tags: Iterable[str], before: Mapping[str, str]) -> dict[str, str]:
    """A colour for each tag: that which it means or had before, else one that no other has, as far as they go.

    Args:
        tags: to be coloured.
        before: colours that were given before, which stay.
    """
    found = dict(before)
    for tag in sorted(tags):
        if tag not in found:
            start = int(digest(tag), 16) % len(_OTHER_TAGS)
            order = [*_OTHER_TAGS[start:], *_OTHER_TAGS[:start]]
            free = [colour for colour in order if colour not in found.values()]
            found[tag] = _TAGS.get(tag) or (free or order)[0]
    return found


class Group(NamedTuple):
    """Pairs with a tag.

    Attributes:
        members: their samples.
        colour: of their points.
    """

    members: set[str]
    colour: str


def scatter_points(
    board: ScoreTable,
    x: str,
    y: str,
    groups: Mapping[str, Group],
    selected: list[str],
    captions: Mapping[str, str],
    lassoed: list[str] | None = None,
) -> list[dict[str, Any]]:
    """One point a pair, of at most some thousands of them: those without a tag, those with each, and the selected ones.

    A pair with two tags is drawn with both, so that the legend counts what the tags do.

    Args:
        board: the scores.
        x: the horizontal score.
        y: the vertical one.
        groups: by the name of the tag.
        selected: samples to mark.
        captions: what to say of a point that is hovered over, by sample.
        lassoed (None): samples beside which all others fade.
    """
    rows = board.points(x, y).tolist()
    tagged = set[str]().union(*(group.members for group in groups.values()))
    rest = sum(sample not in tagged for sample in board.scored(x))
    marked = [board.places[sample] for sample in selected if sample in board.places]
    pairs = [(f"other pairs ({rest:,})" if groups else f"pairs ({rest:,})", tagged, False, _REST, 5)]
    pairs += [
        (f"{tag} ({len(group.members):,})", group.members, True, group.colour, 6)
        for tag, group in sorted(groups.items(), key=lambda each: -len(each[1].members))
    ]
    traces = [
        _trace(
            board, x, y, [row for row in rows if (board.ids[row] in samples) is inside], name, colour, size, captions
        )
        for name, samples, inside, colour, size in pairs
    ]
    if marked:
        traces.append(_trace(board, x, y, marked, f"selected ({len(marked):,})", _SELECTED, 11, captions))
    if lassoed is not None:
        inside = set(lassoed)
        for trace in traces:
            trace["selectedpoints"] = [place for place, sample in enumerate(trace["ids"]) if sample in inside]
    return [trace for trace in traces if trace["x"]]


def _trace(
    board: ScoreTable,
    x: str,
    y: str,
    rows: list[int],
    name: str,
    colour: str,
    size: int,
    captions: Mapping[str, str],
) -> dict[str, Any]:
    ids = board.ids[rows].tolist()
    return {
        "type": "scattergl",
        "mode": "markers",
        "x": drawn(x, board.columns[x][rows]).tolist(),
        "y": drawn(y, board.columns[y][rows]).tolist(),
        "ids": ids,
        "text": [
            f"{_shortened(captions.get(sample) or 'no caption')}<br>{across:.3g}, {up:.3g}"
            for sample, across, up in zip(ids, board.columns[x][rows], board.columns[y][rows], strict=True)
        ],
        "name": name,
        "marker": {"size": size, "opacity": 0.7, "color": colour},
        "hovertemplate": "%{text}<extra></extra>",
    }


def _shortened(text: str) -> str:
    """A caption for a small box, in which plotly takes tags for its own."""
    text = " ".join(text.split())
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…").replace("<", "&lt;")


def scatter_layout(x: str, y: str) -> dict[str, Any]:
    """Layout of the scatter plot."""
    return {
        "height": 300,
        "margin": {"t": 8, "b": 36, "l": 56, "r": 8},
        "dragmode": "lasso",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": _axis(x),
        "yaxis": {**_axis(y), "title": {"text": y, "font": {"size": 11}}},
        "hovermode": "closest",
    }
