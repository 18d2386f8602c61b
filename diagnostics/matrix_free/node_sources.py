"""Which node's nonlinearity makes the tensor part, from Hessian products with random probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph
from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.routing import route
from diagnostics.matrix_free.square_norms import jackknife


@dataclass(frozen=True, eq=False)
class SourceShares:
    """Shares of nodes in the tensor part; made by :func:`estimated_sources`.

    Attributes:
        sources: Names of the nodes whose own curvature is not zero, in topological order.
        share: ⟨H^T(u), H^T⟩ / ‖H^T‖_F², ``(k,)``, in float64.
        share_error: Its standard error.
        norm_ratio: ‖H^T(u)‖_F / ‖H^T‖_F, ``(k,)``.
        tensor_norm: ‖H^T‖_F.
        probes: Random probes that they are estimated from.
    """

    sources: tuple[str, ...]
    share: Tensor
    share_error: Tensor
    norm_ratio: Tensor
    tensor_norm: float
    probes: int


def estimated_sources(graph: Graph, probes: int, generator: torch.Generator) -> SourceShares:
    """Shares ⟨H^T(u), H^T⟩ / ‖H^T‖_F² of the assembled batch-mean blocks of the chosen nodes, from products.

    For a probe r at all nodes at once, ``E ⟨H^T(u) r, H^T r⟩ = ⟨H^T(u), H^T⟩``; :func:`diagnostics.route` gives the
    shares of all nodes from one product. Standard errors are the jackknife's over the probes.

    Raises:
        DiagnosticsError: a node has no second derivative.
    """
    injections = Injections(graph)
    products: dict[str, list[float]] = {}
    squares: dict[str, list[float]] = {}
    norms: list[float] = []
    for k in range(probes):
        tangents = {name: injections.spread(name, injections.signs(name, generator)) for name in graph.chosen}
        routed = route(graph, tangents, by_source=True)
        if routed.tensor_by_source is None:
            raise DiagnosticsError("the tensor part did not come apart by source.")
        whole = {v: injections.gather(v, routed.tensor[v]) for v in graph.chosen}
        norms.append(sum(column.double().square().sum().item() for column in whole.values()))
        for u, share in routed.tensor_by_source.items():
            own = {v: injections.gather(v, share[v]).double() for v in graph.chosen if v in share}
            products.setdefault(u, [0.0] * probes)[k] = sum((c * whole[v]).sum().item() for v, c in own.items())
            squares.setdefault(u, [0.0] * probes)[k] = sum(c.square().sum().item() for c in own.values())
    order = [node.name for node in graph if node.name in products and any(squares[node.name])]
    rows = torch.tensor([products[u] for u in order], dtype=torch.float64).reshape(len(order), probes)
    whole_norm = torch.tensor(norms, dtype=torch.float64)
    shares = rows.sum(1) / whole_norm.sum()
    without = (rows.sum(1, keepdim=True) - rows) / (whole_norm.sum() - whole_norm)
    own_norm = torch.tensor([squares[u] for u in order], dtype=torch.float64).reshape(len(order), probes)
    return SourceShares(
        sources=tuple(order),
        share=shares,
        share_error=jackknife(shares, without),
        norm_ratio=(own_norm.sum(1) / whole_norm.sum()).sqrt(),
        tensor_norm=whole_norm.mean().sqrt().item(),
        probes=probes,
    )
