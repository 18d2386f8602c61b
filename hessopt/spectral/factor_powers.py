"""Fractional powers of damped Kronecker factors, of many dimensions as low rank plus a multiple of the identity."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor
from torch.nn import functional

from diagnostics.estimators.symmetric_eigen import eigh
from hessopt.averages.division import EIGEN, Work

FULL = 256
"""Up to this size all eigenvectors are computed."""
RANK = 128
"""Leading eigenvectors that are kept of larger factors."""
FIRST_ITERATIONS = 3
"""Of subspace iteration from a random start; one is enough from the eigenvectors of the refresh before."""


class FactorPowers:
    r"""``(F + τ I)^{-q}`` of a stack of positive semidefinite factors, with ``τ = √δ · tr F / n``.

    Three forms. Diagonal factors stay diagonal. Up to :data:`FULL` rows the power is formed from all eigenvectors. Of
    larger ones the leading r = :data:`RANK` eigenpairs ``(U, e)`` are kept and the rest is taken for flat, ρ its mean::

        (F + τ I)^{-q} ≈ c I − V Vᵀ,   V = U diag(√(c − (e + τ)^{-q})),   c = (ρ + τ)^{-q},   ρ = (tr F − Σ e) / (n − r)

    which needs two products of F with r vectors at a refresh, as the eigenvectors of the one before are a start for
    subspace iteration, and ``2 n r`` in place of ``n²`` multiplications for each vector. Source: docs/spectral.md.

    Args:
        like: Factors ``(m, n, n)``, or diagonal ones ``(m, n)``.
        exponent: q > 0.
        damping: δ > 0.

    Attributes:
        tensors: All that a refresh and the products depend on; zero before the first refresh.
    """

    def __init__(self, like: Tensor, exponent: float, damping: float) -> None:
        self.exponent, self.damping = exponent, damping
        self.diagonal, self.full = like.ndim == 2, like.ndim == 3 and like.shape[1] <= FULL
        self.shape = count, n = (len(like), like.shape[1])
        low = [(count, n, RANK), (count, 1)]
        shapes = [like.shape] if self.diagonal or self.full else low
        self.tensors = [like.new_zeros(shape) for shape in shapes]

    @property
    def work(self) -> list[Work]:
        """What a refresh costs, of each factor."""
        count, n = self.shape
        if self.diagonal:
            return [Work(0.0, n)] * count
        if self.full:
            return [Work(EIGEN * n**3, n * n)] * count
        return [Work(2.0 * n * n * RANK + 4.0 * n * RANK**2 + EIGEN * RANK**3, n * RANK + 1)] * count

    def part(self, entries: Sequence[int]) -> FactorPowers:
        """Those of some of the factors, in memory of their own."""
        found = copy(self)
        found.shape, found.tensors = (len(entries), self.shape[1]), [t[list(entries)] for t in self.tensors]
        return found

    @torch.no_grad()
    def take(self, part: FactorPowers, entries: Sequence[int]) -> None:
        """Take the powers of some of the factors."""
        for mine, theirs in zip(self.tensors, part.tensors, strict=True):
            mine[list(entries)] = theirs

    @torch.no_grad()
    def refresh(self, factors: Tensor, *, first: bool) -> None:
        """Compute the powers of factors; for the ``first`` time there are no eigenvectors to start from."""
        if self.diagonal:
            self.tensors = [self._damped(factors, factors.mean(1, keepdim=True))]
            return
        n = factors.shape[1]
        mean = factors.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        if self.full:
            values, vectors = eigh(factors)
            powers = self._damped(values.clamp_min(0), mean)
            self.tensors = [(vectors * powers.unsqueeze(1)) @ vectors.mT]
            return
        values, vectors = _leading(factors, None if first else functional.normalize(self.tensors[0], dim=1))
        rest = (n * mean - values.sum(1, keepdim=True)).clamp_min(0) / (n - RANK)
        flat = self._damped(rest, mean)
        missing = (flat - self._damped(values, mean)).clamp_min(0)
        self.tensors = [vectors * missing.sqrt().unsqueeze(1), flat]

    def _damped(self, values: Tensor, mean: Tensor) -> Tensor:
        shift = self.damping**0.5 * mean
        # Of a factor that is zero (a layer whose inputs are), any multiple of the identity will do.
        return torch.where(mean > 0, values + shift, 1.0) ** -self.exponent

    def left(self, x: Tensor) -> Tensor:
        """The powers times ``(m, n, k)``."""
        if self.diagonal:
            return self.tensors[0].unsqueeze(2) * x
        if self.full:
            return self.tensors[0] @ x
        scaled, flat = self.tensors
        return torch.baddbmm(flat.unsqueeze(2) * x, scaled, scaled.mT @ x, alpha=-1)

    def right(self, x: Tensor) -> Tensor:
        """``(m, k, n)`` times the powers."""
        if self.diagonal:
            return x * self.tensors[0].unsqueeze(1)
        if self.full:
            return x @ self.tensors[0]
        scaled, flat = self.tensors
        return torch.baddbmm(flat.unsqueeze(2) * x, x @ scaled, scaled.mT, alpha=-1)

    def both(self, x: Tensor) -> Tensor:
        """The powers times ``(m, n, n)`` times the powers."""
        return self.left(self.right(x))


def _leading(factors: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs ``(m, r)``, ``(m, n, r)``, by subspace iteration with a Rayleigh-Ritz step."""
    count, n, _ = factors.shape
    iterations = 1
    if start is None:
        iterations = FIRST_ITERATIONS
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(n, RANK, generator=generator, dtype=torch.float64).to(factors).expand(count, n, RANK)
    basis = start
    for _ in range(iterations):
        basis = torch.linalg.qr(factors @ basis).Q
    values, turns = eigh(basis.mT @ factors @ basis)
    return values.clamp_min(0), basis @ turns
