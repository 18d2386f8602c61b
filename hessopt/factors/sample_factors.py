"""Square-root factors of one layer's curvature: ``Ĵ = S ∂z/∂θ``, as outer products or as a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import einsum, rearrange
from torch import Tensor


class Factor(Protocol):
    """A square-root factor ``Ĵ_v ∈ R^{N×P_v}`` of one layer's curvature, which need not be formed.

    Steps and gradients are lists with one tensor for each trained parameter of the layer; ``damping`` is a list with
    the (constant) diagonal of D for each.
    """

    @property
    def size(self) -> int:
        """N."""

    def gram(self, damping: Sequence[float]) -> Tensor:
        """``Ĵ D⁻¹ Ĵᵀ``, ``(N, N)``."""

    @property
    def gram_operations(self) -> float:
        """Multiplications of :meth:`gram` for each of its N² numbers, to leading order."""

    def trace(self) -> Tensor:
        """``‖Ĵ‖²_F``, the trace of the layer's curvature."""

    def jvp(self, step: Sequence[Tensor]) -> Tensor:
        """``Ĵ s``, ``(N,)``."""

    def vjp(self, y: Tensor) -> list[Tensor]:
        """``Ĵᵀ y`` for y ``(N,)``."""

    def matrix(self) -> Tensor:
        """Ĵ, ``(N, P_v)``, parameters flattened and in order."""


@dataclass(frozen=True)
class OuterFactor(Factor):
    """The factor of a linear layer that is used any number of times, derivatives included, never formed.

    Each use adds an outer product: ``Ĵ[kb, (i, j)] = Σ_t left[k, b, t, i] · right[k, b, t, j]``. For a call, left is
    the back-propagated row of the loss's root and right the input, with a one for the bias; for a use in a derivative,
    left is what comes back through the network and right is back-propagated. Rows are numbered by root column k and
    sample b, k slowest: ``N = K' · B``.

    Attributes:
        left: ``(K', B, T, d_out)``.
        right: ``(K', B, T, d)`` or, if it is the same for all root columns, ``(1, B, T, d)``. d is d_in if the weight
            is trained, and one more, the last, if the bias is.
        has_weight: The weight ``(d_out, d_in)`` is trained.
        has_bias: The bias ``(d_out,)`` is trained. Lists below hold the trained ones, the weight first.
    """

    left: Tensor
    right: Tensor
    has_weight: bool
    has_bias: bool

    @property
    def size(self) -> int:
        """N, the number of rows."""
        return self.left.shape[0] * self.left.shape[1]

    def gram(self, damping: Sequence[float]) -> Tensor:
        """``Ĵ D⁻¹ Ĵᵀ``, ``(N, N)``, with a diagonal D that is constant on each parameter.

        By products of the outer products' parts, ``Σ_tt' (left_t left_t'ᵀ) ∘ (right_t D⁻¹ right_t'ᵀ)``, or by forming
        Ĵ, whichever takes fewer operations: N²T²(d_out + d) against N²P + NTP.

        Args:
            damping: The diagonal's value for each trained parameter.
        """
        uses, width, features = self.left.shape[2], self.left.shape[3], self.right.shape[3]
        count, size = self.size, width * features
        scaled = self.right * self._spread(damping).rsqrt()
        if count * uses**2 * (width + features) > (count + 2 * uses) * size:
            return symmetric_product(rearrange(self.left.mT @ scaled, "k b i j -> (k b) (i j)"))
        gram = self.left.new_zeros(count, count)
        for t in range(uses):
            for s in range(t + 1):
                part = self._pair(scaled, t, s)
                gram += part if s == t else part + part.mT
        return gram

    @property
    def gram_operations(self) -> float:
        """Multiplications of :meth:`gram` for each of its N² numbers, to leading order."""
        uses, width, features = self.left.shape[2], self.left.shape[3], self.right.shape[3]
        return min(uses * (uses + 1) / 2 * (width + features), width * features / 2)

    def _pair(self, scaled: Tensor, t: int, s: int) -> Tensor:
        left = rearrange(self.left, "k b t i -> t (k b) i")
        part = left[t] @ left[s].mT
        right = rearrange(scaled, "k b t j -> t (k b) j")
        samples = right[t] @ right[s].mT
        b = self.left.shape[1]
        if len(samples) == len(part):
            return part.mul_(samples)
        rearrange(part, "(k b) (l c) -> k b l c", b=b, c=b).mul_(samples.unsqueeze(1))
        return part

    def trace(self) -> Tensor:
        """``‖Ĵ‖²_F``, the trace of the layer's curvature."""
        right = self.right.expand(len(self.left), -1, -1, -1)
        return ((self.left @ self.left.mT) * (right @ right.mT)).sum()

    def jvp(self, step: Sequence[Tensor]) -> Tensor:
        """``Ĵ s``, ``(N,)``, for a step s given as one tensor for each trained parameter."""
        parts = [s if s.ndim == 2 else s.unsqueeze(1) for s in step]
        return (self.left * (self.right @ torch.cat(parts, dim=1).mT)).sum(dim=(2, 3)).reshape(-1)

    def vjp(self, y: Tensor) -> list[Tensor]:
        """``Ĵᵀ y`` for y ``(N,)``, as one tensor for each trained parameter."""
        weighted = self.left * rearrange(y, "(k b) -> k b 1 1", b=self.left.shape[1])
        if len(self.right) == 1:
            product = einsum(weighted.sum(dim=0), self.right[0], "b t i, b t j -> i j")
        else:
            product = einsum(weighted, self.right, "k b t i, k b t j -> i j")
        return self._split(product)

    def matrix(self) -> Tensor:
        """Ĵ, ``(N, P_v)``, parameters flattened and in order."""
        rows = rearrange(self.left.mT @ self.right, "k b i j -> (k b) i j")
        return torch.cat([part.flatten(1) for part in self._split(rows)], dim=1)

    @property
    def _sizes(self) -> list[int]:
        width, features = self.left.shape[3], self.right.shape[3] - self.has_bias
        return [width * features] * self.has_weight + [width] * self.has_bias

    def _split(self, product: Tensor) -> list[Tensor]:
        parts = [product[..., : product.shape[-1] - self.has_bias]] if self.has_weight else []
        return [*parts, product[..., -1]] if self.has_bias else parts

    def _spread(self, damping: Sequence[float]) -> Tensor:
        sizes = [self.right.shape[3] - self.has_bias] * self.has_weight + [1] * self.has_bias
        return torch.cat([self.right.new_full((n,), d) for n, d in zip(sizes, damping, strict=True)])


