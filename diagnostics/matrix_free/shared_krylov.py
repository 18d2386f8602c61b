"""Spectral norms of all blocks at once: subspaces that all blocks of a node share, refined by their products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from diagnostics.estimators.symmetric_eigen import eigh

Multiply = Callable[[str, Tensor], Mapping[str, Tensor]]
"""``(w, X) -> {v: H[v,w] X}`` for vectors X ``(S, d_w, k)`` at node w and all nodes v."""
Leading: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""Largest singular values of the blocks H[v,w] of all v, ``(n, S)``, and left singular vectors by v, ``(S, d_v)``."""
Lefts: TypeAlias = dict[str, Tensor]
"""Left singular vectors at v of the blocks H[v,w] of all w, ``(S, d_v, n)``."""


class SharedKrylov:
    """Largest singular values of all blocks H[v,w] of a symmetric matrix of blocks.

    Every node w keeps the vectors X_w that were multiplied so far, with all H[v,w] X_w; the largest singular value of
    H[v,w] within their span, σ, is a lower bound of ‖H[v,w]‖₂. Its left singular vector u is a vector at v, nearly the
    right singular vector of H[w,v] = H[v,w]ᵀ, so it joins X_v: a step of the block power method, accelerated as by
    Lanczos because nothing is forgotten, in which one product serves all blocks of a node.

    Args:
        vectors: X_w by node, ``(S, d_w, k_w)``.
        products: ``products[w][v] = H[v,w] X_w``, ``(S, d_v, k_w)``.
        multiply: Products with further vectors.
    """

    def __init__(
        self, vectors: Mapping[str, Tensor], products: Mapping[str, Mapping[str, Tensor]], multiply: Multiply
    ) -> None:
        self.names = tuple(vectors)
        self._vectors = dict(vectors)
        self._products = {w: dict(columns) for w, columns in products.items()}
        self._multiply = multiply

    def run(self, tolerance: float, most: int) -> tuple[Tensor, Tensor]:
        """``‖H[v,w]‖₂``, and by what share of itself it may still grow, ``(n, n, S)`` each.

        If a share s of a singular vector's square lies outside the span at w, then σ is about s/2 too small; both v
        and w give a value and the larger one counts. A pair is done when the smaller s/2 is within the tolerance, or
        when σ grew by no more in a round. In a round a pair extends one span, where more is outside. After ``most``
        rounds at the latest.
        """
        values, lefts = self._measure()
        missing = torch.full_like(values, torch.inf)
        active = torch.ones_like(values[..., 0], dtype=torch.bool)
        for count in range(most + 1):
            rests = [self._rest(v, lefts[v]) for v in self.names]
            outside = torch.stack([left.square().sum(1).T for left in rests])  # (n, n, S)
            if count == 0:
                missing = torch.minimum(outside, outside.transpose(0, 1)) / 2
                active = (missing > tolerance).any(-1)
            if count == most or not active.any():
                break
            here = active & (outside >= outside.transpose(0, 1)).any(-1)
            for v, left, wanted in zip(self.names, rests, here, strict=True):
                self._extend(v, left[..., wanted], tolerance)
            previous = values
            values, lefts = self._measure()
            growth = torch.where(values > 0, (values - previous) / values, 0).clamp(min=0)
            missing = torch.where(active.unsqueeze(-1), growth, missing)
            active &= (growth > tolerance).any(-1)
        return values, missing

    def _measure(self) -> tuple[Tensor, Lefts]:
        return combined({w: leading(self._vectors[w], self._products[w]) for w in self.names})

    def _rest(self, v: str, vectors: Tensor) -> Tensor:
        return rest(self._vectors[v], vectors)

    def _extend(self, v: str, outside: Tensor, tolerance: float) -> None:
        """Add the directions of ``outside``, orthogonal to the span at v, that are longer than the tolerance."""
        if outside.shape[-1] == 0:
            return
        directions, sizes, _ = torch.linalg.svd(outside, full_matrices=False)
        count = int((sizes.square() > tolerance).sum(-1).max().item())
        if count == 0:
            return
        new = self._rest(v, directions[..., :count])  # of a sample with fewer, the others are arbitrary
        new = new / new.norm(dim=1, keepdim=True).clamp(min=torch.finfo(new.dtype).tiny)
        self._vectors[v] = torch.cat([self._vectors[v], new], 2)
        for u, product in self._multiply(v, new).items():
            self._products[v][u] = torch.cat([self._products[v][u], product], 2)


def leading(vectors: Tensor, products: Mapping[str, Tensor]) -> Leading:
    """The largest singular values of the blocks of a column within the span of X ``(S, d_w, k)``, from H[v,w] X."""
    basis = whiten(vectors)
    values: list[Tensor] = []
    lefts: dict[str, Tensor] = {}
    for v, column in products.items():
        product = column @ basis
        squares, rotation = eigh(product.mT @ product)
        top = squares[..., -1].clamp(min=0).sqrt()
        left = (product @ rotation[..., -1:]).squeeze(-1)
        values.append(top)
        lefts[v] = left / torch.where(top > 0, top, 1).unsqueeze(-1)
    return torch.stack(values), lefts


def combined(columns: Mapping[str, Leading]) -> tuple[Tensor, Lefts]:
    """Singular values from both triangles, ``(n, n, S)``, and all left singular vectors at each node."""
    values = torch.stack([values for values, _ in columns.values()], 1)
    lefts = {v: torch.stack([column[v] for _, column in columns.values()], -1) for v in columns}
    return torch.maximum(values, values.transpose(0, 1)), lefts


def without_products(vectors: Mapping[str, Tensor], columns: Mapping[str, Leading]) -> tuple[Tensor, Tensor]:
    """What ``SharedKrylov(vectors, products, …).run(…, 0)`` returns, once products are reduced to :func:`leading`."""
    values, lefts = combined(columns)
    outside = torch.stack([rest(vectors[v], lefts[v]).square().sum(1).T for v in columns])
    return values, torch.minimum(outside, outside.transpose(0, 1)) / 2


def rest(span: Tensor, vectors: Tensor) -> Tensor:
    """What of the vectors ``(S, d_v, k)`` is orthogonal to the columns of ``span``."""
    known = span @ whiten(span)
    for _ in range(2):
        vectors = vectors - known @ (known.mT @ vectors)
    return vectors


def whiten(vectors: Tensor) -> Tensor:
    """C ``(…, k, k)`` such that the columns of ``X C`` are orthonormal or zero, for X ``(…, d, k)``.

    Directions whose share in X is rounding get a zero column.
    """
    gram = vectors.mT @ vectors
    values, rotation = eigh(gram)
    floor = values[..., -1:] * (vectors.shape[-1] * torch.finfo(vectors.dtype).eps)
    kept = values > floor
    scale = torch.where(kept, values, 1).rsqrt() * kept
    result: Tensor = rotation * scale.unsqueeze(-2)
    return result
