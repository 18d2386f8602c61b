"""Charts of the metrics of pairs: heat maps, and metrics by distance with their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diagnostics.document.values import number
from diagnostics.rendering.charts import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PAIR_METRICS,
    PURPLE,
    Chart,
    chart,
    error_bars,
    finite,
    label,
    line,
    markup,
    shown,
)

_BOUNDS = {
    "jacobian": ("≤ by Jacobians", ORANGE, "dash"),
    "path": ("≤ by paths", GREEN, "dot"),
    "depth": ("≤ by ρ and depth", PURPLE, "dashdot"),
    "count": ("≤ by counted paths", GREY, "longdash"),
    "geometric": ("≤ geometric", GREY, "dot"),
}
_MOST_WRITTEN, _MOST_TICKS = 6, 14


def heat_maps(section: Mapping[str, Any], tops: Mapping[str, float], prefix: str) -> list[Chart]:
    """A heat map of each metric of all pairs; values of NaN or infinity are left blank.

    Args:
        section: ``metrics`` or ``parameters``.
        tops: Where the colours of each metric end, so that checkpoints share them.
        prefix: Of the charts' ids.
    """
    names = section["nodes"]
    marked = range(0, len(names), math.ceil(len(names) / _MOST_TICKS) or 1)
    ticks = {"tickmode": "array", "tickvals": list(marked), "ticktext": [label(names[i]) for i in marked]}
    axis = {
        "showgrid": False,
        "zeroline": False,
        "tickfont": {"size": 12 if len(names) <= _MOST_TICKS else 10},
        **ticks,
    }
    ends, gap = [-0.5, len(names) - 0.5], 1 if len(names) <= _MOST_TICKS else 0
    found = []
    for metric, (title, symbol) in PAIR_METRICS.items():
        trace: dict[str, Any] = {
            "type": "heatmap",
            "z": [[finite(value) for value in row] for row in section[metric]],
            "zmin": 0,
            "zmax": tops[metric],
            "hovertemplate": "%{customdata}<extra></extra>",
            "hoverongaps": True,
            "xgap": gap,
            "ygap": gap,
            "colorbar": {"thickness": 8, "outlinewidth": 0, "len": 0.9, "nticks": 5},
            "name": symbol,
        }
        if len(names) <= _MOST_WRITTEN:
            trace |= {"text": [[_brief(value) for value in row] for row in section[metric]], "texttemplate": "%{text}"}
        layout: dict[str, Any] = {
            "xaxis": {**axis, "range": ends, "tickangle": -45},
            "yaxis": {**axis, "range": ends[::-1]},
        }
        found.append({"id": f"{prefix}-{metric}", "title": title, "about": "", "data": [trace], "layout": layout})
    return found


def pair_text(section: Mapping[str, Any], i: int, j: int) -> str:
    """All figures of a pair in lines, with their standard errors."""
    errors = section["errors"]
    names = section["nodes"]
    lines = [f"{names[i]} × {names[j]}", f"distance {shown(section['distance'][i][j])}"]
    for metric, (_, symbol) in PAIR_METRICS.items():
        lines.append(f"{symbol} = {shown(section[metric][i][j], errors and errors[metric][i][j])}")
    return "\n".join(lines)


def hover_texts(section: Mapping[str, Any]) -> list[list[str]]:
    """:func:`pair_text` of all pairs, as Plotly shows it."""
    n = len(section["nodes"])
    return [[markup(pair_text(section, i, j)) for j in range(n)] for i in range(n)]


def distance_charts(section: Mapping[str, Any], epsilon: float, bounds: Any, prefix: str) -> list[Chart]:
    """C, R, D and Gap by distance: means with standard errors, all pairs behind them, the threshold, the bounds."""
    found = []
    titles = {"coupling": "Coupling", "resonance": "Resonance", "stable_rank": "Stable rank", "gn_gap": "Gap"}
    for metric, title in titles.items():
        traces = [_pairs(section, metric), _means(section, metric)]
        axis: dict[str, Any] = {"title": {"text": PAIR_METRICS[metric][1]}, "rangemode": "tozero"}
        about = ""
        if metric == "coupling":
            farthest = max((finite(row["distance"]) or 0.0 for row in section["by_distance"]), default=0.0)
            traces.append(line([0.0, farthest], [epsilon, epsilon], f"ε = {epsilon:g}", GREY, "dot"))
        height = 304
        if metric == "resonance":
            axis = {"title": {"text": "R"}, "type": "log", "exponentformat": "power", "nticks": 6}
            if bounds is not None:
                traces += bounds_by_distance(section, bounds)
                height = 380
                about = "Dashed: means over pairs of upper bounds, of which those by Jacobians are the sharpest."
        layout = {"xaxis": {"title": {"text": "distance"}, "dtick": _step(section)}, "yaxis": axis, "height": height}
        found.append(chart(f"{prefix}-distance-{metric}", f"{title} by distance", traces, layout, about))
    return found


def bounds_by_distance(section: Mapping[str, Any], bounds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Means over the pairs of a distance of each bound on R, as lines; of means, the bounds' means are bounds."""
    at = {name: i for i, name in enumerate(section["nodes"])}
    names = bounds["nodes"]
    values: dict[str, dict[float, list[float]]] = {level: {} for level in _BOUNDS}
    for i, v in enumerate(names):
        for j in range(i, len(names)):
            if v not in at or names[j] not in at:
                continue
            distance = number(section["distance"][at[v]][at[names[j]]])
            for level, by in values.items():
                by.setdefault(distance, []).append(number(bounds[level][i][j]))
    traces = []
    for level, (title, color, dash) in _BOUNDS.items():
        x = sorted(d for d in values[level] if math.isfinite(d))
        y = [finite(sum(v / len(values[level][d]) for v in values[level][d])) for d in x]  # the sum may overflow
        if any(v is not None for v in y):
            traces.append(line(x, y, title, color, dash))
    return traces


