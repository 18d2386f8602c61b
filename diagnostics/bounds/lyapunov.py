"""Finite-depth Lyapunov exponents along a path of nodes, by the norm of the product (Eq. 8) and by QR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diagnostics.bounds.paths import Path
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import local_derivatives


@dataclass(frozen=True, eq=False)
class LyapunovExponents:
    """Exponents per step; made by :func:`lyapunov_norm` and :func:`lyapunov_qr`.

    Attributes:
        per_sample: λ of each sample, ``(S,)`` by the norm, ``(S, directions)`` by QR; −inf where a direction is lost.
        value: λ₁: the batch mean, by QR its maximum over directions.
        steps: Number m of Jacobians multiplied.
    """

    per_sample: Tensor
    value: float
    steps: int


def lyapunov_norm(graph: Graph, nodes: Sequence[str] | Path | None = None) -> LyapunovExponents:
    """λ₁ = (1/m) log ‖D_m ⋯ D_1‖₂ (Eq. 8), the D being the local Jacobians along a path of m + 1 nodes.

    By definition ``‖J_π‖₂ = e^{λ₁ m}`` for this very path: an identity, not a prediction. For parts of the path
    ``e^{λ₁ k}`` is an estimate, and no bound. Products are rescaled on the way, so that deep ones stay in range.

    Args:
        graph: A captured network.
        nodes: The path, each node a parent of the next. None: all nodes but the model's output if they form a chain.
            Captured blocks of a residual network form one, when the sum belongs to the block.

    Raises:
        DiagnosticsError: the nodes are no path of at least one step.
    """
    jacobians = _along(graph, nodes)
    product = jacobians[0]
    logs = product.new_zeros(len(product))
    for jacobian in jacobians[1:]:
        scale = torch.linalg.matrix_norm(product)
        logs = logs + scale.log()
        product = jacobian @ (product / torch.where(scale > 0, scale, 1)[:, None, None])
    exponents = (logs + torch.linalg.matrix_norm(product, 2).log()) / len(jacobians)
    return LyapunovExponents(exponents, exponents.mean().item(), len(jacobians))


def lyapunov_qr(graph: Graph, nodes: Sequence[str] | Path | None = None) -> LyapunovExponents:
    """Exponents per direction by Benettin's QR: ``λ_i = (1/m) Σ_k log |R_k[i,i]|``, ``D_k Q_{k−1} = Q_k R_k``, Q₀ = I.

    The λ₁ of the paper's tables: batch mean, then the maximum over directions. It is never more than Eq. 8's: the
    product is ``Q_m R_m ⋯ R_1`` with upper triangular factors, so ``Π_k R_k[i,i]`` is an entry of a matrix with the
    norm of the product. At finite depth the two differ a lot, even in sign. Where a layer is narrower than the
    directions so far, those beyond its width end: there are as many directions as the narrowest node has entries.

    Args:
        graph: A captured network.
        nodes: The path, as for :func:`lyapunov_norm`.

    Raises:
        DiagnosticsError: the nodes are no path of at least one step.
    """
    jacobians = _along(graph, nodes)
    first = jacobians[0]
    frame = torch.eye(first.shape[2], dtype=first.dtype, device=first.device).expand(len(first), -1, -1)
    logs = first.new_zeros(len(first), first.shape[2])
    for jacobian in jacobians:
        frame, triangle = torch.linalg.qr(jacobian @ frame)
        stretch = triangle.diagonal(dim1=1, dim2=2).abs()
        logs = logs[:, : stretch.shape[1]] + stretch.log()
    exponents = logs / len(jacobians)
    return LyapunovExponents(exponents, exponents.mean(0).amax().item(), len(jacobians))


def _along(graph: Graph, nodes: Sequence[str] | Path | None) -> list[Tensor]:
    local = local_derivatives(graph)
    if nodes is None:
        names = tuple(node.name for node in graph.nodes if node.name in graph.chosen)
        inside = set(names)
        for p, u in pairwise(names):
            if [q for q in graph[u].parents if q in inside] != [p]:
                raise DiagnosticsError(
                    f"the nodes are not a chain: {u!r} has the parents {graph[u].parents}. Say along which path, as in "
                    "nodes=diagnostics.bounds.paths.paths(graph, first, last)[0]."
                )
    else:
        names = nodes.nodes if isinstance(nodes, Path) else tuple(nodes)
    if len(names) < 2:
        raise DiagnosticsError(f"an exponent needs a path of at least two nodes, got {names}.")
    for p, u in pairwise(names):
        if p not in local.jacobians[graph[u].name]:
            raise DiagnosticsError(f"{p!r} is no parent of {u!r}, whose parents are {graph[u].parents}.")
    return [local.jacobians[u][p] for p, u in pairwise(names)]
