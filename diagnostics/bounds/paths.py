"""Directed paths through a captured network: their Jacobians, and Gauss-Newton blocks as sums over pairs of paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TypeAlias

import networkx as nx
import torch
from einops import einsum, reduce
from torch import Tensor

from diagnostics.blocks.containers import HessianBlocks, MeanBlocks
from diagnostics.blocks.layout import Layout
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph
from diagnostics.graph.local import LOSS, local_derivatives
from diagnostics.results.text_table import format_table

AnyGraph: TypeAlias = "Graph | nx.DiGraph[str]"

_MOST_ROWS = 60


@dataclass(frozen=True, order=True)
class Path:
    """A directed path, from parent to child at every step.

    Attributes:
        nodes: Names of its nodes, source first; a single name is the path of length 0.
    """

    nodes: tuple[str, ...]

    @property
    def source(self) -> str:
        """Name of the first node."""
        return self.nodes[0]

    @property
    def target(self) -> str:
        """Name of the last node."""
        return self.nodes[-1]

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Its edges ``(parent, child)``."""
        return tuple(pairwise(self.nodes))

    def __len__(self) -> int:
        """Number of edges."""
        return len(self.nodes) - 1

    def __bool__(self) -> bool:
        return True  # a path of length 0 is a path

    def __str__(self) -> str:
        return " → ".join(self.nodes)


def count_paths(graph: AnyGraph, source: str, target: str) -> int:
    """Number of directed paths from ``source`` to ``target``, exact, without listing them; 1 from a node to itself.

    ``N[t] = 1`` and ``N[v] = Σ_{u∈Ch(v)} N[u]``, one addition an edge.

    Raises:
        KeyError: a node does not exist.
    """
    network = _network(graph, source, target)
    counts = dict.fromkeys(network, 0)
    counts[target] = 1
    for v in reversed(list(nx.topological_sort(network))):
        if v != target:
            counts[v] = sum(counts[u] for u in network.successors(v))
    return counts[source]


def paths(graph: AnyGraph, source: str, target: str, *, limit: int = 10_000) -> tuple[Path, ...]:
    """All directed paths from ``source`` to ``target``, shortest first; from a node to itself the path of length 0.

    They are counted before any is listed, and parts of the graph that no path visits are not searched.

    Args:
        graph: A captured network, or a DAG of networkx with edges from parent to child.
        source: Name of the first node.
        target: Name of the last node.
        limit: Most paths to list.

    Raises:
        DiagnosticsError: there are more than ``limit``; the message says how many.
        KeyError: a node does not exist.
    """
    count = count_paths(graph, source, target)
    if count > limit:
        raise DiagnosticsError(
            f"there are {count:,} paths from {source!r} to {target!r}, more than the limit of {limit:,}. Raise `limit` "
            "or capture fewer nodes: what lies between two nodes is then one edge."
        )
    if count == 0:
        return ()
    if source == target:
        return (Path((source,)),)
    network = _network(graph, source, target)
    between = (nx.descendants(network, source) | {source}) & (nx.ancestors(network, target) | {target})
    found = nx.all_simple_paths(network.subgraph(between), source, target)  # of a DAG every path is simple
    return tuple(sorted((Path(tuple(nodes)) for nodes in found), key=lambda path: (len(path), path.nodes)))


def path_jacobian(graph: Graph, path: Path) -> Tensor:
    """Product of the local Jacobians along ``path``, ``(S, d_target, d_source)``; the identity for length 0.

    ``J_π = D[v_k, v_{k-1}] ⋯ D[v_1, v_0]``. The sum over all paths from w to p is the total Jacobian ``J[p←w]``:
    unroll ``J[p←w] = Σ_{q∈Pa(p)} D[p,q] J[q←w]`` (cf. Thm 33, 65).

    Raises:
        DiagnosticsError: a step of the path is no edge of the graph.
    """
    local = local_derivatives(graph)
    size, like = graph.size(graph[path.target]), graph.loss.detach()
    jacobian = torch.eye(size, dtype=like.dtype, device=like.device).expand(graph.samples, -1, -1)
    for p, u in reversed(path.edges):  # from the target: usually the output, the smaller side
        if p not in graph[u].parents:
            raise DiagnosticsError(f"{p!r} is no parent of {u!r}, whose parents are {graph[u].parents}.")
        if p not in local.jacobians[u]:  # an edge of the tape whose derivative is structurally zero
            return like.new_zeros(graph.samples, size, graph.size(graph[path.source]))
        jacobian = jacobian @ local.jacobians[u][p]
    return jacobian


