"""Figures of the page, as specifications for Plotly: traces and axes; colours that follow the page are set in it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from diagnostics.reporting.text import figure, short
from diagnostics.reporting.values import number

Chart: TypeAlias = dict[str, Any]
"""``id``, ``title``, ``about`` (a sentence below it), ``data`` and ``layout`` of Plotly; ``hover``: whose texts."""

METRICS = {
    "coupling": ("Coupling C", "C"),
    "resonance": ("Resonance R = ‖H‖", "R"),
    "gn_norm": ("Gauss–Newton part ‖Hᴳᴺ‖", "‖Hᴳᴺ‖"),
    "tensor_norm": ("Tensor part ‖Hᵀ‖", "‖Hᵀ‖"),
    "stable_rank": ("Stable rank D", "D"),
    "gn_gap": ("Gap = ‖Hᵀ‖ / ‖Hᴳᴺ‖", "Gap"),
}
"""Metrics in the order of the page: title and symbol."""

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#3f87d9", "#d9822b", "#2f9e7e", "#a664c9", "#8b93a1"
_BOUNDS = {
    "jacobian": ("≤ by Jacobians", _ORANGE, "dash"),
    "path": ("≤ by paths", _GREEN, "dot"),
    "depth": ("≤ by ρ and depth", _PURPLE, "dashdot"),
    "count": ("≤ by counted paths", _GREY, "longdash"),
    "geometric": ("≤ geometric", _GREY, "dot"),
}
_PARTS = {"H": ("H", _BLUE), "GN": ("Gauss–Newton", _ORANGE), "T": ("tensor", _GREEN)}
_DISCARDED = {"total": "H", "gn": "Gauss–Newton", "tensor": "tensor"}
_MOST_WRITTEN, _MOST_TICKS = 6, 24
_BINS = 60


def heat_maps(section: Mapping[str, Any], tops: Mapping[str, float], prefix: str) -> list[Chart]:
    """A heat map of each metric of all pairs; values of NaN or infinity are left blank.

    Args:
        section: ``metrics`` or ``parameters``.
        tops: Where the colours of each metric end, so that checkpoints share them.
        prefix: Of the charts' ids.
    """
    names = section["nodes"]
    marked = range(0, len(names), math.ceil(len(names) / _MOST_TICKS) or 1)
    ticks = {"tickmode": "array", "tickvals": list(marked), "ticktext": [_label(names[i]) for i in marked]}
    axis = {"showgrid": False, "zeroline": False, "range": [-0.5, len(names) - 0.5], **ticks}
    found = []
    for metric, (title, symbol) in METRICS.items():
        trace: dict[str, Any] = {
            "type": "heatmap",
            "z": [[finite(value) for value in row] for row in section[metric]],
            "zmin": 0,
            "zmax": tops[metric],
            "hovertemplate": "%{customdata}<extra></extra>",
            "hoverongaps": True,
            "xgap": 1,
            "ygap": 1,
            "colorbar": {"thickness": 8, "outlinewidth": 0, "len": 0.9, "nticks": 5},
            "name": symbol,
        }
        if len(names) <= _MOST_WRITTEN:
            trace |= {"text": [[_brief(value) for value in row] for row in section[metric]], "texttemplate": "%{text}"}
        layout = {"xaxis": {**axis, "tickangle": -45}, "yaxis": {**axis, "range": axis["range"][::-1]}}
        found.append({"id": f"{prefix}-{metric}", "title": title, "about": "", "data": [trace], "layout": layout})
    return found


def pair_text(section: Mapping[str, Any], i: int, j: int) -> str:
    """All figures of a pair in lines, with their standard errors."""
    errors = section["errors"]
    names = section["nodes"]
    lines = [f"{names[i]} × {names[j]}", f"distance {shown(section['distance'][i][j])}"]
    for metric, (_, symbol) in METRICS.items():
        lines.append(f"{symbol} = {shown(section[metric][i][j], errors and errors[metric][i][j])}")
    return "\n".join(lines)


def hover_texts(section: Mapping[str, Any]) -> list[list[str]]:
    """:func:`pair_text` of all pairs, as Plotly shows it."""
    n = len(section["nodes"])
    return [[_markup(pair_text(section, i, j)) for j in range(n)] for i in range(n)]


def by_distance(section: Mapping[str, Any], epsilon: float, bounds: Any, prefix: str) -> list[Chart]:
    """C, R, D and Gap by distance: means with standard errors, all pairs behind them, the threshold, the bounds."""
    found = []
    titles = {"coupling": "Coupling", "resonance": "Resonance", "stable_rank": "Stable rank", "gn_gap": "Gap"}
    for metric, title in titles.items():
        traces = [_pairs(section, metric), _means(section, metric)]
        axis: dict[str, Any] = {"title": {"text": METRICS[metric][1]}, "rangemode": "tozero"}
        about = ""
        if metric == "coupling":
            farthest = max((number(row["distance"]) for row in section["by_distance"]), default=0.0)
            traces.append(_line([0.0, farthest], [epsilon, epsilon], f"ε = {epsilon:g}", _GREY, "dot"))
        height = 304
        if metric == "resonance":
            axis = {"title": {"text": "R"}, "type": "log", "exponentformat": "power", "nticks": 6}
            if bounds is not None:
                traces += bounds_by_distance(section, bounds)
                height = 380
                about = "Dashed: means over pairs of upper bounds, of which those by Jacobians are the sharpest."
        layout = {"xaxis": {"title": {"text": "distance"}, "dtick": _step(section)}, "yaxis": axis, "height": height}
        found.append(_chart(f"{prefix}-distance-{metric}", f"{title} by distance", traces, layout, about))
    return found


def spectra(section: Mapping[str, Any]) -> list[Chart]:
    """The density of eigenvalues of H and its parts, as shares in bins, where it was found."""
    densities = {name: section[name]["density"] for name in _PARTS if section[name]["density"] is not None}
    pairs = {
        name: [(v, w) for v, w in zip(map(number, d["values"]), map(number, d["weights"]), strict=True)
               if math.isfinite(v) and math.isfinite(w)]
        for name, d in densities.items()
    }  # fmt: skip
    everything = [value for part in pairs.values() for value, _ in part]
    if not everything:
        return []
    edges = np.histogram_bin_edges(everything, bins=_BINS)
    traces = []
    for name, part in pairs.items():
        share, _ = np.histogram([v for v, _ in part], bins=edges, weights=[w for _, w in part])
        heights = [float(s) if s > 0 else None for s in share]
        title, color = _PARTS[name]
        look = {"type": "bar", "marker": {"color": color}, "opacity": 0.45} if name == "H" else {
            "type": "scatter", "mode": "lines", "line": {"color": color, "width": 2, "shape": "hvh"}}  # fmt: skip
        traces.append(
            {
                **look,
                "x": ((edges[1:] + edges[:-1]) / 2).tolist(),
                "y": heights,
                "name": title,
                "hovertemplate": f"{title}<br>λ ≈ %{{x:.3g}}<br>share %{{y:.2~e}}<extra></extra>",
            }
        )
    layout = {
        "barmode": "overlay",
        "bargap": 0,
        "xaxis": {"title": {"text": "eigenvalue λ"}, "zeroline": True},
        "yaxis": {
            "title": {"text": "share of eigenvalues"},
            "type": "log",
            "exponentformat": "power",
            "range": [
                math.log10(0.3 / max(section["parameters"], 1)),
                0.15,
            ],  # less than one eigenvalue is no eigenvalue
        },
    }
    how = "all eigenvalues" if section["exact"] else "Lanczos quadrature"
    about = f"{len(edges) - 1} bins; {how}. Shares are on a logarithmic scale, down to a third of one eigenvalue."
    return [_chart("spectrum-density", "Spectral density", traces, layout, about)]


def source_bars(section: Mapping[str, Any]) -> list[Chart]:
    """Shares of the nodes in the square norm of the tensor part."""
    if not section["sources"]:
        return []
    at = list(range(len(section["sources"])))
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": at,
        "x": [finite(s) for s in section["share"]],
        "marker": {"color": _GREEN},
        "error_x": _errors(section["share_error"]),
        "customdata": [_markup(name) for name in section["sources"]],
        "hovertemplate": "%{customdata}<br>share %{x:.3g}<extra></extra>",
        "name": "share",
    }
    layout = {
        "xaxis": {"title": {"text": "share of ‖Hᵀ‖²"}, "rangemode": "tozero"},
        "yaxis": {
            "tickmode": "array",
            "tickvals": at,
            "ticktext": [_label(name) for name in section["sources"]],
            "autorange": "reversed",
        },
        "height": 140 + 22 * len(at),
    }
    return [_chart("sources-share", "Sources of the tensor part", [trace], layout)]


def discarded(section: Mapping[str, Any]) -> list[Chart]:
    """What a banded approximation of the parameters' Hessian discards, by bandwidth."""
    rows = section["discarded"]
    traces = []
    for (key, title), color in zip(_DISCARDED.items(), (_BLUE, _ORANGE, _GREEN), strict=True):
        x, y = [finite(r["bandwidth"]) for r in rows], [finite(r[key]) for r in rows]
        traces.append(_line(x, y, title, color, "solid") | {"mode": "lines+markers",
                      "error_y": _errors([r[f"{key}_error"] for r in rows])})  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "bandwidth kept"}, "dtick": max(1, len(rows) // 10)},
        "yaxis": {"title": {"text": "share of ‖·‖² discarded"}, "rangemode": "tozero"},
    }
    return [_chart("parameters-discarded", "Discarded by a band", traces, layout)]