@dataclass(frozen=True)
class DenseFactor(Factor):
    """The factor of any layer, as the matrix that it is.

    Attributes:
        rows: Ĵ, ``(N, P_v)``.
        shapes: The shapes of the layer's trained parameters.
    """

    rows: Tensor
    shapes: tuple[torch.Size, ...]

    @property
    def size(self) -> int:
        """N."""
        return len(self.rows)

    def gram(self, damping: Sequence[float]) -> Tensor:
        """``Ĵ D⁻¹ Ĵᵀ``, ``(N, N)``."""
        sizes = [math.prod(shape) for shape in self.shapes]
        diagonal = torch.cat([self.rows.new_full((n,), d) for n, d in zip(sizes, damping, strict=True)])
        return symmetric_product(self.rows * diagonal.rsqrt())

    @property
    def gram_operations(self) -> float:
        """Multiplications of :meth:`gram` for each of its N² numbers, to leading order."""
        return self.rows.shape[1] / 2

    def trace(self) -> Tensor:
        """``‖Ĵ‖²_F``."""
        return self.rows.square().sum()

    def jvp(self, step: Sequence[Tensor]) -> Tensor:
        """``Ĵ s``, ``(N,)``."""
        return self.rows @ torch.cat([s.reshape(-1) for s in step])

    def vjp(self, y: Tensor) -> list[Tensor]:
        """``Ĵᵀ y`` for y ``(N,)``."""
        parts = (self.rows.mT @ y).split([math.prod(shape) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def matrix(self) -> Tensor:
        """Ĵ, ``(N, P_v)``."""
        return self.rows


def symmetric_product(rows: Tensor) -> Tensor:
    """``A Aᵀ``, ``(N, N)``, for A ``(N, P)``, with nearly half of the operations left out.

    By blocks of rows below and on the diagonal; the rest is copied.
    """
    count = len(rows)
    product = rows.new_empty(count, count)
    width = max(_LEAST_BLOCK, -(-count // _BLOCKS))
    for start in range(0, count, width):
        stop = min(start + width, count)
        torch.mm(rows[start:stop], rows[:stop].mT, out=product[start:stop, :stop])
        product[:start, start:stop] = product[start:stop, :start].mT
    return product


_BLOCKS, _LEAST_BLOCK = 8, 128
