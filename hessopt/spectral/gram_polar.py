"""Inverse square roots of Gram matrices by odd polynomials: the polar factor without the larger side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (
    (8.3836736, -24.7659059, 18.3570812),
    (4.0434204, -3.0114050, 0.5695122),
    (3.5055706, -2.6266538, 0.5257194),
    (2.4901159, -1.8342751, 0.4368347),
)
"""Of x ↦ a x + b x³ + c x⁵, for singular values: the best quintics one after another for [0.003, 1], each by its
equioscillation on what the one before leaves (Amsel et al., The Polar Express, 2025, theorem 3.1). Four do what five of
Muon's do: together they are within 0.2 of 1 from 0.003 on."""
SMALL = 64
"""Up to this size matrices of different sizes go together: time is that of calling operations, not of multiplying."""


def inverse_roots(grams: Sequence[Tensor]) -> list[Tensor]:
    """:func:`inverse_root` of several stacks, those of equal size and all small ones by the same operations."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, gram in enumerate(grams):
        alike[max(SMALL, gram.shape[1])].append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        if len(members) == 1:
            found[members[0]] = inverse_root(grams[members[0]])
            continue
        size = max(grams[i].shape[1] for i in members)
        stacked = torch.cat([_padded(grams[i], size) for i in members])
        for i, root in zip(members, inverse_root(stacked).split([len(grams[i]) for i in members]), strict=True):
            n = grams[i].shape[1]
            found[i] = root[:, :n, :n]
    return [found[i] for i in range(len(grams))]


def _padded(gram: Tensor, size: int) -> Tensor:
    more = size - gram.shape[1]
    return torch.nn.functional.pad(gram, (0, more, 0, more)) if more else gram


def inverse_root(gram: Tensor) -> Tensor:
    """About ``K^{-1/2}`` of positive semidefinite K, ``(m, n, n)``: singular values of ``S Z``, K = Z Zᵀ, are 0.8–1.2.

    What ``X ← a X + b (XXᵀ) X + c (XXᵀ)² X`` makes of Z, as Muon's iteration does, is ``S Z``: with
    ``Y = a I + b K + c K²``, S is the product of all Y, and the Gram matrix of the next X is ``Y K Y``. Singular values
    below about 1/300 of ``√tr K`` stay in proportion. Zero for a zero matrix.
    """
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    k = gram / trace
    root: Tensor | None = None
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        y = torch.baddbmm(k, k, k, beta=b, alpha=c)
        y.diagonal(dim1=1, dim2=2).add_(a)
        root = y if root is None else root @ y
        if i + 1 < len(COEFFICIENTS):
            k = y @ k @ y
    assert root is not None
    return root * trace.rsqrt()