def top(values: Sequence[Sequence[Any]]) -> float:
    """The largest finite value of a matrix of a report, 0 if there is none."""
    return max((v for row in values for v in map(number, row) if math.isfinite(v)), default=0.0)


def _pairs(section: Mapping[str, Any], metric: str) -> dict[str, Any]:
    names, n = section["nodes"], len(section["nodes"])
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "pairs",
        "x": [finite(section["distance"][i][j]) for i, j in pairs],
        "y": [finite(section[metric][i][j]) for i, j in pairs],
        "customdata": [markup(f"{names[i]} × {names[j]}") for i, j in pairs],
        "hovertemplate": "%{customdata}<br>%{y:.3g}<extra></extra>",
        "marker": {"color": BLUE, "size": 5, "opacity": 0.35},
        "showlegend": False,
    }


def _means(section: Mapping[str, Any], metric: str) -> dict[str, Any]:
    rows = [row for row in section["by_distance"] if finite(row["distance"]) is not None]
    drawn = line([finite(r["distance"]) for r in rows], [finite(r[metric]) for r in rows], "mean", BLUE, "solid")
    errors = [None if r["errors"] is None else r["errors"].get(metric) for r in rows]
    return drawn | {"mode": "lines+markers", "error_y": error_bars(errors), "showlegend": False}


def _brief(value: Any) -> str:
    """Two digits, for the cell of a heat map."""
    found = number(value)
    if math.isfinite(found) and 100 <= abs(found) < 1e4:
        return f"{found:.0f}"
    return shown(value) if not math.isfinite(found) else f"{found:.2g}".replace("e-0", "e−").replace("e+0", "e")


def _step(section: Mapping[str, Any]) -> int:
    distances = [finite(row["distance"]) or 0.0 for row in section["by_distance"]]
    return max(1, math.ceil(max(distances, default=0.0) / 10))