def top(values: Sequence[Sequence[Any]]) -> float:
    """The largest finite value of a matrix of a report, 0 if there is none."""
    return max((v for row in values for v in map(number, row) if math.isfinite(v)), default=0.0)


def finite(value: Any) -> float | None:
    """A number of a report, None where it is NaN or infinite."""
    found = number(value)
    return found if math.isfinite(found) else None


def shown(value: Any, error: Any = None) -> str:
    """A number for the page: ``–`` for NaN, ``∞``, three digits, and its standard error."""
    rounding = error is not None and abs(number(error)) <= 1e-12 * abs(number(value))
    text = figure(value, None if rounding else error)
    return {"-": "–", "inf": "∞", "-inf": "−∞", "nan": "–"}.get(text, text.replace("-", "−"))


def _chart(name: str, title: str, traces: list[dict[str, Any]], layout: dict[str, Any], about: str = "") -> Chart:
    return {"id": name, "title": title, "about": about, "data": traces, "layout": layout}


def _pairs(section: Mapping[str, Any], metric: str) -> dict[str, Any]:
    names, n = section["nodes"], len(section["nodes"])
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "pairs",
        "x": [finite(section["distance"][i][j]) for i, j in pairs],
        "y": [finite(section[metric][i][j]) for i, j in pairs],
        "customdata": [_markup(f"{names[i]} × {names[j]}") for i, j in pairs],
        "hovertemplate": "%{customdata}<br>%{y:.3g}<extra></extra>",
        "marker": {"color": _BLUE, "size": 5, "opacity": 0.35},
        "showlegend": False,
    }


