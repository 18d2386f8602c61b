"""Matrix-free linear maps between flat vectors: what every operator can do, and what every estimator needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import scipy.sparse.linalg as sla
import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError, MemoryBudgetError


class LinearOperator(ABC):
    """A real matrix A, ``(m, n)``, known by its products with vectors: ``A @ x``.

    Subclasses implement :meth:`matmat`, and :meth:`adjoint_matmat` where A is not symmetric.

    Attributes:
        shape: ``(m, n)``.
        dtype: Of A and of the vectors it takes; no vector is converted silently.
        device: Of A and of the vectors it takes.
        symmetric: Whether ``A = Aᵀ``.
        positive_semidefinite: Whether ``A = Aᵀ`` has no negative eigenvalue, by construction.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        symmetric: bool = False,
        positive_semidefinite: bool = False,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.symmetric = symmetric or positive_semidefinite
        self.positive_semidefinite = positive_semidefinite

    @abstractmethod
    def matmat(self, vectors: Tensor) -> Tensor:
        """``A V`` for the columns of V, ``(n, k) -> (m, k)``, together where that is faster."""

    def adjoint_matmat(self, vectors: Tensor) -> Tensor:
        """``Aᵀ V`` for the columns of V, ``(m, k) -> (n, k)``."""
        if self.symmetric:
            return self.matmat(vectors)
        raise NotImplementedError(f"{type(self).__name__} is not symmetric and has no adjoint_matmat.")

    def __matmul__(self, other: Tensor) -> Tensor:
        """``A @ x`` for a vector ``(n,)`` or the columns of a matrix ``(n, k)``."""
        return self._apply(self.matmat, other, self.shape[1])

    def matvec(self, vector: Tensor) -> Tensor:
        """``A x`` for one vector, ``(n,) -> (m,)``."""
        if vector.ndim != 1:
            raise DiagnosticsError(
                f"matvec takes one vector, ({self.shape[1]},), got shape {tuple(vector.shape)}; use matmat."
            )
        return self @ vector

    @property
    def T(self) -> LinearOperator:
        """The adjoint Aᵀ; A itself where it is symmetric."""
        return self if self.symmetric else _Adjoint(self)

    def to_dense(self, *, memory_limit: int = 8 * 2**30) -> Tensor:
        """The matrix itself, ``(m, n)``, by products with unit vectors.

        Raises:
            MemoryBudgetError: it and the unit vectors would take more than ``memory_limit`` bytes.
        """
        rows, columns = self.shape
        thin = self if columns <= rows else self.T
        needed = (rows * columns + min(rows, columns) ** 2) * torch.empty((), dtype=self.dtype).element_size()
        if needed > memory_limit:
            raise MemoryBudgetError(
                f"the dense {rows} × {columns} matrix takes {needed / 2**30:.1f} GiB, more than the limit of "
                f"{memory_limit / 2**30:.1f} GiB. Use products or estimators, or raise memory_limit."
            )
        dense = thin @ torch.eye(min(rows, columns), dtype=self.dtype, device=self.device)
        return dense if thin is self else dense.mT

    def to_scipy(self) -> sla.LinearOperator:
        """The same map on NumPy vectors, for ``scipy.sparse.linalg`` (``eigsh``, ``svds``, ``cg`` …).

        Vectors are copied between NumPy and this operator's device at every product.
        """

        def wrapped(product: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
            return lambda x: product(torch.tensor(x, dtype=self.dtype, device=self.device)).cpu().numpy()

        def flat(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: product(x.reshape(len(x), -1)).reshape(-1)

        numpy_dtype = torch.empty((), dtype=self.dtype).numpy().dtype
        return sla.LinearOperator(
            self.shape,
            matvec=wrapped(flat(self.matmat)),
            rmatvec=wrapped(flat(self.adjoint_matmat)),
            matmat=wrapped(self.matmat),
            rmatmat=wrapped(self.adjoint_matmat),
            dtype=numpy_dtype,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.shape[0]} × {self.shape[1]}, {self.dtype}, {self.device}"

    def _apply(self, product: Callable[[Tensor], Tensor], other: Tensor, size: int) -> Tensor:
        if not isinstance(other, Tensor):
            raise TypeError(f"an operator multiplies tensors, got {type(other).__name__}.")
        if other.ndim not in (1, 2) or other.shape[0] != size:
            raise DiagnosticsError(
                f"{self!r} multiplies vectors ({size},) or columns ({size}, k), got shape {tuple(other.shape)}."
            )
        if other.dtype != self.dtype or other.device != self.device:
            raise DiagnosticsError(
                f"{self!r} got a vector of {other.dtype} on {other.device}: convert it first, "
                "v.to(op.device, op.dtype)."
            )
        if other.ndim == 1:
            return product(other.unsqueeze(1)).squeeze(1)
        return product(other)


class _Adjoint(LinearOperator):
    def __init__(self, original: LinearOperator) -> None:
        super().__init__((original.shape[1], original.shape[0]), original.dtype, original.device)
        self._original = original

    def matmat(self, vectors: Tensor) -> Tensor:
        return self._original.adjoint_matmat(vectors)

    def adjoint_matmat(self, vectors: Tensor) -> Tensor:
        return self._original.matmat(vectors)

    @property
    def T(self) -> LinearOperator:
        return self._original


class MatrixOperator(LinearOperator):
    """A matrix that is known entry by entry, as an operator."""

    def __init__(self, matrix: Tensor, *, positive_semidefinite: bool = False) -> None:
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise DiagnosticsError(f"need a real matrix (m, n), got {matrix.dtype} of shape {tuple(matrix.shape)}.")
        symmetric = matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, matrix.mT)
        if positive_semidefinite and not symmetric:
            raise DiagnosticsError("a positive semidefinite matrix is symmetric, and this one is not.")
        super().__init__(
            (matrix.shape[0], matrix.shape[1]),
            matrix.dtype,
            matrix.device,
            symmetric=symmetric,
            positive_semidefinite=positive_semidefinite,
        )
        self.matrix = matrix

    def matmat(self, vectors: Tensor) -> Tensor:
        """``A V``."""
        return self.matrix @ vectors

    def adjoint_matmat(self, vectors: Tensor) -> Tensor:
        """``Aᵀ V``."""
        return self.matrix.mT @ vectors


def symmetrise(matrix: Tensor) -> Tensor:
    """(M + Mᵀ)/2 of matrices ``(…, N, N)`` that are symmetric up to rounding (cf. Remark 15).

    ``blocks[v, w]`` and ``blocks[w, v]`` are the same numbers, so an assembled matrix is unsymmetric in its diagonal
    blocks only, each a product of factors, and there by rounding. Of all symmetric matrices the average is the nearest
    to M in Frobenius norm, and no further from the exact Hessian than M is.

    Raises:
        DiagnosticsError: M is not square, or unsymmetric by more than rounding (√eps of its norm): then it is no
            Hessian, and averaging would hide that.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise DiagnosticsError(
            f"a matrix of shape {tuple(matrix.shape)} is not square, so it has no eigenvalues: pass a diagonal block, "
            "or all blocks assembled."
        )
    skew = torch.linalg.matrix_norm(matrix - matrix.mT)
    if (skew > torch.finfo(matrix.dtype).eps ** 0.5 * torch.linalg.matrix_norm(matrix)).any():
        raise DiagnosticsError(
            f"the matrix is not symmetric: ‖M − Mᵀ‖_F = {skew.max().item():.3g}. Blocks between two different nodes "
            "are not; diagonal blocks and assembled blocks are."
        )
    return (matrix + matrix.mT) / 2
