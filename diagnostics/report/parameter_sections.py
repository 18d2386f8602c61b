"""Sections about parameters: the spectrum of H, Gauss-Newton and tensor part, and what a banded H discards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diagnostics.estimators.lanczos import extreme_eigenpairs
from diagnostics.estimators.spectral_density import SpectralDensity, basis_bytes, spectral_density
from diagnostics.estimators.symmetric_eigen import eigh, eigvalsh
from diagnostics.matrix_free.discarded import discarded_share
from diagnostics.matrix_free.pair_estimates import Sampling
from diagnostics.matrix_free.parameter_metrics import estimate_parameter_metrics
from diagnostics.operators.descent import gain_along
from diagnostics.operators.parameter_groups import ParameterGroups
from diagnostics.report.node_sections import tabulated
from diagnostics.report.workbench import Workbench
from diagnostics.results.metric_table import MetricTable
from diagnostics.results.pair_formulas import largest_singular_value, resonance

_OF_A_PRODUCT = 10
"""Vectors of the parameters that a product and its step hold beside the basis."""


def spectrum(bench: Workbench) -> dict[str, Any]:
    """Eigenvalues of the parameters' H, GN and T: extreme ones, m⁻, trace and density."""
    op = bench.operator
    loss, gradient = op.loss_and_gradient()
    section: dict[str, Any] = {"parameters": op.shape[0], "loss": loss.item(), "gradient_norm": gradient.norm().item()}
    parts = {n: _all_eigenvalues(bench, n) if bench.dense else _estimated(bench, n) for n in ("H", "GN", "T")}
    found, lowest = {name: figures for name, (figures, _) in parts.items()}, parts["H"][1]
    largest, smallest = found["H"]["largest"], found["H"]["smallest"]
    sharpness = max(largest, 0.0)
    hvp = op @ gradient
    squared = gradient.square().sum()
    escape: tuple[float | None, float | None] = (None, None)
    if smallest < 0 and lowest is not None:
        escape = gain_along(op, lowest, (gradient @ lowest).item())
    return section | {
        "exact": bench.dense,
        "products": None if bench.dense else sum(part["products"] for part in found.values()),
        **found,
        "sharpness": sharpness,
        "stable_lr": 2 / sharpness if sharpness > 0 else None,
        "negative_ratio": max(-smallest, 0.0) / sharpness if sharpness > 0 else None,
        "curvature_along_gradient": ((gradient * hvp).sum() / squared).item() if squared > 0 else None,
        "escape_length": escape[0],
        "escape_gain": escape[1],
    }


def _all_eigenvalues(bench: Workbench, name: str) -> tuple[dict[str, Any], Tensor | None]:
    """The figures of one part, and of H the eigenvector of λ_min too."""
    matrix = dict(zip(("H", "GN", "T"), bench.matrices, strict=True))[name]
    values, vectors = eigh(matrix) if name == "H" else (eigvalsh(matrix), None)
    n = len(values)
    density = SpectralDensity(values.unsqueeze(0), torch.full_like(values, 1 / n).unsqueeze(0), n, n, n, True)
    return _of_density(density) | {
        "largest": values[-1].item(),
        "largest_residual": 0.0,
        "smallest": values[0].item(),
        "smallest_residual": 0.0,
        "converged": True,
        "products": n,
    }, None if vectors is None else vectors[:, 0]


def _estimated(bench: Workbench, name: str) -> tuple[dict[str, Any], Tensor | None]:
    op, light = bench.part(name), bench.light or "spectrum" in bench.cut
    generator = bench.generator(f"spectrum of {name}")
    end = "largest" if name == "GN" else "both"
    most = {"H": 12, "GN": 8, "T": 8}[name] if light else 60
    limit = max(1, bench.settings.memory_limit - _OF_A_PRODUCT * op.shape[0] * op.dtype.itemsize)
    pairs = extreme_eigenpairs(
        op,
        which=end,  # type: ignore[arg-type]
        rtol=1e-3,
        max_products=most,
        memory_limit=limit,
        generator=generator,
    )
    smallest, largest = (0, -1) if pairs.values[0] <= pairs.values[-1] else (-1, 0)
    ends: dict[str, Any] = {
        "largest": pairs.values[largest].item(),
        "largest_residual": pairs.residuals[largest].item(),
        "smallest": pairs.values[smallest].item() if end == "both" else None,
        "smallest_residual": pairs.residuals[smallest].item() if end == "both" else None,
        "converged": pairs.converged,
        "products": pairs.products,
    }
    if light and name != "H":
        return dict.fromkeys(_of_density(None)) | ends, None
    probes, steps = (2, 8) if light else (15, 30)
    keeps = basis_bytes(op, steps) <= limit
    if not keeps:
        bench.reduced["spectrum"] = "Lanczos vectors are not kept"
    density = spectral_density(
        op,
        probes=probes,
        steps=steps,
        batch=1 if light else 10,
        reorthogonalise=keeps,
        memory_limit=limit,
        generator=generator,
    )
    lowest = pairs.vectors[:, smallest] if end == "both" else None
    return _of_density(density) | ends | {"products": pairs.products + density.products}, lowest


