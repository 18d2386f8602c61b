"""Curvature metrics of pairs of nodes: resonance, coupling, stable rank and Gauss-Newton gap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diagnostics.blocks.containers import BlockMatrix, HessianBlocks, MeanBlocks
from diagnostics.blocks.layout import Layout
from diagnostics.errors import DiagnosticsError
from diagnostics.results.metric_table import MetricTable

EPSILON = 1e-12
"""Added to ‖H^GN‖ in the Gauss-Newton gap of a pair."""


def resonance(block: Tensor) -> Tensor:
    """R = ‖H[v,w]‖_F of blocks ``(…, d_v, d_w)``: the strength of the curvature between two nodes (Def. 23)."""
    norm: Tensor = torch.linalg.matrix_norm(block, "fro")
    return norm


def coupling(between: Tensor, at_v: Tensor, at_w: Tensor) -> Tensor:
    """C = R(v,w) / √(R(v,v) R(w,w)) from three resonances: invariant under rescaling of the nodes; 0/0 is NaN."""
    return between / (at_v.sqrt() * at_w.sqrt())


def stable_rank(block: Tensor) -> Tensor:
    """D = ‖H‖_F² / ‖H‖₂² of blocks ``(…, d_v, d_w)``: the number of directions that carry the block; 0/0 is NaN."""
    largest: Tensor = torch.linalg.matrix_norm(block, 2)
    return (resonance(block) / largest).square()


def gn_gap(tensor_norm: Tensor, gn_norm: Tensor) -> Tensor:
    """Gap = ‖H^T‖_F / (‖H^GN‖_F + ε), ε = 1e-12: how far the Gauss-Newton part is from the Hessian."""
    return tensor_norm / (gn_norm + EPSILON)


def metrics(blocks: HessianBlocks, *, include_output: bool = False, per_sample: bool = False) -> MetricTable:
    """Resonance, coupling, stable rank and Gauss-Newton gap of every pair of nodes, from exact blocks.

    Definitions (arXiv 2604.11639, Def. 23 and following): ``R = ‖H[v,w]‖_F``, ``C = R(v,w)/√(R(v,v)R(w,w))``,
    ``D = ‖H‖_F²/‖H‖₂²``, ``Gap = ‖H^T‖_F/(‖H^GN‖_F + 1e-12)``. C and D of 0/0 are NaN, Gap is 0.

    Args:
        blocks: Blocks of :func:`diagnostics.hessian_blocks`, per sample or already averaged.
        include_output: Range over the model's output too, where it was not among the chosen nodes.
        per_sample: False, as in the paper: norms of the batch mean ``(1/B) Σ_b ∂²ℓ_b``. True: batch means of the
            norms of each sample's ``∂²ℓ_b``. The two differ a lot: samples cancel in the former.

    Returns:
        A :class:`diagnostics.MetricTable` over the chosen nodes in topological order.

    Raises:
        DiagnosticsError: ``per_sample=True`` with coupled samples or with blocks that are already batch means.
    """
    layout = blocks.layout
    names = tabled_nodes(layout, include_output)
    averaged = isinstance(blocks.gn, MeanBlocks)
    if per_sample:
        if averaged or layout.coupled:
            cause = "these blocks are batch means already" if averaged else "the samples of this batch are coupled"
            raise DiagnosticsError(f"per-sample metrics need the blocks of single samples, but {cause}.")
        scale = float(layout.batch_size) if layout.reduction == "mean" else 1.0
    else:
        scale = 1.0
        blocks = blocks.mean()
    parts = {"H": blocks.total, "G": blocks.gn, "T": blocks.tensor}
    norms = {part: _over_pairs(names, matrix, resonance) * scale for part, matrix in parts.items()}
    at = norms["H"].diagonal(dim1=0, dim2=1).movedim(-1, 0)  # (n, …)
    index = torch.tensor([layout.names.index(name) for name in names], dtype=torch.long)

    def average(values: Tensor) -> Tensor:  # over samples, if any
        return values.mean(-1) if per_sample else values

    return MetricTable(
        nodes=names,
        resonance=average(norms["H"]),
        coupling=average(coupling(norms["H"], at.unsqueeze(1), at.unsqueeze(0))),
        stable_rank=average(_over_pairs(names, blocks.total, stable_rank)),
        gn_gap=average(gn_gap(norms["T"], norms["G"])),
        gn_norm=average(norms["G"]),
        tensor_norm=average(norms["T"]),
        distance=layout.distances[index][:, index],
    )


def tabled_nodes(layout: Layout, include_output: bool) -> tuple[str, ...]:
    """The nodes that tables range over, in topological order: the chosen ones, and the model's output if asked for."""
    names = tuple(n for n in layout.names if n in layout.chosen or (include_output and n in layout.outputs))
    if not names:
        raise DiagnosticsError(
            f"none of the nodes with blocks ({', '.join(layout.names)}) is a chosen one: pass include_output=True, or "
            "compute the blocks of other `pairs`."
        )
    return names


def _over_pairs(names: Sequence[str], matrix: BlockMatrix, metric: Callable[[Tensor], Tensor]) -> Tensor:
    """``metric`` of every block, ``(n, n, …)``; blocks of one shape are computed in one batch."""
    by_shape: dict[torch.Size, list[tuple[int, int]]] = defaultdict(list)
    for i, v in enumerate(names):
        for j, w in enumerate(names[: i + 1]):
            by_shape[matrix[v, w].shape].append((i, j))
    results: dict[tuple[int, int], Tensor] = {}
    for pairs in by_shape.values():
        values = metric(torch.stack([matrix[names[i], names[j]] for i, j in pairs]))
        for (i, j), value in zip(pairs, values, strict=True):
            results[i, j] = results[j, i] = value
    n = len(names)
    return torch.stack([torch.stack([results[i, j] for j in range(n)]) for i in range(n)])
