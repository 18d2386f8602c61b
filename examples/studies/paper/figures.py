"""Figures of the page: ours as lines with marks, the paper's as bands of one standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.results.files import replacing
from examples.studies.paper.comparison import TABLES, Line, compare

Rows: TypeAlias = Sequence[Mapping[str, Any]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart."""
PHASES = ("init", "mid", "final")


def draw_all(rows: Rows, folder: Path) -> list[str]:
    """Save every figure that there is data for; the names of the files."""
    drawn = []
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"paper_{name}.png") as file:
                figure.savefig(file, dpi=90)
            drawn.append(f"paper_{name}.png")
    return drawn


def _table(rows: Rows, name: str, index: int) -> list[Line]:
    return compare(name, TABLES[name][index], rows)


def _decay(rows: Rows) -> Figure | None:
    """Figures 2 and 3."""
    lines = _table(rows, "exp1", 1)
    if not any(line.ours for line in lines):
        return None
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for panels, quantity in zip(figure.subplots(2, 3), ("R", "C"), strict=True):
        for axes, phase in zip(panels, PHASES, strict=True):
            here = [line for line in lines if (line.quantity, line.phase) == (quantity, phase)]
            _curves(axes, here, lambda v: f"{v[1]}, L={v[0]}")
            axes.set_title(f"{quantity}(d), {phase}", fontsize="medium")
            axes.set_yscale("log")
    figure.axes[0].legend(fontsize="x-small", loc="lower left")
    return figure