@dataclass(frozen=True, eq=False, repr=False)
class PathResonance:
    """The Gauss-Newton block of two nodes, pair of paths by pair of paths; made by :func:`path_resonance`.

    Attributes:
        v: Name of the node of the rows.
        w: Name of the node of the columns.
        left: The P paths from ``v`` to the loss (to the node that the loss is computed from).
        right: The Q paths from ``w`` to the loss.
        norms: ‖contribution‖_F of each pair of paths, ``(P, Q)``, of batch means; per sample ``(S, P, Q)``.
        shares: Their shares ``⟨contribution, H^GN⟩_F / ‖H^GN‖_F²``, of the same shape: they add up to 1, and negative
            ones cancel others. NaN where H^GN is zero.
        total: Sum of the contributions, ``(d_v, d_w)`` or ``(S, d_v, d_w)``: the block H^GN[v,w].
    """

    v: str
    w: str
    left: tuple[Path, ...]
    right: tuple[Path, ...]
    norms: Tensor
    shares: Tensor
    total: Tensor
    _left_factors: Tensor  # (P, S, k, d_v)
    _right_factors: Tensor  # (Q, S, k, d_w), multiplied by the curvature of the loss
    _scale: float | None  # what a sum over samples is multiplied by; None: no sum

    def contribution(self, left: int, right: int) -> Tensor:
        """``J_πᵀ ∇²ℓ J_π'`` of the pair of paths ``self.left[left]``, ``self.right[right]``; shaped like ``total``."""
        return _contributions(self._left_factors[left], self._right_factors[right][None], self._scale)[0]

    def residual(self, blocks: HessianBlocks) -> float:
        """Distance of the sum over pairs of paths from ``blocks.gn[v, w]``: rounding, if both are right.

        Relative to the sum of the norms of all contributions, which can cancel in the block.
        """
        averaged = isinstance(blocks.gn, MeanBlocks)
        if self._scale is None and averaged:
            raise DiagnosticsError("these blocks are batch means, and the path resonance is per sample.")
        expected = blocks.gn[self.v, self.w]
        if self._scale is not None:
            expected = (blocks.gn if averaged else blocks.gn.mean())[self.v, self.w]
        scale = float(self.norms.sum())
        return float((self.total - expected).norm()) / (scale if scale > 0 else 1.0)

    def __str__(self) -> str:
        norms = self.norms if self.norms.ndim == 2 else self.norms.mean(0)
        shares = self.shares if self.shares.ndim == 2 else self.shares.mean(0)
        pairs = sorted(product(range(len(self.left)), range(len(self.right))), key=lambda pair: -norms[pair].item())
        cells = [
            [str(self.left[i]), str(self.right[j]), f"{norms[i, j].item():.3g}", f"{shares[i, j].item():.1%}"]
            for i, j in pairs[:_MOST_ROWS]
        ]
        title = f"|H^GN[{self.v}, {self.w}]| as a sum over {len(self.left)} x {len(self.right)} pairs of paths"
        if len(pairs) > _MOST_ROWS:
            title += f", the largest {_MOST_ROWS}"
        return "\n".join([title, format_table([f"from {self.v}", f"from {self.w}", "norm", "share"], cells)])

    __repr__ = __str__


