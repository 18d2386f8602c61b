"""Matrices of known spectrum, and operators that misbehave, for the tests of estimators."""

from __future__ import annotations

import torch
from torch import Tensor

from diagnostics.estimators.linear_operator import LinearOperator, MatrixOperator

CPU = torch.device("cpu")


def orthogonal(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q


def symmetric(
    eigenvalues: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> Tensor:
    """A random symmetric matrix with the given eigenvalues, ``(n,)``."""
    basis = orthogonal(len(eigenvalues), seed)
    matrix = basis * eigenvalues.double() @ basis.mT
    return ((matrix + matrix.mT) / 2).to(device, dtype)


def rectangular(
    rows: int, columns: int, values: Tensor, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> Tensor:
    """A random matrix with the given singular values, at most ``min(rows, columns)``."""
    k = len(values)
    return (orthogonal(rows, 1)[:, :k] * values.double() @ orthogonal(columns, 2)[:, :k].mT).to(device, dtype)


def spread(n: int, seed: int = 0) -> Tensor:
    """Normally distributed eigenvalues, ascending."""
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort().values


class Counting(MatrixOperator):
    """Counts columns multiplied, by A or Aᵀ, and the widest product; entries of product ``bad`` become NaN."""

    def __init__(self, matrix: Tensor, bad: int | None = None) -> None:
        super().__init__(matrix)
        self.columns = self.widest = 0
        self.bad = bad

    def _count(self, result: Tensor) -> Tensor:
        first, self.columns = self.columns + 1, self.columns + result.shape[1]
        self.widest = max(self.widest, result.shape[1])
        if self.bad is not None and first <= self.bad <= self.columns:
            result = result.clone()
            result[-1, self.bad - first] = float("nan")
        return result

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._count(super().matmat(vectors))

    def adjoint_matmat(self, vectors: Tensor) -> Tensor:
        return self._count(self.matrix.mT @ vectors)


class NoAdjoint(LinearOperator):
    """A matrix without its adjoint."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self.matrix = matrix

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.matrix @ vectors
