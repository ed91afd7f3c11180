"""Plotly figures of the panel, small enough for a browser whatever the number of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from fiftyone_ecif.runs.score_table import ScoreTable
from fiftyone_ecif.samples.selection import DIRECTIONS

_COLOURS = {"harmful": "#d9534f", "valuable": "#3fa66a", "suspicious": "#e08a2e"}
_STEEP = 5  # how many times the usual bar the highest is where a logarithmic axis is needed
_REST, _SELECTED = "#8a94a6", "#19b5fe"


def histogram_bars(board: ScoreTable, field: str, direction: str, threshold: float | None) -> list[dict[str, Any]]:
    """One bar a bin, those beyond the cut in the colour of its end."""
    edges, counts = board.histogram(field)
    middle = (edges[:-1] + edges[1:]) / 2
    if threshold is None:
        beyond = np.zeros(len(middle), dtype=bool)
    elif DIRECTIONS[direction] == "lowest":
        beyond = edges[:-1] <= threshold
    else:
        beyond = edges[1:] >= threshold
    return [
        {
            "type": "bar",
            "x": middle.tolist(),
            "y": counts.tolist(),
            "width": np.diff(edges).tolist(),
            "marker": {"color": [_COLOURS[direction] if taken else _REST for taken in beyond], "line": {"width": 0}},
            "hovertemplate": "%{y} pairs around %{x:.3g}<extra></extra>",
            "name": "pairs",
        }
    ]


def histogram_layout(board: ScoreTable, field: str) -> dict[str, Any]:
    """Layout of the histogram; counts on a logarithmic axis where few pairs are extreme."""
    counts = board.histogram(field).counts
    few = counts.max(initial=0) > _STEEP * np.median(counts)
    scale = {"type": "log", "dtick": 1} if few else {"type": "linear", "rangemode": "tozero"}
    return {
        "height": 210,
        "margin": {"t": 8, "b": 36, "l": 44, "r": 8},
        "bargap": 0,
        "showlegend": False,
        "dragmode": "select",
        "selectdirection": "h",
        "xaxis": {"title": {"text": field, "font": {"size": 11}}, "zeroline": True},
        "yaxis": {**scale, "title": {"text": "pairs", "font": {"size": 11}}},
    }


def scatter_points(
    board: ScoreTable,
    x: str,
    y: str,
    groups: dict[str, set[str]],
    selected: list[str],
    lassoed: list[str] | None = None,
) -> list[dict[str, Any]]:
    """One point a pair, of at most some thousands of them, one trace for each group and one for the selected ones.

    Args:
        board: the scores.
        x: the horizontal score.
        y: the vertical one.
        groups: samples by the name of their group; a sample is drawn in the first that holds it.
        selected: samples to mark.
        lassoed (None): samples beside which all others fade.
    """
    rows = board.points(x, y)
    marked = [board.places[sample] for sample in selected if sample in board.places]
    traces, left = [], dict.fromkeys(rows.tolist())
    for name, members in groups.items():
        own = [row for row in left if board.ids[row] in members]
        traces.append(_trace(board, x, y, own, name, None, 6))
        for row in own:
            del left[row]
    traces.insert(0, _trace(board, x, y, list(left), "pairs", _REST, 5))
    if marked:
        traces.append(_trace(board, x, y, marked, "selected", _SELECTED, 11))
    if lassoed is not None:
        inside = set(lassoed)
        for trace in traces:
            trace["selectedpoints"] = [place for place, sample in enumerate(trace["ids"]) if sample in inside]
    return [trace for trace in traces if trace["x"]]


def _trace(
    board: ScoreTable, x: str, y: str, rows: list[int], name: str, colour: str | None, size: int
) -> dict[str, Any]:
    marker: dict[str, Any] = {"size": size, "opacity": 0.7}
    if colour:
        marker["color"] = colour
    return {
        "type": "scattergl",
        "mode": "markers",
        "x": board.columns[x][rows].tolist(),
        "y": board.columns[y][rows].tolist(),
        "ids": board.ids[rows].tolist(),
        "name": f"{name} ({len(rows):,})",
        "marker": marker,
        "hovertemplate": "%{x:.3g}, %{y:.3g}<extra></extra>",
    }


def scatter_layout(x: str, y: str) -> dict[str, Any]:
    """Layout of the scatter plot."""
    return {
        "height": 300,
        "margin": {"t": 8, "b": 36, "l": 56, "r": 8},
        "dragmode": "lasso",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": x, "font": {"size": 11}}},
        "yaxis": {"title": {"text": y, "font": {"size": 11}}},
    }