def path_resonance(
    graph: Graph,
    v: str,
    w: str,
    *,
    per_sample: bool = False,
    limit: int = 10_000,
) -> PathResonance:
    """Which pairs of paths make up the Gauss-Newton block of two nodes (cf. Thm 33, 65 and Def. 64–66).

    With z the model's output, ``H^GN[v,w] = J[z←v]ᵀ ∇²ℓ(z) J[z←w]`` and J is a sum over paths, so

        H^GN[v,w] = Σ_{π: v→z} Σ_{π': w→z} J_πᵀ ∇²ℓ J_π'.

    Where the loss is computed from several tensors, a path ends at any of them and ∇²ℓ is the block of the two ends.

    Args:
        graph: A captured network.
        v: Name of a node.
        w: Name of a node, possibly the same.
        per_sample: False: norms and shares of batch means, as the paper has norms. True: of each sample's own
            contribution to the given loss, without averaging (joint for coupled samples).
        limit: Most pairs of paths.

    Raises:
        DiagnosticsError: there are more than ``limit`` pairs of paths; the message says how many.
    """
    counts = [sum(count_paths(graph, node, z) for z in graph.loss_parents) for node in (v, w)]
    if counts[0] * counts[1] > limit:
        raise DiagnosticsError(
            f"there are {counts[0]:,} x {counts[1]:,} = {counts[0] * counts[1]:,} pairs of paths from {v!r} and {w!r} "
            f"to the loss, more than the limit of {limit:,}. Raise `limit`, or capture fewer nodes."
        )
    local = local_derivatives(graph)
    layout = Layout.of(graph)
    with torch.no_grad():
        curvature = layout.stacked(graph.loss_parents, local.curvatures[LOSS])
        left, left_factors = _factors(graph, layout, v, limit)
        right, right_factors = _factors(graph, layout, w, limit)
        scale = None
        if not per_sample:  # a block between all samples of v and all of w is summed over both
            scale = 1.0 if layout.reduction == "mean" else 1 / layout.batch_size
            left_factors = reduce(left_factors, "p s k (b d) -> p s k d", "sum", b=layout.batch[v])
            right_factors = reduce(right_factors, "p s k (b d) -> p s k d", "sum", b=layout.batch[w])
        right_factors = curvature @ right_factors
        shape = (() if scale is not None else (layout.samples,)) + (left_factors.shape[-1], right_factors.shape[-1])
        total = layout.like.new_zeros(shape)
        norms = layout.like.new_zeros(len(left), len(right), *shape[:-2])
        inner = torch.zeros_like(norms)
        for i, row in enumerate(_rows(left_factors, right_factors, scale)):
            norms[i] = torch.linalg.matrix_norm(row)
            total = total + row.sum(0)
        for i, row in enumerate(_rows(left_factors, right_factors, scale)):
            inner[i] = (row * total).sum((-2, -1))
        shares = inner / total.square().sum((-2, -1))
        if per_sample:
            norms, shares = norms.movedim(-1, 0), shares.movedim(-1, 0)
    return PathResonance(v, w, left, right, norms, shares, total, left_factors, right_factors, scale)


def _network(graph: AnyGraph, *names: str) -> nx.DiGraph[str]:
    network = graph.to_networkx() if isinstance(graph, Graph) else graph
    for name in names:
        if name not in network:
            raise KeyError(f"no node {name!r}; the nodes are {', '.join(map(repr, network))}")
    return network


def _rows(left: Tensor, right: Tensor, scale: float | None) -> Iterator[Tensor]:
    return (_contributions(factor, right, scale) for factor in left)


def _contributions(left: Tensor, right: Tensor, scale: float | None) -> Tensor:
    """``J_πᵀ (∇²ℓ J_π')`` for one π and all π', ``(Q, S, d_v, d_w)``, or summed over samples and multiplied."""
    if scale is None:
        return einsum(left, right, "s k v, q s k w -> q s v w")
    return scale * einsum(left, right, "s k v, q s k w -> q v w")


def _factors(graph: Graph, layout: Layout, v: str, limit: int) -> tuple[tuple[Path, ...], Tensor]:
    """Paths from v to the loss and their Jacobians, ``(P, S, k, d_v)``, zero at the outputs where they do not end."""
    rows = layout.rows(graph.loss_parents)
    size = sum(layout.sizes[z] for z in graph.loss_parents)
    found = tuple(path for z in graph.loss_parents for path in paths(graph, v, z, limit=limit))
    factors = layout.like.new_zeros(len(found), layout.samples, size, layout.sizes[v])
    for factor, path in zip(factors, found, strict=True):
        factor[:, rows[path.target]] = path_jacobian(graph, path)
    return found, factors
