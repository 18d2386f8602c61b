"""Sections about nodes: the network itself, the metrics of all pairs, the sources of the tensor part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.blocks.pair_metrics import metrics
from diagnostics.blocks.sources import curvature_sources
from diagnostics.document.schema import TABLE_METRICS
from diagnostics.errors import MemoryBudgetError
from diagnostics.graph.flatness import cannot_bend
from diagnostics.graph.graph import Graph
from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.node_metrics import estimate_metrics
from diagnostics.matrix_free.node_sources import estimated_sources
from diagnostics.matrix_free.pair_estimates import Sampling
from diagnostics.matrix_free.square_norms import jackknife
from diagnostics.operators.replay import along_the_tape
from diagnostics.report.workbench import Workbench
from diagnostics.results.metric_table import MetricTable
from diagnostics.results.pair_formulas import coupling, gn_gap


def network(bench: Workbench) -> dict[str, Any]:
    """The captured graph: nodes with shapes, parents and parameters, and what of the model no node uses."""
    graph = bench.graph
    signals = _signals(graph)
    used = {name for node in graph for name in node.parameters} | set(graph.loss_parameters)
    trained = [name for name, p in graph.parameters.items() if p.requires_grad]
    nodes = [
        {
            "name": node.name,
            "kind": None if node.module is None else type(node.module).__name__,
            "shape": list(node.shape),
            "entries": node.value.numel() // (graph.batch_size if graph.is_batched(node) else 1),
            "parents": list(node.parents),
            "children": list(node.children),
            "parameters": list(node.parameters),
            "parameter_count": sum(graph.parameters[name].numel() for name in node.parameters),
            "chosen": node.name in graph.chosen,
            "output": node.name in graph.outputs,
            "bends": not cannot_bend(node, [graph[p].value for p in node.parents]),
            "gradient": signals[node.name].norm().item() if node.name in signals else None,
            "dead_units": _dead_units(node.value, signals[node.name]) if node.name in signals else None,
        }
        for node in graph
    ]
    norms = [m for m in bench.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {
        "loss": graph.loss.item(),
        "batch_size": graph.batch_size,
        "coupled": graph.coupled,
        "batch_norm_in_training": any(m.training for m in norms),
        "nodes": nodes,
        "edges": [[parent, node.name] for node in graph for parent in node.parents],
        "unused_parameters": [name for name in trained if name not in used],
    }


def _signals(graph: Graph) -> dict[str, Tensor]:
    """The loss's gradient at each node from which a path leads to the loss, by one backward pass in pieces."""
    signals: dict[str, Tensor] = {}

    def back(end: Tensor, names: Sequence[str], signal: Tensor) -> None:
        if not names:
            return
        values = [graph[name].value for name in names]
        slopes = torch.autograd.grad(end, values, signal, retain_graph=True, allow_unused=True)
        for name, slope in zip(names, slopes, strict=True):
            if slope is not None:
                signals[name] = signals[name] + slope if name in signals else slope

    with along_the_tape(graph.loss.device):
        back(graph.loss, graph.loss_parents, torch.ones_like(graph.loss))
        for node in reversed(graph.nodes):
            if node.name in signals:
                back(node.segment, node.parents, signals[node.name])
    return signals


def _dead_units(value: Tensor, signal: Tensor) -> float | None:
    """The share of units with the same value, or no gradient, at all samples and places; of vectors and images."""
    if value.ndim not in (2, 4, 5):  # (B, d), (B, c, h, w): of sequences it is not known which dimension is which
        return None
    rows, slopes = (t.detach().movedim(1, 0).flatten(1) for t in (value, signal))
    constant = (rows == rows[:, :1]).all(1)
    return (constant | (slopes == 0).all(1)).double().mean().item()


