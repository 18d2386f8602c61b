"""A random sketch of the range of a matrix, and what it would be without each of its probes in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.estimators.probes import Products

PAIRED = 2.0
"""Inflation of the variance of a mean of leave-one-out samples, beside that of independent ones.

What varies comes from pairs of probes, one of them in the other's sketch. Each pair counts in two of the m samples
alike: Σ_{j≠i} h_ij of variance m v each, and their mean (2/m) Σ_{i<j} h_ij of variance 2 v, not v. Where single probes
make the variation it is too large by up to as much.
"""


@dataclass(frozen=True)
class LeaveOneOut:
    """Sketch ``A Ω = Q R`` of m probes, and its m versions with one probe left out.

    The range of A Ω without column i has the projector ``P_i = Q (I − s_i s_iᵀ) Qᵀ``, because s_i is orthogonal to all
    columns of R but the i-th: it is the normalised i-th column of ``R⁻ᵀ`` (downdating). Where column i lies in the span
    of the others, leaving it out changes nothing and s_i = 0.

    Attributes:
        probes: Ω, ``(n, m)``.
        basis: Q, orthonormal columns, ``(n, m)``.
        triangle: ``R = Qᵀ A Ω``, ``(m, m)``.
        image: Z = A Q or Aᵀ Q, ``(n, m)``.
        inside: ``W = Qᵀ Ω``, ``(m, m)``.
        removed: S, the columns s_i, ``(m, m)``.
    """

    probes: Tensor
    basis: Tensor
    triangle: Tensor
    image: Tensor
    inside: Tensor
    removed: Tensor


class Sketch:
    """A sketch that grows by batches of probes: 2 products a probe.

    Args:
        products: Of a square matrix A.
        transposed: Keep AᵀQ, which needs the adjoint of what is not symmetric, instead of A Q.
    """

    def __init__(self, products: Products, *, transposed: bool = False) -> None:
        n, op = products.op.shape[0], products.op
        self._products, self._transposed = products, transposed
        self._probes = self._basis = self._image = torch.empty(n, 0, dtype=op.dtype, device=op.device)
        self._triangle = torch.empty(0, 0, dtype=op.dtype, device=op.device)

    @property
    def size(self) -> int:
        """The number m of probes."""
        return self._probes.shape[1]

    def extend(self, probes: Tensor) -> None:
        """Add columns to Ω, ``(n, k)``."""
        sampled = self._products.forward(probes)
        old = self._basis
        new = orthonormal_complement(old, sampled)
        multiply = self._products.adjoint if self._transposed else self._products.forward
        self._image = torch.cat([self._image, multiply(new)], 1)
        self._basis = torch.cat([old, new], 1)
        below = torch.zeros(new.shape[1], old.shape[1], dtype=new.dtype, device=new.device)
        self._triangle = torch.cat([torch.cat([self._triangle, below]), self._basis.mT @ sampled], 1)
        self._probes = torch.cat([self._probes, probes], 1)

    def leave_one_out(self) -> LeaveOneOut:
        """The sketch with what its m versions with one probe left out need."""
        return LeaveOneOut(
            self._probes,
            self._basis,
            self._triangle,
            self._image,
            self._basis.mT @ self._probes,
            _removed(self._triangle),
        )


def orthonormal_complement(basis: Tensor, vectors: Tensor) -> Tensor:
    """Orthonormal columns, orthogonal to those of ``basis`` to rounding, whose span together holds ``vectors``.

    Also where ``vectors`` are dependent: as many columns come back, the superfluous ones arbitrary. That is why
    Householder's method sees both parts at once; it needs ``basis`` and ``vectors`` to have at most n columns together.
    """
    both: Tensor = torch.linalg.qr(torch.cat([basis, vectors], 1)).Q
    return both[:, basis.shape[1] :]


def _removed(triangle: Tensor) -> Tensor:
    """Unit vectors s_i orthogonal to all columns of R but the i-th; 0 where that column depends on the others.

    Columns of the pseudo-inverse's transpose ``U σ⁻¹ Vᵀ`` are such vectors where ``(V Vᵀ)_ii = 1``, that is where
    column i is independent of the others.
    """
    left, values, right = torch.linalg.svd(triangle)
    eps = torch.finfo(values.dtype).eps
    kept = (values > len(values) * eps * values.amax()).to(values.dtype)
    directions = left @ (right * (kept / torch.where(kept > 0, values, 1)).unsqueeze(1))
    independent = (right.square() * kept.unsqueeze(1)).sum(0) > 1 - eps**0.5
    norms = torch.linalg.vector_norm(directions, dim=0)
    return torch.where(independent, directions / torch.where(independent, norms, 1), 0)
