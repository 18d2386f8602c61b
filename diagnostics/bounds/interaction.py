"""How far curvature reaches: the interaction radius, and what a block-diagonal or banded Hessian leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.results.metric_table import MetricTable
from diagnostics.results.text_table import format_table


def interaction_radius(
    table: MetricTable, epsilon: float = 0.1, criterion: Literal["coupling", "resonance"] = "coupling"
) -> float:
    """k_ε: the least integer k such that all pairs of nodes at distance > k interact by at most ε, measured.

    Criterion ``"coupling"``: ``C(v,w) ≤ ε``, which does not change when activations are rescaled. ``"resonance"``
    (Def. 79): ``R(v,w) ≤ ε R(v,v)`` for both orders of the pair, which does.

    Args:
        table: Metrics of the pairs, of :func:`diagnostics.metrics`.
        epsilon: ε > 0.
        criterion: What interaction means.

    Returns:
        The radius: 0 if no two different nodes interact, infinite if nodes without a connecting path do (they can
        meet in the loss). A pair with R(v,w) = 0 does not interact, whatever C = 0/0 is.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    if criterion not in ("coupling", "resonance"):
        raise ValueError(f'criterion must be "coupling" or "resonance", got {criterion!r}.')
    resonance = table.resonance
    if not torch.isfinite(resonance).all():
        raise DiagnosticsError("the table holds a resonance that is not finite: the network's derivatives overflow.")
    # NaN, a coupling of 0/0, is not more than ε; of the resonance, both orders of every pair are entries
    ratio, most = (table.coupling, epsilon) if criterion == "coupling" else (resonance, epsilon * resonance.diagonal())
    interacts = (ratio > most) & (resonance > 0)
    interacts.fill_diagonal_(False)
    distances = table.distance[interacts.to(table.distance.device)]
    return float(distances.max().item()) if len(distances) else 0.0


def a_priori_radius(ratio: float, epsilon: float, constant: float = 1.0) -> float:
    """The least integer k ≥ 0 with ``constant · ratio^d ≤ ε`` for all integers d > k: radius by a model of decay.

    ``ratio = sρ`` (:attr:`diagnostics.bounds.gains.LocalGains.rho`, ``children``) or ``e^{λ₁}``
    (:func:`diagnostics.bounds.lyapunov.lyapunov_norm`). Infinite where the model does not decay below ε: ratio ≥ 1 and
    constant > ε (for ratio > 1, always). With sρ < 1 and ``constant = 1 / (1 − sρ)`` it bounds Def. 79's
    ``R(v,w) ≤ ε R(v,v)`` per sample, at directed distance, for v that all paths from w to the loss pass
    (:func:`diagnostics.bounds.resonance.decay_bounds`). It bounds neither the coupling C nor pairs on different
    branches.
    """
    if not (ratio >= 0 and epsilon > 0 and constant >= 0):
        raise ValueError(f"need ratio ≥ 0, epsilon > 0, constant ≥ 0; got {ratio}, {epsilon}, {constant}.")
    if constant == 0 or ratio == 0:
        return 0.0
    if ratio >= 1:
        return 0.0 if ratio == 1 and constant <= epsilon else math.inf
    k = max(0, math.ceil(math.log(epsilon / constant) / math.log(ratio)) - 1)
    # the quotient of logarithms is rounded: settle the last step by the inequality itself
    while constant * ratio ** (k + 1) > epsilon:
        k += 1
    while k > 0 and constant * ratio**k <= epsilon:
        k -= 1
    return float(k)


@dataclass(frozen=True, eq=False, repr=False)
class BandErrors:
    """What is discarded by keeping only the blocks of pairs at distance ≤ k; made by :func:`band_errors`.

    Attributes:
        bandwidth: k = 0, 1, …: every finite distance that occurs, ``(K,)``. 0 is block-diagonal.
        share: ‖H − H_k‖_F² / ‖H‖_F² at each k, ``(K,)``.
        frobenius: ‖H − H_k‖_F, ``(K,)``.
        spectral: Upper bound on ‖H − H_k‖₂: the largest row sum of the discarded ‖H[v,w]‖_F, ``(K,)``.
        by_distance: The share of ‖H‖_F² that sits at each distance, ``(K,)``. With ``unconnected`` it adds up to 1.
        unconnected: The share at infinite distance.
    """

    bandwidth: Tensor
    share: Tensor
    frobenius: Tensor
    spectral: Tensor
    by_distance: Tensor
    unconnected: float

    def __str__(self) -> str:
        columns = (self.bandwidth, self.by_distance, self.share, self.frobenius, self.spectral)
        rows = [[f"{value.item():.3g}" for value in row] for row in zip(*columns, strict=True)]
        return format_table(["k", "share at k", "discarded share", "|H - H_k|_F", "|H - H_k|_2 <="], rows)

    __repr__ = __str__


def band_errors(table: MetricTable, part: Literal["total", "gn", "tensor"] = "total") -> BandErrors:
    """The error of the block-diagonal and banded approximations, by distance (cf. Cor. 29).

    Squared Frobenius norms of blocks add up, so ``‖H − H_k‖_F² = Σ_{dist(v,w)>k} R(v,w)²`` exactly, over ordered pairs.
    ``‖H − H_k‖₂ ≤ max_v Σ_{w: dist>k} R(v,w)``: the norm of a symmetric matrix of blocks is at most that of the matrix
    of the blocks' norms, which is at most its largest row sum.

    Args:
        table: Metrics of the pairs, of :func:`diagnostics.metrics`; the H of its nodes, batch means (of per-sample
            metrics the shares are those of mean norms, and belong to no matrix).
        part: Which part of the Hessian.
    """
    norms = {"total": table.resonance, "gn": table.gn_norm, "tensor": table.tensor_norm}
    if part not in norms:
        raise ValueError(f'part must be "total", "gn" or "tensor", got {part!r}.')
    block = norms[part]
    distance = table.distance.to(block.device)
    whole = block.square().sum()
    if whole == 0:
        raise DiagnosticsError(f"the {part} part of the Hessian is zero, so no share of it can be discarded.")
    bandwidth = distance[distance.isfinite()].unique()
    outside = [torch.where(distance > k, block, 0) for k in bandwidth]
    discarded = torch.stack([values.square().sum() for values in outside])
    return BandErrors(
        bandwidth=bandwidth,
        share=discarded / whole,
        frobenius=discarded.sqrt(),
        spectral=torch.stack([values.sum(1).amax() for values in outside]),
        by_distance=torch.stack([block[distance == k].square().sum() for k in bandwidth]) / whole,
        unconnected=(block[distance.isinf()].square().sum() / whole).item(),
    )
