"""The formulas of the metrics of pairs (arXiv 2604.11639, Def. 23 and following)."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12
"""Added to ‖H^GN‖ in the Gauss-Newton gap of a pair."""


def resonance(block: Tensor) -> Tensor:
    """R = ‖H[v,w]‖_F of blocks ``(…, d_v, d_w)``: the strength of the curvature between two nodes (Def. 23)."""
    norm: Tensor = torch.linalg.matrix_norm(block, "fro")
    return norm


def largest_singular_value(block: Tensor) -> Tensor:
    """‖H[v,w]‖₂ of blocks ``(…, d_v, d_w)``."""
    norm: Tensor = torch.linalg.matrix_norm(block, 2)
    return norm


def coupling(resonances: Tensor) -> Tensor:
    """C = R(v,w) / √(R(v,v) R(w,w)) of R ``(n, n, …)``: invariant under rescaling of the nodes; 0/0 is NaN."""
    root = resonances.diagonal(dim1=0, dim2=1).movedim(-1, 0).sqrt()  # (n, …)
    return resonances / (root.unsqueeze(1) * root.unsqueeze(0))


def stable_rank(block: Tensor) -> Tensor:
    """D = ‖H‖_F² / ‖H‖₂² of blocks ``(…, d_v, d_w)``: the number of directions that carry the block; 0/0 is NaN."""
    return (resonance(block) / largest_singular_value(block)).square()


def gn_gap(tensor_norm: Tensor, gn_norm: Tensor) -> Tensor:
    """Gap = ‖H^T‖_F / (‖H^GN‖_F + ε), ε = 1e-12: how far the Gauss-Newton part is from the Hessian."""
    return tensor_norm / (gn_norm + EPSILON)


def metrics_of_norms(total: Tensor, gn: Tensor, tensor: Tensor, spectral: Tensor) -> dict[str, Tensor]:
    """All metrics of all pairs from norms ``(n, n, …)``, by the names of :class:`diagnostics.MetricTable`.

    Args:
        total: ‖H[v,w]‖_F.
        gn: ‖H^GN[v,w]‖_F.
        tensor: ‖H^T[v,w]‖_F.
        spectral: ‖H[v,w]‖₂.
    """
    return {
        "resonance": total,
        "coupling": coupling(total),
        "stable_rank": (total / spectral).square(),
        "gn_gap": gn_gap(tensor, gn),
        "gn_norm": gn,
        "tensor_norm": tensor,
    }