def _curves(axes: Axes, lines: Iterable[Line], label: Callable[[tuple[str, ...]], str]) -> None:
    """Against the distance, a colour for each variant."""
    variants: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        variants.setdefault(line.variant, []).append(line)
    for (variant, found), colour in zip(variants.items(), COLOURS * 2, strict=False):
        d = [line.distance for line in found if line.distance is not None]
        mean, spread = (np.array([line.paper[i] for line in found]) for i in (0, 1))
        axes.fill_between(d, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        ours = [(line.distance, *line.ours) for line in found if line.ours and line.distance is not None]
        if ours:
            at, values, bars = zip(*ours, strict=True)
            axes.errorbar(at, values, bars, color=colour, marker="o", markersize=3, lw=1, label=label(variant))
    axes.set_xlabel("distance")
    axes.grid(alpha=0.25)


def _gap(rows: Rows) -> Figure | None:
    """Tables 4 and 5."""
    panels = [
        (name, title, _table(rows, name, 0)) for name, title in (("exp3", "no norm"), ("exp3_norm", "layer norm"))
    ]
    if not any(line.ours for _, _, lines in panels for line in lines):
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    every = figure.subplots(1, 3)
    for axes, (_, title, lines) in zip(every, panels, strict=False):
        variants = list(dict.fromkeys(line.variant for line in lines))
        for i, phase in enumerate(PHASES):
            here = [line for line in lines if (line.quantity, line.phase) == ("gap_global", phase)]
            at = np.array([variants.index(line.variant) for line in here]) + 0.25 * (i - 1)
            axes.bar(at, [line.paper[0] for line in here], 0.22, yerr=[line.paper[1] for line in here], alpha=0.35,
                     color=COLOURS[i], ecolor=COLOURS[i])  # fmt: skip
            ours = [(x, *line.ours) for x, line in zip(at, here, strict=True) if line.ours]
            if ours:
                x, y, bars = zip(*ours, strict=True)
                axes.errorbar(x, y, bars, color=COLOURS[i], marker="o", markersize=4, lw=0, elinewidth=1, label=phase)
        axes.set_xticks(range(len(variants)), [" ".join(v) for v in variants], rotation=30, fontsize="small")
        axes.set_title(f"Gap, {title}: paper (bars), ours (dots)", fontsize="medium")
        axes.grid(alpha=0.25)
    every[0].legend(fontsize="x-small", loc="upper left")
    lines = panels[0][2]
    for key, marker in (("paper", "s"), ("ours", "o")):
        found = {(line.variant, line.quantity): getattr(line, key) for line in lines if line.phase == "init"}
        points = [
            (found[v, "sigma_pp_sq"], gap)
            for (v, q), gap in found.items()
            if q == "gap_global" and gap and found.get((v, "sigma_pp_sq"))
        ]
        if points:
            axes = every[2]
            axes.plot([x[0] for x, _ in points], [y[0] for _, y in points], marker, mfc="none", label=key)
    every[2].set(xlabel="E[σ''²] at initialisation", ylabel="Gap")
    every[2].legend(fontsize="x-small", loc="upper left")
    every[2].grid(alpha=0.25)
    return figure


def _diamond(rows: Rows) -> Figure | None:
    """Figure N.2."""
    lines = [line for line in _table(rows, "exp4", 1) if line.quantity == "R_cross_AB"]
    if not any(line.ours for line in lines):
        return None
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    for panels, k in zip(figure.subplots(2, 3), ("2", "3"), strict=True):
        for axes, phase in zip(panels, PHASES, strict=True):
            here = [line for line in lines if (line.variant[0], line.phase) == (k, phase)]
            _curves(axes, here, lambda v: f"{v[1]}, {v[2]}")
            axes.set_title(f"R between the branches, k={k}, {phase}", fontsize="small")
            axes.set_yscale("log")
    figure.axes[0].legend(fontsize="x-small", loc="lower left")
    return figure


def _labels(rows: Rows) -> Figure | None:
    found: dict[str, list[tuple[float, float]]] = {}
    of_seed: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["experiment"] == "labels" and row["quantity"].startswith(("gap ", "error ")):
            kind, name = row["quantity"].split(" ", 1)
            at = (row["variant"]["activation"], row["seed"], name, row["distance"])
            of_seed.setdefault(at, {})[kind] = row["value"]
    for (activation, *_), pair in of_seed.items():
        found.setdefault(activation, []).append((pair["error"], pair["gap"]))
    if not found:
        return None
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for (activation, points), colour in zip(found.items(), COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, label=activation)
    axes.set(xlabel="norm of the mean error signal at the output", ylabel="Gap", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize="small", loc="upper left")
    axes.grid(alpha=0.25)
    return figure


def _densenet(rows: Rows) -> Figure | None:
    here = [row for row in rows if row["experiment"] == "densenet"]
    if not here:
        return None
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    wirings = list(dict.fromkeys(row["variant"]["wiring"] for row in here))
    for wiring, colour in zip(wirings, COLOURS, strict=False):
        for phase, style in (("init", "--"), ("final", "-")):
            of = [row for row in here if (row["variant"]["wiring"], row["phase"]) == (wiring, phase)]
            label = f"{wiring}, {phase}"
            for axes, quantity in zip(panels, ("R", "C"), strict=False):
                values = _means((row["distance"], row["value"]) for row in of if row["quantity"] == quantity)
                scale = values.get(0, 1.0) if quantity == "R" else 1.0
                axes.plot(list(values), [v / scale for v in values.values()], style, color=colour, marker="o",
                          markersize=3, label=label)  # fmt: skip
            own = _means((row["quantity"].split()[1], row["value"]) for row in of if _diagonal(row["quantity"]))
            panels[2].plot(range(len(own)), list(own.values()), style, color=colour, marker="o", markersize=3)
    for axes, title in zip(panels, ("R(d) / R(0)", "C(d)", "R(v, v) by layer"), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    panels[0].set_xlabel("distance")
    panels[1].set_xlabel("distance")
    panels[2].set_xlabel("layer")
    panels[0].legend(fontsize="x-small", loc="lower left")
    return figure


def _diagonal(quantity: str) -> bool:
    parts = quantity.split()
    return len(parts) == 3 and parts[0] == "R" and parts[1] == parts[2]


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    found: dict[Any, list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: statistics.fmean(values) for key, values in found.items()}


def _unet(rows: Rows) -> Figure | None:
    here = [row for row in rows if row["experiment"] == "unet" and row["quantity"].startswith("C ")]
    phase = "final" if any(row["phase"] == "final" for row in here) else "init"
    here = [row for row in here if row["phase"] == phase]
    if not here:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, skips in zip(figure.subplots(1, 2), (True, False), strict=True):
        values = _means((row["quantity"], row["value"]) for row in here if row["variant"]["skips"] is skips)
        names = list(dict.fromkeys(quantity.split()[1] for quantity in values))
        axes.set_title(f"C, {phase}, {'with' if skips else 'without'} skips", fontsize="medium")
        if not values:
            axes.set_axis_off()
            continue
        matrix = np.full((len(names), len(names)), np.nan)
        for quantity, value in values.items():
            i, j = (names.index(name) for name in quantity.split()[1:])
            matrix[i, j] = matrix[j, i] = value
        axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        for i, j in np.argwhere(np.isfinite(matrix)):
            axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=7,
                      color="black" if matrix[i, j] > 0.6 else "white")  # fmt: skip
        axes.set_xticks(range(len(names)), names, rotation=45, fontsize="small")
        axes.set_yticks(range(len(names)), names, fontsize="small")
    return figure


FIGURES: dict[str, Callable[[Rows], Figure | None]] = {
    "decay": _decay,
    "gap": _gap,
    "diamond": _diamond,
    "labels": _labels,
    "densenet": _densenet,
    "unet": _unet,
}
