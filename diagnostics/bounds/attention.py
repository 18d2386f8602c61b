"""Local curvature of single-head softmax attention in closed form (Prop. 102)."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

PAIRS = (("query", "query"), ("key", "key"), ("value", "value"), ("query", "key"), ("query", "value"), ("key", "value"))
"""The pairs whose blocks are returned; the others are transposes."""


def attention_curvature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    signal: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Second derivatives of ``Σ δ · softmax(c Q Kᵀ) V`` by queries, keys and values (cf. Prop. 102).

    This is the local curvature K_u of an attention node u with back-propagated signal δ: its own share of H^T. With
    ``A = softmax(c Q Kᵀ)``, ``t_ij = δ_i·v_j − Σ_l A_il δ_i·v_l``, and i a query, j and l keys,

        M_i[j,l] = A_ij t_ij 1[j=l] − A_ij A_il (t_ij + t_il)      second derivative by the scores s_ij, s_il
        S_i[j,l] = A_ij 1[j=l] − A_ij A_il                         derivative of A_il by s_ij

        K[q_i, q_i] = c² Σ_jl M_i[j,l] k_j k_lᵀ                    no block between different queries
        K[k_j, k_l] = c² Σ_i M_i[j,l] q_i q_iᵀ
        K[q_i, k_l] = c² Σ_j M_i[j,l] k_j q_iᵀ + c A_il t_il I
        K[q_i, v_l] = c Σ_j S_i[j,l] k_j δ_iᵀ
        K[k_j, v_l] = c Σ_i S_i[j,l] q_i δ_iᵀ
        K[v, v] = 0                                                the output is linear in the values

    Proof: the chain rule with ``∂s_ij/∂q_i = c k_j``, ``∂s_ij/∂k_j = c q_i``, ``∂²s_ij/∂q_i∂k_j = c I``.

    Args:
        query: Q, ``(B, T, d)``.
        key: K, ``(B, T', d)``.
        value: V, ``(B, T', d_v)``.
        signal: δ, the derivative of the loss by the output, ``(B, T, d_v)``.
        scale: c; None: 1/√d.
        mask: Added to the scores (−inf: not attended to) or, if boolean, True where attended to; broadcast to
            ``(B, T, T')``. Every query needs a key.

    Returns:
        Blocks by pairs of ``"query"``, ``"key"``, ``"value"`` (:data:`PAIRS`), ``(B, T·d, T'·d)`` and so on.
    """
    c = query.shape[-1] ** -0.5 if scale is None else scale
    scores = c * query @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1)
    gain = signal @ value.mT
    tilt = gain - (weights * gain).sum(-1, keepdim=True)
    slope = weights * tilt  # ∂/∂s
    pairs = einsum(weights, weights, "b i j, b i l -> b i j l")
    bend = torch.diag_embed(slope) - pairs * (tilt[..., :, None] + tilt[..., None, :])
    spread = torch.diag_embed(weights) - pairs

    queries = c**2 * einsum(bend, key, key, "b i j l, b j d, b l e -> b i d e")
    unit = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
    mixed = c**2 * einsum(bend, key, query, "b i j l, b j d, b i e -> b i d l e")
    mixed = mixed + c * einsum(slope, unit, "b i l, d e -> b i d l e")
    same = torch.eye(query.shape[1], dtype=query.dtype, device=query.device)
    blocks = {
        ("query", "query"): einsum(queries, same, "b i d e, i m -> b i d m e"),
        ("key", "key"): c**2 * einsum(bend, query, query, "b i j l, b i d, b i e -> b j d l e"),
        ("value", "value"): value.new_zeros(*value.shape, *value.shape[1:]),
        ("query", "key"): mixed,
        ("query", "value"): c * einsum(spread, key, signal, "b i j l, b j d, b i e -> b i d l e"),
        ("key", "value"): c * einsum(spread, query, signal, "b i j l, b i d, b i e -> b j d l e"),
    }
    return {pair: rearrange(block, "b i d l e -> b (i d) (l e)") for pair, block in blocks.items()}
