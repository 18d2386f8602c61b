"""The section about bounds: how far curvature reaches, what bounds it, and what rank it can have."""

from __future__ import annotations

import math
from typing import Any

import networkx as nx

from diagnostics.bounds.gains import local_gains
from diagnostics.bounds.interaction import a_priori_radius
from diagnostics.bounds.lyapunov import lyapunov_norm, lyapunov_qr
from diagnostics.bounds.ranks import bottleneck, rank_bounds
from diagnostics.bounds.resonance import resonance_bounds
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph
from diagnostics.report.workbench import Workbench

_LEVELS = ("measured", "jacobian", "path", "depth", "count", "geometric")


def bounds(bench: Workbench) -> dict[str, Any]:
    """Bottlenecks of the graph; where local derivatives are at hand also ρ, λ₁ and bounds on resonance and rank."""
    graph, epsilon = bench.graph, bench.settings.epsilon
    narrow = []
    for name in graph.chosen:
        width, cut = bottleneck(graph, name)
        entries = graph[name].value.numel() // graph.samples
        narrow.append({"node": name, "entries": entries, "width": width, "cut": list(cut)})
    section: dict[str, Any] = {"bottlenecks": narrow}
    missing = ("gains", "lyapunov", "resonance", "ranks", "a_priori_radius")
    if not bench.plan.exact:
        reason = f"gains, exponents and bounds need local Jacobians: {bench.plan.reason}"
        return section | dict.fromkeys(missing) | {"reason": reason}
    gains = local_gains(graph)
    levels = resonance_bounds(graph, bench.blocks)
    ranks = rank_bounds(graph, bench.blocks, part="gn")
    ratio = gains.children * gains.rho
    return section | {
        "gains": {
            "rho": gains.rho,
            "rho_mean": gains.rho_mean,
            "children": gains.children,
            "branch": gains.branch,
            "margin": gains.margin,
            "sharp_margin": gains.sharp_margin,
        },
        "lyapunov": _lyapunov(bench),
        "a_priori_radius": a_priori_radius(ratio, epsilon) if math.isfinite(ratio) else None,
        "resonance": {"nodes": list(levels.nodes), **{name: getattr(levels, name) for name in _LEVELS}},
        "ranks": {
            "nodes": list(ranks.nodes),
            "part": ranks.part,
            "bound": ranks.bound,
            "rank": ranks.rank,
            "stable": ranks.stable,
        },
        "reason": None,
    }


def _lyapunov(bench: Workbench) -> dict[str, Any] | None:
    path = longest_path(bench.graph)
    try:
        by_norm = lyapunov_norm(bench.graph, path)
        by_qr = lyapunov_qr(bench.graph, path)
    except DiagnosticsError:
        return None  # no path of two nodes
    return {"path": path, "norm": by_norm.value, "qr": by_qr.value, "steps": by_norm.steps}


def longest_path(graph: Graph) -> list[str]:
    """A longest directed path of chosen nodes."""
    chosen = graph.to_networkx().subgraph(graph.chosen)
    path: list[str] = nx.dag_longest_path(chosen)
    return path