def pair_metrics(bench: Workbench) -> dict[str, Any]:
    """R, C, D and Gap of all pairs of chosen nodes, by pair and by distance."""
    if bench.plan.exact:
        table = metrics(bench.blocks)
    else:
        graph, limit = bench.graph, bench.settings.memory_limit
        injections = Injections(graph)
        sampling = Sampling(bench.probes_of("metrics"), "rademacher", 10, 1e-2, 20)
        sizes = [injections.size(name) for name in graph.chosen]
        responses = limit - limit // 4
        fitting = bench.fitting("metrics", sampling, sizes, graph.loss.element_size(), responses)
        table = estimate_metrics(
            graph,
            fitting.probes,
            generator=bench.generator("metrics"),
            deflate=fitting.deflate,
            spectral_tolerance=fitting.spectral_tolerance,
            spectral_rounds=fitting.spectral_rounds,
            memory_limit=min(limit // 4, 2**30),
            responses_limit=responses,
        )
    return tabulated(table)


def tabulated(table: MetricTable) -> dict[str, Any]:
    """A table of metrics with its averages by distance, and all errors."""
    errors = table.standard_errors
    return {
        "exact": errors is None,
        "nodes": list(table.nodes),
        **{name: getattr(table, name) for name in (*TABLE_METRICS, "distance")},
        "errors": None if errors is None else {name: getattr(errors, name) for name in TABLE_METRICS},
        "probes": None if errors is None else errors.probes,
        "products": None if errors is None else errors.products + errors.passes,
        "gap_ratio": table.gap_ratio,
        "gap_ratio_error": None if errors is None else _summary_errors(table, _upper(table))["gap_ratio"],
        "by_distance": by_distance(table),
    }


def by_distance(table: MetricTable) -> list[dict[str, Any]]:
    """:meth:`diagnostics.MetricTable.by_distance` with the standard errors of the means.

    By the jackknife over probes, left out of all pairs at once. That of D is the mean of the pairs' own errors, as if
    they were fully correlated: an upper bound.
    """
    rows = []
    for row in table.by_distance().rows:
        entry: dict[str, Any] = dict(vars(row))
        if table.standard_errors is not None:
            here = _upper(table) & (table.distance == row.distance).to(table.resonance.device)
            entry["errors"] = _summary_errors(table, here)
        else:
            entry["errors"] = None
        rows.append(entry)
    return rows


def _upper(table: MetricTable) -> Tensor:
    return torch.ones_like(table.resonance, dtype=torch.bool).triu()


def _summary_errors(table: MetricTable, here: Tensor) -> dict[str, float]:
    """Standard errors of the means over the pairs ``here`` (n, n), and of the ratio of sums."""
    errors = table.standard_errors
    assert errors is not None
    r, gn, t = (errors.leave_one_out[name] for name in ("resonance", "gn_norm", "tensor_norm"))
    without = {
        "resonance": r[here].nanmean(0),
        "coupling": coupling(r)[here].nanmean(0),
        "gn_gap": gn_gap(t, gn)[here].nanmean(0),
        "gap_ratio": t[here].sum(0) / gn[here].sum(0),
    }
    full = {name: getattr(table, name)[here].nanmean() for name in ("resonance", "coupling", "gn_gap")}
    full["gap_ratio"] = table.tensor_norm[here].sum() / table.gn_norm[here].sum()
    found = {name: jackknife(full[name], values).item() for name, values in without.items()}
    return found | {"stable_rank": errors.stable_rank[here].nanmean().item()}


def sources(bench: Workbench) -> dict[str, Any]:
    """Which node's nonlinearity makes the tensor part, and the negative curvature."""
    if bench.plan.exact:
        table = curvature_sources(bench.blocks)
        return {
            "exact": True,
            "sources": list(table.sources),
            "share": table.share,
            "share_error": None,
            "norm_ratio": table.norm_ratio,
            "negative_share": table.negative_share,
            "gn_negative_share": table.gn_negative_share,
            "negative_mass": table.negative_mass,
            "tensor_norm": table.tensor_norm.square().sum().sqrt().item(),
            "probes": None,
        }
    graph, limit = bench.graph, bench.settings.memory_limit
    # of one product: the responses of every source at all chosen nodes, the tangents, and sums of responses
    needed = (len(graph) + 4) * sum(graph[name].value.numel() for name in graph.chosen) * graph.loss.element_size()
    if needed > limit:
        raise MemoryBudgetError(
            f"the shares of {len(graph)} sources at {len(graph.chosen)} nodes take {needed / 2**20:.3g} MiB, more than "
            f"the limit of {limit / 2**20:.3g} MiB. Use fewer nodes, a smaller batch or a larger memory_limit."
        )
    shares = estimated_sources(graph, bench.probes_of("sources"), bench.generator("sources"))
    return {
        "exact": False,
        "sources": list(shares.sources),
        "share": shares.share,
        "share_error": shares.share_error,
        "norm_ratio": shares.norm_ratio,
        "negative_share": None,
        "gn_negative_share": None,
        "negative_mass": None,
        "tensor_norm": shares.tensor_norm,
        "probes": shares.probes,
    }