def _of_density(density: SpectralDensity | None) -> dict[str, Any]:
    if density is None:
        return dict.fromkeys(
            ("trace", "trace_error", "negative_mass", "negative_mass_error", "absolute_sum", "negative_fraction")
        ) | {"density": None}
    trace, mass = density.spectral_sum(lambda x: x), density.negative_mass()
    absolute = density.spectral_sum(torch.abs)
    return {
        "trace": trace.item(),
        "trace_error": trace.standard_error.item(),
        "negative_mass": mass.item(),
        "negative_mass_error": mass.standard_error.item(),
        "absolute_sum": absolute.item(),
        "negative_fraction": density.fraction_below().item(),
        "density": {
            "values": density.nodes.flatten(),
            "weights": (density.weights / len(density.nodes)).flatten(),
            "probes": len(density.nodes),
            "steps": density.steps,
        },
    }


def parameters(bench: Workbench) -> dict[str, Any]:
    """The metrics of the parameters' blocks, grouped by node, and what a banded approximation discards."""
    groups, distance = by_node(bench)
    if bench.dense:
        table = dense_group_metrics(bench, groups, distance)
    else:
        op, limit = bench.operator, bench.settings.memory_limit
        sampling = Sampling(bench.probes_of("parameters"), "rademacher", 0, 1e-2, 0)
        chosen = ParameterGroups(op, groups)
        sizes = [chosen.size(name) for name in chosen.names]
        fitting = bench.fitting("parameters", sampling, sizes, op.dtype.itemsize, limit)
        table = estimate_parameter_metrics(
            op,
            groups,
            fitting.probes,
            generator=bench.generator("parameters"),
            deflate=0,
            spectral_rounds=0,
            distance=distance,
            memory_limit=limit,
        )
    finite = distance[distance.isfinite()].unique().tolist()
    discarded = []
    for k in finite:
        share = discarded_share(table, k)
        row: dict[str, Any] = {"bandwidth": k}
        for part in ("total", "gn", "tensor"):
            estimate = getattr(share, part)
            row |= {part: estimate.item(), f"{part}_error": estimate.standard_error.item()}
        discarded.append(row)
    sizes = [sum(bench.graph.parameters[n].numel() for n in names) for names in groups.values()]
    return tabulated(table) | {"sizes": sizes, "groups": list(groups.values()), "discarded": discarded}


def by_node(bench: Workbench) -> tuple[dict[str, Sequence[str]], Tensor]:
    """Parameters by the first node that is computed from them, and the distances of these nodes, ``(n, n)``."""
    graph, known = bench.graph, set(bench.operator.space.parameters)
    groups: dict[str, Sequence[str]] = {}
    for node in graph:
        own = [name for name in node.parameters if name in known]
        known -= set(own)
        if own:
            groups[node.name] = own
    order = [node.name for node in graph]
    index = torch.tensor([order.index(name) for name in groups], dtype=torch.long)
    return groups, graph.distances[index][:, index]


def dense_group_metrics(bench: Workbench, groups: dict[str, Sequence[str]], distance: Tensor) -> MetricTable:
    """The same table from the matrices themselves."""
    chosen = ParameterGroups(bench.operator, groups)
    index = {name: chosen.index(name) for name in chosen.names}
    n = len(index)

    def norms(matrix: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = [matrix[index[v]][:, index[w]] for v in index for w in index]
        return torch.stack([norm(block) for block in blocks]).reshape(n, n)

    total, gn, tensor = bench.matrices
    return MetricTable.from_norms(
        tuple(index),
        total=norms(total, resonance),
        gn=norms(gn, resonance),
        tensor=norms(tensor, resonance),
        spectral=norms(total, largest_singular_value),
        distance=distance,
    )
