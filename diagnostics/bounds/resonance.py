"""Upper bounds on resonance from norms of local derivatives, next to what is measured (docs/bounds.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

from diagnostics.blocks.containers import HessianBlocks, MeanBlocks
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.recursion import hessian_blocks
from diagnostics.bounds.gains import Gains, sum_over_paths
from diagnostics.errors import DiagnosticsError
from diagnostics.graph.graph import Graph, Part
from diagnostics.graph.local import LOSS
from diagnostics.results.text_table import format_table

_MOST_ROWS = 60


@dataclass(frozen=True, eq=False, repr=False)
class ResonanceBounds:
    """Measured resonance of every pair of nodes, and upper bounds on it; made by :func:`resonance_bounds`.

    All tensors are ``(n, n)`` and symmetric, in the order of ``nodes``; of single samples ``(S, n, n)``.
    ``measured ≤ jacobian ≤ path ≤ depth ≤ count`` and ``depth ≤ geometric``, each needing to know less.

    Attributes:
        nodes: Names of the nodes, in topological order.
        part: The part of the Hessian: ``"total"``, ``"gn"`` or ``"tensor"``.
        measured: R(v,w) = ‖H[v,w]‖_F.
        jacobian: From the spectral norms of the total Jacobians.
        path: From the norms of the local Jacobians, multiplied along paths and summed over paths.
        depth: From ρ and the number of paths of each length.
        count: From ρ, the number of paths, and their shortest (ρ ≤ 1) or longest (ρ > 1) length.
        geometric: From sρ and the shortest and longest lengths of paths.
    """

    nodes: tuple[str, ...]
    part: Part
    measured: Tensor
    jacobian: Tensor
    path: Tensor
    depth: Tensor
    count: Tensor
    geometric: Tensor

    def __str__(self) -> str:
        columns = {name: getattr(self, name) for name in _LEVELS}
        columns = {name: values if values.ndim == 2 else values.mean(0) for name, values in columns.items()}
        pairs = [(i, j) for i in range(len(self.nodes)) for j in range(i, len(self.nodes))]
        rows = [
            [self.nodes[i], self.nodes[j], *(f"{values[i, j].item():.3g}" for values in columns.values())]
            for i, j in pairs[:_MOST_ROWS]
        ]
        title = f"resonance ({self.part}) and upper bounds"
        if len(pairs) > _MOST_ROWS:
            title += f", the first {_MOST_ROWS} of {len(pairs)} pairs (all are in the tensors)"
        return "\n".join([title, format_table(["v", "w", *_LEVELS], rows)])

    __repr__ = __str__


_LEVELS = ("measured", "jacobian", "path", "depth", "count", "geometric")


def resonance_bounds(
    graph: Graph,
    blocks: HessianBlocks | None = None,
    *,
    part: Part = "total",
    per_sample: bool = False,
    include_output: bool = False,
) -> ResonanceBounds:
    """Upper bounds on R(v,w) = ‖H[v,w]‖_F by what is known of the network (cf. Thm 25, 34, 71).

    The unrolled recursion ``H[v,w] = Σ_u Σ_{p,q∈Pa(u)} J[p←v]ᵀ K_u[p,q] J[q←w]`` (the loss is one of the u),
    ``‖ABC‖_F ≤ ‖A‖₂ ‖B‖_F ‖C‖₂`` and the triangle inequality give, per sample,

        R(v,w) ≤ Σ_{p,q} G[p,v] κ[p,q] G[q,w],    κ[p,q] = Σ_u ‖K_u[p,q]‖_F,    G[p,v] ≥ ‖J[p←v]‖₂,

    with one G a level: ``jacobian``: ‖J‖₂ itself; ``path``: Σ_π Π ‖D‖₂; ``depth``: Σ_L N_L ρ^L, N_L paths of length L;
    ``count``: N ρ^ℓ; ``geometric``: Σ_L (sρ)^L from the shortest to the longest length, as N_L ≤ s^L. ``part="gn"``
    keeps the loss's K alone: ``‖H^GN[v,w]‖_F ≤ ‖∇²ℓ‖_F ‖J[z←v]‖₂ ‖J[z←w]‖₂``. A batch mean is bounded by the mean of
    the samples' bounds. ρ is the largest norm over samples, because the ρ of batch means does not bound anything.

    Args:
        graph: A captured network.
        blocks: Its blocks, if known already, of all nodes of the graph.
        part: Which part of the Hessian.
        per_sample: False: batch means first, as the paper does. True: each sample's block of the given loss.
        include_output: Range over the model's output too, where it was not among the chosen nodes.
    """
    gains = Gains(graph)
    kappa = gains.curvature_norms(part)
    figures = gains.figures()
    rho = figures.rho
    shortest, longest = (t.to(kappa.device) for t in gains.lengths())
    edges = gains.adjacency
    extreme = (shortest if rho <= 1 else longest).clamp(min=0).to(kappa.dtype)
    levels = {
        "jacobian": gains.jacobian_norms(),
        "path": sum_over_paths(gains.steps),
        "depth": sum_over_paths(rho * edges),
        "count": sum_over_paths(edges) * rho**extreme,
        "geometric": _geometric(figures.children * rho, shortest, longest, kappa),
    }
    if per_sample and blocks is not None and isinstance(blocks.gn, MeanBlocks):
        raise DiagnosticsError("per-sample bounds stand next to the blocks of single samples, not to batch means.")
    matrix = getattr(hessian_blocks(graph) if blocks is None else blocks, part)
    matrix = matrix if per_sample else matrix.mean()
    names = _table_nodes(gains.layout, include_output)
    index = torch.tensor([gains.layout.position[name] for name in names], device=kappa.device)
    measured = torch.stack(
        [torch.stack([torch.linalg.matrix_norm(matrix[v, w]) for w in names], dim=-1) for v in names], dim=-2
    )

    def bound(gain: Tensor) -> Tensor:
        value = gain.mT @ kappa @ gain
        return (value if per_sample else batch_mean_bound(gains.layout, value))[..., index[:, None], index]

    return ResonanceBounds(names, part, measured, **{name: bound(gain) for name, gain in levels.items()})


def batch_mean_bound(layout: Layout, per_sample: Tensor) -> Tensor:
    """Bounds ``(n, n)`` on the norms of batch means from bounds ``(S, n, n)`` on those of single samples' blocks.

    The mean is a sum over samples (over B for a sum loss). For coupled samples it is also a sum over the B × B parts
    of the joint block, whose norm is at most √(B·B) times that of the joint block.
    """
    batch = torch.tensor([layout.batch[name] for name in layout.names], dtype=per_sample.dtype).sqrt()
    total = per_sample.sum(0) * (batch[:, None] * batch).to(per_sample.device)
    return total / layout.batch_size if layout.reduction == "sum" else total


@dataclass(frozen=True, eq=False, repr=False)
class DecayBounds:
    """How resonance decays on the way back from a node that all paths to the loss pass; made by :func:`decay_bounds`.

    Attributes:
        pairs: ``(v, w)``: every path from w to the loss passes v.
        distance: Directed distance from w to v of each pair, ``(P,)``.
        ratio: R(v,w) / R(v,v) per sample, ``(S, P)``; NaN where R(v,v) is zero.
        jacobian: ‖J[v←w]‖₂, ``(S, P)``.
        path: Σ_π Π ‖D‖₂ over the paths from w to v, ``(S, P)``.
        geometric: Σ_L (sρ)^L over the lengths L of those paths, shortest to longest, ``(P,)``: ρ^k on a chain.
    """

    pairs: tuple[tuple[str, str], ...]
    distance: Tensor
    ratio: Tensor
    jacobian: Tensor
    path: Tensor
    geometric: Tensor

    def __str__(self) -> str:
        columns = [self.distance, self.ratio.amax(0), self.jacobian.amax(0), self.path.amax(0), self.geometric]
        rows = [[w, v, *(f"{column[i].item():.3g}" for column in columns)] for i, (v, w) in enumerate(self.pairs)]
        header = ["w", "v", "distance", "R(v,w)/R(v,v)", "|J|", "paths", "geometric"]
        return "\n".join(["decay towards the input, largest over samples", format_table(header, rows)])

    __repr__ = __str__


def decay_bounds(graph: Graph, blocks: HessianBlocks | None = None) -> DecayBounds:
    """R(v,w) ≤ R(v,v) ‖J[v←w]‖₂ wherever every path from w to the loss passes v (cf. Thm 25, Cor. 26).

    Then the loss is a function Λ of ``e_v + f_v(e_w)`` alone, hence ``H[v,w] = H[v,v] J[v←w]`` exactly, tensor part
    included, and ``‖J[v←w]‖₂ ≤ Σ_π Π ‖D‖₂ ≤ Σ_L (sρ)^L``; on a chain ``R(v,w) ≤ R(v,v) ρ^k``. Per sample: of batch
    means the identity does not hold, because samples cancel in R(v,v). For other pairs the distance between v and w
    bounds nothing: two equal branches have R(v,w) = R(v,v) at distance 2 whatever ρ is. Nor does the coupling C
    decay: in a linear chain of width 1 it is 1 at every distance, since R(w,w) decays twice as fast.

    Args:
        graph: A captured network.
        blocks: Its blocks of single samples, if known already, of all nodes of the graph.
    """
    if blocks is not None and isinstance(blocks.gn, MeanBlocks):
        raise DiagnosticsError("decay is bounded per sample: pass the blocks of single samples, not their means.")
    total = (hessian_blocks(graph) if blocks is None else blocks).total
    gains = Gains(graph)
    figures = gains.figures()
    shortest, longest = gains.lengths()
    pairs = _post_dominated(graph)
    v, w = (torch.tensor([gains.layout.position[pair[i]] for pair in pairs], dtype=torch.long) for i in (0, 1))
    norms = [torch.linalg.matrix_norm(total[a, b]) / torch.linalg.matrix_norm(total[a, a]) for a, b in pairs]
    ratio = torch.stack(norms, dim=1) if norms else gains.steps.new_zeros(gains.layout.samples, 0)
    geometric = _geometric(figures.children * figures.rho, shortest, longest, gains.steps)
    return DecayBounds(
        pairs=pairs,
        distance=shortest[v, w],
        ratio=ratio,
        jacobian=gains.jacobian_norms()[:, v, w],
        path=sum_over_paths(gains.steps)[:, v, w],
        geometric=geometric[v, w],
    )


def error_bounds(
    graph: Graph,
    delta: float,
    *,
    part: Part = "total",
    per_sample: bool = False,
) -> Tensor:
    """How far blocks can be off when every local derivative is off by a relative error δ (cf. Thm 43).

    If ``‖D̃ − D‖₂ ≤ δ ‖D‖₂`` for all local Jacobians and ``‖K̃ − K‖_F ≤ δ ‖K‖_F`` for all local curvatures, then with
    ``P`` and ``P_δ`` the sums over paths of products of ‖D‖₂ and of (1+δ)‖D‖₂,

        ‖H̃[v,w] − H[v,w]‖_F ≤ ((1+δ) P_δᵀ κ P_δ − Pᵀ κ P)[v,w]:

    the difference expands into products that each hold an error, and every product is replaced by norms. A path of
    length L contributes ``((1+δ)^L − 1)`` of its product of norms, at most ``δ L e^{δL}``. It is relative to sums of
    products of norms, not to ‖H‖, which can be smaller by cancellation.

    Args:
        graph: A captured network.
        delta: δ ≥ 0.
        part: Which part of the Hessian.
        per_sample: False: of batch means. True: of each sample's block.

    Returns:
        The bounds of all pairs of nodes of the graph in topological order, ``(n, n)`` or ``(S, n, n)``.
    """
    if not delta >= 0:
        raise ValueError(f"delta is a relative error of at least 0, got {delta}.")
    gains = Gains(graph)
    kappa, exact = gains.curvature_norms(part), sum_over_paths(gains.steps)
    perturbed = sum_over_paths((1 + delta) * gains.steps)
    growth = delta * perturbed @ gains.steps @ exact  # P_δ − P without cancellation: the resolvent identity
    spread = perturbed.mT @ kappa
    bound = delta * spread @ perturbed + spread @ growth + growth.mT @ kappa @ exact
    return bound if per_sample else batch_mean_bound(gains.layout, bound)


def _geometric(ratio: float, shortest: Tensor, longest: Tensor, like: Tensor) -> Tensor:
    """Σ_L ratio^L for L from the shortest to the longest length; 0 where there is no path."""
    powers = torch.cumsum(ratio ** torch.arange(len(shortest) + 1, dtype=like.dtype, device=like.device), dim=0)
    shortest, longest = shortest.to(like.device), longest.to(like.device)
    sums = ratio ** shortest.clamp(min=0).to(like.dtype) * powers[(longest - shortest).clamp(min=0)]
    return torch.where(shortest >= 0, sums, 0)


def _post_dominated(graph: Graph) -> tuple[tuple[str, str], ...]:
    """Pairs ``(v, w)``, v ≠ w, such that w reaches the loss, and only through v."""
    network = graph.to_networkx()
    network.add_edges_from((z, LOSS) for z in graph.loss_parents)
    reaching = nx.ancestors(network, LOSS)
    pairs = []
    for v in graph:
        others = network.subgraph(set(network) - {v.name})
        around = nx.ancestors(others, LOSS)
        pairs += [(v.name, w.name) for w in graph if w.name in reaching - around - {v.name}]
    return tuple(pairs)


def _table_nodes(layout: Layout, include_output: bool) -> tuple[str, ...]:
    names: Sequence[str] = layout.names
    return tuple(n for n in names if n in layout.chosen or (include_output and n in layout.outputs))
