"""Figures for a paper or a notebook, by matplotlib: heat maps, metrics by distance, the spectrum."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.document.values import number
from diagnostics.errors import DiagnosticsError
from diagnostics.rendering.charts import PAIR_METRICS, bin_edges, finite
from diagnostics.rendering.formats import library
from diagnostics.rendering.pair_charts import bounds_by_distance
from diagnostics.rendering.text import short
from diagnostics.results.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEAT_MAPS = ("coupling", "resonance", "stable_rank", "gn_gap")
_BY_DISTANCE = {"coupling": "linear", "resonance": "log", "gn_gap": "linear"}
_MOST_LABELS = 24


def plot_report(report: Mapping[str, Any]) -> Figure:
    """Heat maps of C, R, D and Gap; C and R by distance, with bounds; the spectral density. What there is of these."""
    sections = report["sections"]
    metrics, spectrum = sections.get("metrics"), sections.get("spectrum")
    if spectrum is not None and spectrum["H"]["density"] is None:
        spectrum = None
    if metrics is None and spectrum is None:
        raise DiagnosticsError("there is nothing to plot: the report has neither metrics nor a spectral density.")
    rows, columns = (2, 4) if metrics is not None else (1, 1)
    figure = library("matplotlib.figure").Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(_plain(report["name"]))
    free = list(axes.flat)
    if metrics is not None:
        for name in _HEAT_MAPS:
            _heat_map(free.pop(0), metrics, name)
        for name, scale in _BY_DISTANCE.items():
            ax = free.pop(0)
            _by_distance(ax, metrics, name, scale, "mean")
            bounds = sections["bounds"]["resonance"] if "bounds" in sections else None
            if name == "coupling":
                epsilon = number(report["options"]["epsilon"])
                ax.axhline(epsilon, color="grey", ls=":", lw=1, label=f"ε = {epsilon:g}")
            if name == "resonance" and bounds is not None:
                _bounds(ax, metrics, bounds)
            ax.legend(fontsize="small")
    if spectrum is not None:
        ax = free.pop(0)
        for part in ("H", "GN", "T"):
            _spectrum(ax, spectrum, part, part)
        ax.legend(fontsize="small")
    for ax in free:
        ax.remove()
    return figure  # type: ignore[no-any-return]


def plot_comparison(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """C, R and Gap by distance, and the spectral density of H, a line for each report."""
    figure = library("matplotlib.figure").Figure(figsize=(16, 3.8), layout="constrained")
    axes = figure.subplots(1, 4)
    for report, name in zip(reports, names, strict=True):
        sections = report["sections"]
        for ax, (metric, scale) in zip(axes, _BY_DISTANCE.items(), strict=False):
            if "metrics" in sections:
                _by_distance(ax, sections["metrics"], metric, scale, _plain(name))
        if "spectrum" in sections:
            _spectrum(axes[3], sections["spectrum"], "H", _plain(name))
    for ax in axes:
        if ax.has_data():
            ax.legend(fontsize="small")
        else:
            ax.remove()
    return figure  # type: ignore[no-any-return]


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; without the date, so that the same report gives the same file."""
    suffix = os.fspath(path).rpartition(".")[2].lower()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with library("matplotlib").rc_context({"svg.hashsalt": "diagnostics"}), replacing(path) as file:
        figure.savefig(file, dpi=150, metadata=dates.get(suffix, {}))


def _heat_map(ax: Axes, section: Mapping[str, Any], name: str) -> None:
    values = np.array([[np.nan if finite(v) is None else finite(v) for v in row] for row in section[name]], dtype=float)
    n = len(section["nodes"])
    image = ax.imshow(values.reshape(n, n), vmin=0, cmap="viridis")
    marked = range(0, n, -(-n // _MOST_LABELS) or 1)
    labels = [_plain(short(section["nodes"][i])) for i in marked]
    ax.set_xticks(list(marked), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize="small")
    ax.set_yticks(list(marked), labels, fontsize="small")
    ax.set_title(PAIR_METRICS[name][0], fontsize="medium")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)


def _by_distance(ax: Axes, section: Mapping[str, Any], name: str, scale: str, label: str) -> None:
    rows = [r for r in section["by_distance"] if finite(r["distance"]) is not None and finite(r[name]) is not None]
    errors = [0.0 if r["errors"] is None else (finite(r["errors"].get(name)) or 0.0) for r in rows]
    x, y = [number(r["distance"]) for r in rows], [number(r[name]) for r in rows]
    ax.errorbar(x, y, yerr=errors if any(errors) else None, marker="o", ms=4, capsize=2, label=label)
    if scale == "log" and any(v > 0 for v in y):
        ax.set_yscale("log", nonpositive="clip")
    ax.set_xlabel("distance")
    ax.set_title(f"{PAIR_METRICS[name][0]} by distance", fontsize="medium")


def _bounds(ax: Axes, section: Mapping[str, Any], bounds: Mapping[str, Any]) -> None:
    for trace in bounds_by_distance(section, bounds):
        x, y = zip(*((a, b) for a, b in zip(trace["x"], trace["y"], strict=True) if b is not None), strict=True)
        ax.plot(x, y, ls="--", lw=1, label=trace["name"])


def _spectrum(ax: Axes, section: Mapping[str, Any], part: str, label: str) -> None:
    density = section[part]["density"]
    if density is None:
        return
    pairs = [(number(v), number(w)) for v, w in zip(density["values"], density["weights"], strict=True)]
    finite_pairs = [(v, w) for v, w in pairs if np.isfinite(v) and np.isfinite(w)]
    edges = bin_edges([v for v, _ in finite_pairs])
    if edges is None:
        return
    values, weights = zip(*finite_pairs, strict=True)
    ax.hist(values, bins=edges.tolist(), weights=weights, histtype="step", label=label)
    ax.set_yscale("log", nonpositive="clip")
    ax.set_xlabel("eigenvalue")
    ax.set_title("Share of eigenvalues", fontsize="medium")


def _plain(text: str) -> str:
    """Text without what matplotlib would typeset as mathematics."""
    return text.replace("$", r"\$")
