"""Every inter-layer Hessian block from local derivatives, in one forward and one backward sweep (docs/recursion.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diagnostics.autograd.kernels import plain_autograd, twice_differentiable
from diagnostics.blocks.containers import BlockMatrix, HessianBlocks
from diagnostics.blocks.factored import CongruentBlocks, FrontBlocks, TotalJacobians
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.memory_plan import check_memory, planned_bytes
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import LOSS, Curvature, LocalDerivatives, differentiate


def hessian_blocks(
    graph: Graph,
    pairs: Iterable[tuple[str, str]] | None = None,
    by_source: bool = False,
    *,
    memory_limit: int = 8 * 2**30,
) -> HessianBlocks:
    """Exact Hessian blocks H[v,w] = ∂²L/∂e_v∂e_w between activation nodes, for all samples at once.

    The derivative is with respect to additive injections ``f_v ← g_v(·) + e_v`` at 0: what automatic differentiation
    returns for intermediate tensors, for any pair of nodes. With local Jacobians D, local curvatures K and total
    Jacobians J (all per sample),

        H[v,w] = Σ_{u∈Ch(v)} D[u,v]ᵀ H[u,w]  +  Σ_{u∈Ch(v)} Σ_{q∈Pa(u)} K_u[v,q] J[q←w].

    The Gauss-Newton part is the same recursion with the loss's K alone, the tensor part with the K of all other nodes.
    It is evaluated by eliminating nodes from the loss backwards. While the nodes after v are gone, the front Φ_v is
    the Hessian of the rest of the network as a function of the nodes that it still reads, and

        H[v,w] = Σ_s Φ_v[v,s] J[s←w]        for w not after v.

    Blocks are kept as these factors and multiplied when asked for. Source: docs/recursion.md, which also corrects
    Eq. 2 of arXiv 2604.11639; the parts are those of its Thm 33.

    Args:
        graph: A captured network.
        pairs: Keep only the pairs among the nodes that these pairs name; None: all.
        by_source: Also split the tensor part by the node whose nonlinearity causes it (``blocks.tensor_by_source``).
        memory_limit: Bytes that the factors, and the products that give blocks of single samples, may take. For batch
            means alone, :func:`diagnostics.mean_blocks` needs less.

    Returns:
        :class:`diagnostics.HessianBlocks`: ``blocks.total[v, w]``, ``blocks.gn[v, w]``, ``blocks.tensor[v, w]`` of
        shape ``(S, d_v, d_w)``: S the batch size B, or 1 with ``d = B·d`` if the samples are coupled.

    Raises:
        StaleGraphError: a parameter changed since the capture.
        MemoryBudgetError: they would take more than ``memory_limit``; the message says how much.
        DiagnosticsError: a node has no second derivative, named in the message.
        KeyError: ``pairs`` names a node that does not exist.
    """
    graph.check_fresh()
    with plain_autograd(), twice_differentiable():
        layout = Layout.of(graph, pairs)
        hint = "For batch means alone, mean_blocks goes through the batch in parts."
        check_memory(planned_bytes(graph, layout, by_source=by_source), memory_limit, layout, hint)
        local = differentiate(graph)
    return assemble_blocks(graph, layout, local, TotalJacobians(graph, layout, local.jacobians), by_source)


def assemble_blocks(
    graph: Graph, layout: Layout, local: LocalDerivatives, jacobians: TotalJacobians, by_source: bool = False
) -> HessianBlocks:
    """Blocks from local derivatives: linear algebra only, no tape."""
    with torch.no_grad():
        gn = _congruence(graph, layout, graph.loss_parents, local, local.curvatures[LOSS])
        tensor = FrontBlocks(layout, _eliminate(graph, layout, local), jacobians)
        sources: dict[str, BlockMatrix] | None = None
        if by_source:
            sources = {
                node.name: _congruence(graph, layout, node.parents, local, local.curvatures[node.name])
                for node in graph.nodes
                if node.name in local.curvatures
            }
    return HessianBlocks(gn, tensor, sources)


def _congruence(
    graph: Graph, layout: Layout, parents: Sequence[str], local: LocalDerivatives, curvature: Curvature
) -> CongruentBlocks:
    """Σ_{p,q} J[p←v]ᵀ K[p,q] J[q←w] for the local curvature K of one node, whose ``parents`` are p and q.

    Of the loss this is the Gauss-Newton part, of any other node its share of the tensor part. The Jacobians of the
    parents are carried back, ``Σ_u J[p←u] D[u,v]``.
    """
    parents = parents if curvature else ()  # nothing to carry back
    rows = layout.rows(parents)
    stacked = layout.stacked(parents, curvature)
    rank = stacked.shape[1]
    factors: dict[str, Tensor] = {}
    for node in reversed(graph.nodes):
        u = node.name
        if u in rows:
            unit = layout.like.new_zeros(layout.samples, rank, layout.sizes[u])
            unit.diagonal(offset=-rows[u].start, dim1=1, dim2=2).fill_(1)
            factors[u] = factors[u] + unit if u in factors else unit
        if u in factors:
            for p, jacobian in local.jacobians[u].items():
                product = factors[u] @ jacobian
                factors[p] = factors[p] + product if p in factors else product
    return CongruentBlocks(layout, {v: factor for v, factor in factors.items() if v in layout.offsets}, stacked)


class _Front:
    """A symmetric matrix of blocks over the nodes that the rest of the network still reads; absent blocks are zero."""

    def __init__(self) -> None:
        self._blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, p: str, q: str, block: Tensor) -> None:
        """Add ``block`` to the pair (p, q), and its transpose to (q, p): on the diagonal, to the one block."""
        known = self._blocks[p].get(q)
        block = block if known is None else known + block
        self._blocks[p][q] = block
        if p != q:
            self._blocks[q][p] = block.mT

    def pop(self, u: str) -> dict[str, Tensor]:
        """Remove node u and return its row."""
        row = self._blocks.pop(u, {})
        for s in row:
            if s != u:
                del self._blocks[s][u]
        return row


def _eliminate(graph: Graph, layout: Layout, local: LocalDerivatives) -> dict[str, dict[str, Tensor]]:
    """Fronts Φ_v[v,s] of the tensor part: nodes are eliminated from the loss backwards."""
    front = _Front()
    fronts: dict[str, dict[str, Tensor]] = {}
    for node in reversed(graph.nodes):
        u = node.name
        pivot = fronts[u] = front.pop(u)
        back = {p: jacobian.mT for p, jacobian in local.jacobians[u].items()}
        for p, transposed in back.items():
            for s, block in pivot.items():
                if s != u:
                    product = transposed @ block
                    front.add(p, s, product + product.mT if p == s else product)
        if u in pivot:
            for p, transposed in back.items():
                product = transposed @ pivot[u]
                for q in back:
                    if layout.position[q] <= layout.position[p]:
                        front.add(p, q, product @ back[q].mT)
        for (p, q), block in local.curvatures.get(u, {}).items():
            front.add(p, q, block)
    return {v: fronts[v] for v in layout.names}
