"""Plots that examples share, each drawn into axes that it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

import diagnostics

Curve = Sequence[tuple[float, float]]

THRESHOLD = 1e-3
"""Eigenvalues below it are on the linear part of the axis."""
SIGMA = 0.12
"""Deviation of the Gaussian that smooths a density, in units of the stretched coordinate."""


def draw_curves(axes: Axes, curves: Mapping[str, Sequence[Curve]], black: str) -> None:
    """The runs of each method in one colour, the first one strong; in black where its name starts with ``black``."""
    for name, runs in curves.items():
        (line,) = axes.plot(*zip(*runs[0], strict=True), label=name, color="black" if name.startswith(black) else None)
        for run in runs[1:]:
            axes.plot(*zip(*run, strict=True), color=line.get_color(), alpha=0.4)
    axes.legend(fontsize=8)


def draw_pairs(figure: Figure, axes: Iterable[Axes], table: diagnostics.MetricTable) -> None:
    """Four heat maps over the pairs of nodes: resonance, coupling, stable rank and Gauss-Newton gap."""
    panels = {
        "Resonance R = |H|": (table.resonance, LogNorm()),
        "Coupling C": (table.coupling, Normalize(0, 1)),
        "Stable rank D": (table.stable_rank, Normalize(1)),
        "GN-Gap = |H^T| / |H^GN| (grey: 0)": (table.gn_gap.where(table.gn_gap > 0, torch.nan), LogNorm()),
    }
    for ax, (title, (values, norm)) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(values.numpy(), norm=norm)
        ax.set_facecolor("lightgrey")
        ax.set(title=title, xticks=range(len(table.nodes)), yticks=range(len(table.nodes)))
        ax.set_xticklabels(table.nodes)
        ax.set_yticklabels([f"layer {name}" for name in table.nodes])
        figure.colorbar(image, ax=ax, shrink=0.8)


def draw_densities(
    axes: Axes,
    densities: Mapping[str, diagnostics.SpectralDensity],
    ends: tuple[float, float],
    colors: Mapping[str, str],
) -> None:
    """Spectral densities between the extreme eigenvalues ``ends``, on a symlog axis, labelled with their m⁻."""
    limits = _stretched(torch.tensor(ends))
    grid = torch.linspace(limits[0].item() - 1, limits[1].item() + 1, 1500, dtype=torch.float64)
    eigenvalues = grid.sign() * grid.abs().expm1() * THRESHOLD
    curves = {name: _smoothed(density, grid).numpy() for name, density in densities.items()}
    for name, density in densities.items():
        mass = density.negative_mass()
        label = f"{name}:  m⁻ = {mass.item():.3g} ± {mass.standard_error.item():.1g}"
        axes.plot(eigenvalues.numpy(), curves[name], label=label, color=colors[name], lw=1.5)
    axes.set_xscale("symlog", linthresh=THRESHOLD)
    axes.set_yscale("log")
    axes.set_ylim(0.3, 3 * max(curve.max() for curve in curves.values()))
    axes.axvline(0, color="black", lw=0.6)
    axes.set_xlabel("eigenvalue λ")
    axes.set_ylabel("eigenvalues per e-fold")
    axes.legend()


def _stretched(values: Tensor) -> Tensor:
    """The coordinate that a symlog axis is even in: ±log(1 + |λ| / threshold)."""
    return values.sign() * (values.abs() / THRESHOLD).log1p()


def _smoothed(density: diagnostics.SpectralDensity, grid: Tensor) -> Tensor:
    """Eigenvalues per unit of the stretched coordinate, smoothed by a Gaussian in it."""
    # nodes that are zero to rounding are zero, whatever their sign
    nodes = _stretched(torch.where(density.nodes.abs() < density.rounding, 0, density.nodes)).flatten()
    weights = density.weights.flatten() / len(density.nodes)
    kernel = (-0.5 * ((grid.unsqueeze(1) - nodes) / SIGMA).square()).exp() / (SIGMA * (2 * torch.pi) ** 0.5)
    counts: Tensor = density.size * (kernel @ weights)
    return counts
