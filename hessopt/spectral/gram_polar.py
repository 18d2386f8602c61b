"""Inverse square roots of Gram matrices by Muon's odd polynomials: the polar factor without the larger side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x ↦ a x + b x³ + c x⁵, for singular values: Jordan et al., Muon (2024)."""
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
    """About ``K^{-1/2}`` of positive semidefinite K, ``(m, n, n)``: singular values of ``S Z``, K = Z Zᵀ, are 0.7–1.2.

    What Muon's iteration ``X ← a X + b (XXᵀ) X + c (XXᵀ)² X`` makes of Z is ``S Z``: with ``Y = a I + b K + c K²``, S
    is the product of all Y, and the Gram matrix of the next X is ``Y K Y``. Singular values below about 1/500 of
    ``√tr K`` stay in proportion. Zero for a zero matrix.
    """
    a, b, c = COEFFICIENTS
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(torch.finfo(gram.dtype).tiny)
    k = gram / trace
    root: Tensor | None = None
    for i in range(ITERATIONS):
        y = torch.baddbmm(k, k, k, beta=b, alpha=c)
        y.diagonal(dim1=1, dim2=2).add_(a)
        root = y if root is None else root @ y
        if i + 1 < ITERATIONS:
            k = y @ k @ y
    assert root is not None
    return root * trace.rsqrt()
