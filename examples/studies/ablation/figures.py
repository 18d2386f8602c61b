"""Curves of one problem: objective against seconds and against gradient-equivalents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.results.files import replacing
from examples.studies.ablation.contender import Contender
from examples.studies.ablation.results import OBJECTIVE, SECONDS, WORK, Curve, Entry

Array = npt.NDArray[np.float64]
PEERS = ["#0072B2", "#E69F00", "#009E73", "#56B4E9", "#999999", "#B8A100"]
OURS = ["#D55E00", "#000000", "#CC79A7", "#882255"]
"""Okabe and Ito's colours and two like them, which colour-blind people can tell apart; peers and ours share none."""
MARKERS = ["", "o", "s", "^"]


def style(name: str, contenders: Sequence[Contender]) -> dict[str, object]:
    """Colour and marker of a contender, the same in every figure; ours are the thick ones."""
    names = [c.name for c in contenders]
    i = names.index(name)
    ours = contenders[i].ours
    group = [c.name for c in contenders if c.ours == ours]
    i = group.index(name)
    colours = OURS if ours else PEERS
    colour, marker = colours[i % len(colours)], "D" if ours else MARKERS[i // len(colours) % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 2.2 if ours else 1.1, "markersize": 3.5, "markevery": 0.15}


def draw(entries: Sequence[Entry], contenders: Sequence[Contender], titles: tuple[str, str], path: Path) -> None:
    """Save the figure of one problem's entries: medians over seeds, with their range where there are several.

    Args:
        entries: Of one problem. Tuned entries are solid, defaults dashed; variants are left out.
        contenders: All, in the order of their colours.
        titles: Of the figure, and of the objective.
        path: Of the PNG file.
    """
    shown = [e for e in entries if e.role != "variant" and any(len(curve) > 1 for curve in e.curves)]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for entry in shown:
        title = next(c.title for c in contenders if c.name == entry.contender)
        look = style(entry.contender, contenders)
        look["linestyle"] = "--" if entry.role == "default" else "-"
        look["label"] = f"{title}, defaults" if entry.role == "default" else title
        for axes, column in zip(panels, (SECONDS, WORK), strict=True):
            _line(axes, entry.curves, column, look)
    positive = all(point[OBJECTIVE] > 0 for e in shown for curve in e.curves for point in curve)
    for axes, label in zip(panels, ("seconds", "gradient-equivalents"), strict=True):
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
        if positive and shown:
            axes.set_yscale("log")
    starts = [curve[0][OBJECTIVE] for e in shown for curve in e.curves]
    if starts:  # what shoots up on its way to divergence should not flatten the others
        panels[0].set_ylim(top=3 * max(starts) if positive else None)
    panels[0].set_ylabel(titles[1])
    figure.suptitle(titles[0], fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=110, metadata={"Software": None})


def _line(axes: Axes, curves: Sequence[Curve], column: int, look: dict[str, object]) -> None:
    grid, values = on_one_grid([curve for curve in curves if len(curve) > 1], column)
    if not len(grid):
        return
    axes.plot(grid, np.median(values, axis=0), **look)  # type: ignore[arg-type]
    if len(values) > 1:
        axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=str(look["color"]), alpha=0.12, lw=0)


def on_one_grid(curves: Sequence[Curve], column: int, points: int = 80) -> tuple[Array, Array]:
    """Curves at the same places, geometrically spaced over what all of them cover: the last objective until there."""
    start = max((curve[1][column] for curve in curves), default=math.inf)
    end = min((curve[-1][column] for curve in curves), default=0.0)
    if not 0 < start <= end:
        return np.zeros(0), np.zeros((0, 0))
    grid = np.geomspace(start, end, points)
    grid[-1] = end  # geomspace rounds
    rows = []
    for curve in curves:
        places = np.array([point[column] for point in curve])
        objectives = np.clip([point[OBJECTIVE] for point in curve], None, 1e30)  # beyond, logarithmic axes overflow
        rows.append(objectives[np.searchsorted(places, grid, side="right") - 1])
    return grid, np.array(rows)
