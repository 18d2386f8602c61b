"""Figures of the page, as specifications for Plotly: traces and axes; colours that follow the page are set in it."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diagnostics.document.values import number
from diagnostics.rendering.text import figure, short

Chart: TypeAlias = dict[str, Any]
"""``id``, ``title``, ``about`` (a sentence below it), ``data`` and ``layout`` of Plotly; ``hover``: whose texts."""

PAIR_METRICS = {
    "coupling": ("Coupling C", "C"),
    "resonance": ("Resonance R = ‖H‖", "R"),
    "gn_norm": ("Gauss–Newton part ‖Hᴳᴺ‖", "‖Hᴳᴺ‖"),
    "tensor_norm": ("Tensor part ‖Hᵀ‖", "‖Hᵀ‖"),
    "stable_rank": ("Stable rank D", "D"),
    "gn_gap": ("Gap = ‖Hᵀ‖ / ‖Hᴳᴺ‖", "Gap"),
}
"""Metrics in the order of the page: title and symbol."""

BLUE, ORANGE, GREEN, PURPLE, GREY = "#3f87d9", "#d9822b", "#2f9e7e", "#a664c9", "#8b93a1"
_PARTS = {"H": ("H", BLUE), "GN": ("Gauss–Newton", ORANGE), "T": ("tensor", GREEN)}
_DISCARDED = {"total": "H", "gn": "Gauss–Newton", "tensor": "tensor"}
_BINS = 60


def spectra(section: Mapping[str, Any]) -> list[Chart]:
    """The density of eigenvalues of H and its parts, as shares in bins, where it was found."""
    densities = {name: section[name]["density"] for name in _PARTS if section[name]["density"] is not None}
    pairs = {
        name: [(v, w) for v, w in zip(map(number, d["values"]), map(number, d["weights"]), strict=True)
               if math.isfinite(v) and math.isfinite(w)]
        for name, d in densities.items()
    }  # fmt: skip
    everything = [value for part in pairs.values() for value, _ in part]
    edges = bin_edges(everything)
    if edges is None:
        return []
    traces = []
    for name, part in pairs.items():
        with np.errstate(over="ignore", invalid="ignore"):  # whatever weights are in the file
            share, _ = np.histogram([v for v, _ in part], bins=edges, weights=[w for _, w in part])
        heights = [float(s) if 0 < s < math.inf else None for s in share]
        title, color = _PARTS[name]
        look = {"type": "bar", "marker": {"color": color}, "opacity": 0.45} if name == "H" else {
            "type": "scatter", "mode": "lines", "line": {"color": color, "width": 2, "shape": "hvh"}}  # fmt: skip
        traces.append(
            {
                **look,
                "x": (edges[1:] / 2 + edges[:-1] / 2).tolist(),
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
    return [chart("spectrum-density", "Spectral density", traces, layout, about)]


def bin_edges(values: Sequence[float]) -> npt.NDArray[np.float64] | None:
    """Edges of equal bins from the least to the largest of finite numbers, wider where these are hardly different.

    None where there are no numbers, or the distance between them overflows.
    """
    if not values:
        return None
    low, high = min(values), max(values)
    scale = max(abs(low), abs(high))
    if high - low <= 1e-9 * scale:  # bins between them would have no width
        low, high = low - (scale / 10 or 0.5), high + (scale / 10 or 0.5)
    return np.linspace(low, high, _BINS + 1) if math.isfinite(high - low) else None


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
        "marker": {"color": GREEN},
        "error_x": error_bars(section["share_error"]),
        "customdata": [markup(name) for name in section["sources"]],
        "hovertemplate": "%{customdata}<br>share %{x:.3g}<extra></extra>",
        "name": "share",
    }
    layout = {
        "xaxis": {"title": {"text": "share of ‖Hᵀ‖²"}, "rangemode": "tozero"},
        "yaxis": {
            "tickmode": "array",
            "tickvals": at,
            "ticktext": [label(name) for name in section["sources"]],
            "autorange": "reversed",
        },
        "height": 140 + 22 * len(at),
    }
    return [chart("sources-share", "Sources of the tensor part", [trace], layout)]


def discarded_charts(section: Mapping[str, Any]) -> list[Chart]:
    """What a banded approximation of the parameters' Hessian discards, by bandwidth."""
    rows = section["discarded"]
    traces = []
    for (key, title), color in zip(_DISCARDED.items(), (BLUE, ORANGE, GREEN), strict=True):
        x, y = [finite(r["bandwidth"]) for r in rows], [finite(r[key]) for r in rows]
        traces.append(line(x, y, title, color, "solid") | {"mode": "lines+markers",
                      "error_y": error_bars([r[f"{key}_error"] for r in rows])})  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "bandwidth kept"}, "dtick": max(1, len(rows) // 10)},
        "yaxis": {"title": {"text": "share of ‖·‖² discarded"}, "rangemode": "tozero"},
    }
    return [chart("parameters-discarded", "Discarded by a band", traces, layout)]


def finite(value: Any) -> float | None:
    """A number of a report, None where it is NaN or infinite."""
    found = number(value)
    return found if math.isfinite(found) else None


def shown(value: Any, error: Any = None) -> str:
    """A number for the page: ``–`` for NaN, ``∞``, three digits, and its standard error."""
    rounding = error is not None and abs(number(error)) <= 1e-12 * abs(number(value))
    text = figure(value, None if rounding else error)
    return {"-": "–", "inf": "∞", "-inf": "−∞", "nan": "–"}.get(text, text.replace("-", "−"))


def chart(name: str, title: str, traces: list[dict[str, Any]], layout: dict[str, Any], about: str = "") -> Chart:
    """A chart of its parts."""
    return {"id": name, "title": title, "about": about, "data": traces, "layout": layout}


def line(x: Sequence[Any], y: Sequence[Any], name: str, color: str, dash: str) -> dict[str, Any]:
    """A trace of a line."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "name": name,
        "line": {"color": color, "dash": dash, "width": 2},
        "hovertemplate": f"{name}<br>%{{y:.3g}} at %{{x}}<extra></extra>",
    }


def error_bars(errors: Sequence[Any] | None) -> dict[str, Any]:
    """Error bars; none where there are no errors."""
    found = [] if errors is None else [finite(e) for e in errors]
    return {"type": "data", "array": found, "thickness": 1.2, "width": 3, "visible": any(found)}


def label(name: str) -> str:
    """A name that fits at an axis, as Plotly reads text."""
    return markup(short(name))


def markup(text: str) -> str:
    """Text as Plotly reads it: nothing in it is markup but the ends of lines."""
    return html.escape(text).replace("\n", "<br>")
