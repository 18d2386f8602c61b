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
from diagnostics.results.pair_formulas import largest_singular_value, resonance


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
    index = torch.tensor([layout.names.index(name) for name in names], dtype=torch.long)
    return MetricTable.from_norms(
        names,
        total=_over_pairs(names, blocks.total, resonance) * scale,
        gn=_over_pairs(names, blocks.gn, resonance) * scale,
        tensor=_over_pairs(names, blocks.tensor, resonance) * scale,
        spectral=_over_pairs(names, blocks.total, largest_singular_value) * scale,
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
