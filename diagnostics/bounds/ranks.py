"""Upper bounds on the rank of Hessian blocks from the widths that all paths must pass, next to measured ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import Tensor

from diagnostics.blocks.containers import BlockMatrix, HessianBlocks, MeanBlocks
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.recursion import hessian_blocks
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import LOSS, LocalDerivatives, local_derivatives
from diagnostics.results.pair_formulas import stable_rank
from diagnostics.results.text_table import format_table


@dataclass(frozen=True, eq=False, repr=False)
class RankBounds:
    """Bounds on the rank of every block, and measured ranks; made by :func:`rank_bounds`.

    All tensors are ``(n, n)``, symmetric, in the order of ``nodes``. ``stable ≤ rank ≤ bound``, up to rounding.

    Attributes:
        nodes: Names of the nodes, in topological order.
        part: ``"gn"`` or ``"total"``.
        bound: Upper bound on the rank.
        rank: Numerical rank: singular values above ``rtol`` times the largest; single samples: the largest of them.
        stable: Stable rank D = ‖H‖_F² / ‖H‖₂², likewise; NaN of a zero block.
    """

    nodes: tuple[str, ...]
    part: Literal["gn", "total"]
    bound: Tensor
    rank: Tensor
    stable: Tensor

    def __str__(self) -> str:
        rows = [
            [
                self.nodes[i],
                self.nodes[j],
                f"{int(self.bound[i, j])}",
                f"{int(self.rank[i, j])}",
                f"{self.stable[i, j].item():.3g}",
            ]
            for i in range(len(self.nodes))
            for j in range(i, len(self.nodes))
        ]
        return format_table(["v", "w", "bound", "rank", "D"], rows)

    __repr__ = __str__


def rank_bounds(
    graph: Graph,
    blocks: HessianBlocks | None = None,
    *,
    part: Literal["gn", "total"] = "gn",
    per_sample: bool = False,
    include_output: bool = False,
    rtol: float | None = None,
) -> RankBounds:
    """Bounds on rank H[v,w] by bottlenecks, next to the numerical rank and the stable rank (cf. Prop. 31, Remark 60).

    A *vertex cut* is a set of nodes that all paths pass; its width is the sum of its nodes' entries; the least width
    is a maximum flow through the graph with the widths as capacities, v and w themselves included.

    - ``"gn"``: ``rank H^GN[v,w] ≤ min(cut(v → loss), cut(w → loss), rank ∇²ℓ)``. The output depends on e_v through the
      values of the cut alone, so J[z←v] factors through them.
    - ``"total"``: ``rank H[v,w] ≤ cut(w → {loss, v})`` over the cuts without a node that is strictly after v, and the
      same with v and w exchanged. The loss is then Λ(e_v, f_S(e_w)) with f_S independent of e_v but for ``e_v`` itself
      if v is in S, so ``H[v,w] = ∂²Λ/∂e_v∂f_S · J[S←w]``. Without that condition the bound fails: curvature of
      nodes at or before the cut does not pass it. On a chain it is the narrowest node between v and w.

    For a batch mean all samples share the injection, so its width counts once and those of the other nodes S times;
    the rank of ∇²ℓ is summed over samples.

    Args:
        graph: A captured network.
        blocks: Its blocks, if known already, of all nodes of the graph.
        part: ``"gn"`` or ``"total"``.
        per_sample: False: of batch means. True: of single samples (the largest measured ranks).
        include_output: Range over the model's output too, where it was not among the chosen nodes.
        rtol: Relative threshold of the numerical rank; None: torch's, max(d_v, d_w) · eps.
    """
    if part not in ("gn", "total"):
        raise ValueError(f'part must be "gn" or "total", got {part!r}: the tensor part has no bottleneck.')
    layout = Layout.of(graph)
    names = tuple(n for n in layout.names if n in layout.chosen or (include_output and n in layout.outputs))
    if per_sample and blocks is not None and isinstance(blocks.gn, MeanBlocks):
        raise DiagnosticsError("ranks of single samples need the blocks of single samples, not batch means.")
    matrix: BlockMatrix = getattr(hessian_blocks(graph) if blocks is None else blocks, part)
    matrix = matrix if per_sample else matrix.mean()

    network = graph.to_networkx()
    widths = dict(layout.sizes) if per_sample else {n: layout.samples * d for n, d in layout.sizes.items()}
    network.add_edges_from((z, LOSS) for z in graph.loss_parents)
    own = dict(layout.sizes) if per_sample else {n: d // layout.batch[n] for n, d in layout.sizes.items()}
    if part == "gn":
        local = local_derivatives(graph)
        loss_rank = _rank_of_loss(graph, layout, local, per_sample)
        cut = {v: min(_least_cut(network, v, [LOSS], widths, own[v]), loss_rank) for v in names}
        bounds = {(v, w): min(cut[v], cut[w]) for v in names for w in names}
    else:
        one_sided = {(v, w): _separated(network, v, w, widths, own) for v in names for w in names}
        bounds = {(v, w): min(one_sided[v, w], one_sided[w, v]) for v in names for w in names}

    def over_pairs(values: dict[tuple[str, str], Tensor]) -> Tensor:
        return torch.stack([torch.stack([values[v, w] for w in names]) for v in names])

    measured = {(v, w): matrix[v, w] if per_sample else matrix[v, w][None] for v in names for w in names}
    return RankBounds(
        nodes=names,
        part=part,
        bound=torch.tensor([[bounds[v, w] for w in names] for v in names]),
        rank=over_pairs({pair: torch.linalg.matrix_rank(b, rtol=rtol).amax() for pair, b in measured.items()}),
        stable=over_pairs({pair: _largest(stable_rank(b)) for pair, b in measured.items()}),
    )


def bottleneck(graph: Graph, source: str, target: str | None = None) -> tuple[int, tuple[str, ...]]:
    """Least width of a set of nodes that all paths from ``source`` to ``target`` pass, and such a set (Prop. 31).

    Args:
        graph: A captured network.
        source: Name of a node; it may be in the set.
        target: Name of a node, which may be in the set; None: the loss, which may not.

    Returns:
        The width ``Σ d`` in entries of one sample, 0 if there is no path; the names in topological order.
    """
    layout = Layout.of(graph)
    network = graph.to_networkx()
    network.add_edges_from((z, LOSS) for z in graph.loss_parents)
    end = LOSS if target is None else graph[target].name
    split = _split(network, graph[source].name, [end], layout.sizes, layout.sizes[source])
    value, (near, _) = nx.minimum_cut(split, (source, "in"), _SINK)
    cut = tuple(n for n in layout.names if (n, "in") in near and (n, "out") not in near)
    return int(value), cut


_SINK = ("", "sink")  # no node of the network has an empty name


def _separated(network: nx.DiGraph[str], v: str, w: str, widths: Mapping[str, int], own: Mapping[str, int]) -> int:
    """Least width of a set without nodes strictly after v that separates w from the loss and from v; at most d_v."""
    after = nx.descendants(network, v)
    if w in after:  # the set would have to hold w itself: v and w exchanged have the bound
        return min(own[v], own[w])
    return min(_least_cut(network, w, [v, LOSS], widths, own[w], uncuttable=after), own[v])


def _least_cut(
    network: nx.DiGraph[str],
    source: str,
    ends: Iterable[str],
    widths: Mapping[str, int],
    own: int,
    uncuttable: Collection[str] = (),
) -> int:
    return int(nx.maximum_flow_value(_split(network, source, ends, widths, own, uncuttable), (source, "in"), _SINK))


def _split(
    network: nx.DiGraph[str],
    source: str,
    ends: Iterable[str],
    widths: Mapping[str, int],
    own: int,
    uncuttable: Collection[str] = (),
) -> nx.DiGraph[tuple[str, str]]:
    """Every node as an edge with its width as capacity, so that a least cut of edges is a least cut of nodes.

    The source has capacity ``own``; the loss and the nodes in ``uncuttable`` have none that could be cut. Edges
    without a capacity are infinite in networkx.
    """
    split: nx.DiGraph[tuple[str, str]] = nx.DiGraph()
    for n in network:
        if n == LOSS or n in uncuttable:
            split.add_edge((n, "in"), (n, "out"))
        else:
            split.add_edge((n, "in"), (n, "out"), capacity=own if n == source else widths[n])
    split.add_edges_from(((p, "out"), (u, "in")) for p, u in network.edges)
    split.add_edges_from(((end, "out"), _SINK) for end in ends)
    return split


def _rank_of_loss(graph: Graph, layout: Layout, local: LocalDerivatives, per_sample: bool) -> int:
    """Rank of ∇²ℓ, the largest of single samples or their sum."""
    ranks = torch.linalg.matrix_rank(layout.stacked(graph.loss_parents, local.curvatures[LOSS]))
    return int(ranks.amax() if per_sample else ranks.sum())


def _largest(values: Tensor) -> Tensor:
    """Maximum over samples, NaN left out unless all are."""
    return torch.where(values.isnan().all(), torch.nan, values.nan_to_num(nan=-torch.inf).amax())