def _means(section: Mapping[str, Any], metric: str) -> dict[str, Any]:
    rows = [row for row in section["by_distance"] if finite(row["distance"]) is not None]
    line = _line([finite(r["distance"]) for r in rows], [finite(r[metric]) for r in rows], "mean", _BLUE, "solid")
    errors = [None if r["errors"] is None else r["errors"].get(metric) for r in rows]
    return line | {"mode": "lines+markers", "error_y": _errors(errors), "showlegend": False}


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
        y = [finite(float(np.mean(values[level][d]))) for d in x]
        if any(v is not None for v in y):
            traces.append(_line(x, y, title, color, dash))
    return traces


def _line(x: Sequence[Any], y: Sequence[Any], name: str, color: str, dash: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "name": name,
        "line": {"color": color, "dash": dash, "width": 2},
        "hovertemplate": f"{name}<br>%{{y:.3g}} at %{{x}}<extra></extra>",
    }


def _errors(errors: Sequence[Any] | None) -> dict[str, Any]:
    found = [] if errors is None else [finite(e) for e in errors]
    return {"type": "data", "array": found, "thickness": 1.2, "width": 3, "visible": any(found)}


def _brief(value: Any) -> str:
    """Two digits, for the cell of a heat map."""
    found = number(value)
    if math.isfinite(found) and 100 <= abs(found) < 1e4:
        return f"{found:.0f}"
    return shown(value) if not math.isfinite(found) else f"{found:.2g}".replace("e-0", "e−").replace("e+0", "e")


def _step(section: Mapping[str, Any]) -> int:
    distances = [finite(row["distance"]) or 0.0 for row in section["by_distance"]]
    return max(1, math.ceil(max(distances, default=0.0) / 10))


def _label(name: str) -> str:
    return _markup(short(name))


def _markup(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
