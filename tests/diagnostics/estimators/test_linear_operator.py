"""The base class of operators, on matrices that are known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from torch import Tensor

from diagnostics import DiagnosticsError, MemoryBudgetError
from diagnostics.estimators.linear_operator import LinearOperator, MatrixOperator


class Doubled(LinearOperator):
    """A rectangular operator of its own kind: 2 A."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self._matrix = matrix

    def matmat(self, vectors: Tensor) -> Tensor:
        return 2 * self._matrix @ vectors

    def adjoint_matmat(self, vectors: Tensor) -> Tensor:
        return 2 * self._matrix.mT @ vectors


@pytest.fixture
def matrix(device: torch.device) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 3, dtype=torch.float64).to(device)


def test_products_with_vectors_and_columns(matrix: Tensor) -> None:
    op = Doubled(matrix)
    x, columns = matrix.new_ones(3), torch.eye(3, dtype=matrix.dtype, device=matrix.device)[:, :2]
    assert torch.equal(op @ x, 2 * matrix @ x)
    assert torch.equal(op.matvec(x), op @ x)
    assert torch.equal(op @ columns, 2 * matrix[:, :2])


def test_the_adjoint(matrix: Tensor) -> None:
    op = Doubled(matrix)
    y = torch.arange(5.0, dtype=matrix.dtype, device=matrix.device)
    assert op.T.shape == (3, 5)
    torch.testing.assert_close(op.T @ y, 2 * matrix.mT @ y)
    assert op.T.T is op
    symmetric = MatrixOperator(matrix @ matrix.mT)
    assert symmetric.symmetric
    assert symmetric.T is symmetric
    assert not MatrixOperator(matrix).symmetric
    assert not MatrixOperator(matrix[:3].clone()).symmetric


@pytest.mark.parametrize("transposed", [False, True])
def test_to_dense(matrix: Tensor, transposed: bool) -> None:
    matrix = matrix.mT if transposed else matrix
    torch.testing.assert_close(Doubled(matrix).to_dense(), 2 * matrix)
    torch.testing.assert_close(Doubled(matrix).T.to_dense(), 2 * matrix.mT)


def test_to_dense_multiplies_the_fewest_unit_vectors() -> None:
    counts: list[int] = []

    class Counting(Doubled):
        def matmat(self, vectors: Tensor) -> Tensor:
            counts.append(vectors.shape[1])
            return super().matmat(vectors)

        def adjoint_matmat(self, vectors: Tensor) -> Tensor:
            counts.append(-vectors.shape[1])
            return super().adjoint_matmat(vectors)

    Counting(torch.ones(7, 2)).to_dense()
    Counting(torch.ones(2, 7)).to_dense()
    assert counts == [2, -2]


def test_to_dense_within_a_budget(matrix: Tensor) -> None:
    needed = (15 + 9) * 8
    Doubled(matrix).to_dense(memory_limit=needed)
    with pytest.raises(MemoryBudgetError, match=r"dense 5 × 3 matrix takes 0\.0 GiB"):
        Doubled(matrix).to_dense(memory_limit=needed - 1)


def test_to_scipy(matrix: Tensor) -> None:
    op, dense = Doubled(matrix).to_scipy(), 2 * matrix.cpu().numpy()
    assert op.dtype == np.float64
    x, y = np.ones(3), np.arange(5.0)
    np.testing.assert_allclose(op @ x, dense @ x, rtol=1e-14)
    np.testing.assert_allclose(op.matvec(x[:, None]), dense @ x[:, None], rtol=1e-14)
    np.testing.assert_allclose(op.rmatvec(y), dense.T @ y, rtol=1e-14)
    np.testing.assert_allclose(op @ np.eye(3), dense, rtol=1e-14)
    np.testing.assert_allclose(op.H @ np.eye(5), dense.T, rtol=1e-14)
    found = sla.svds(op, k=2, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(found)[::-1], np.linalg.svd(dense, compute_uv=False)[:2], rtol=1e-10)


def test_to_scipy_keeps_the_precision_of_the_operator() -> None:
    matrix = torch.ones(2, 2)
    op = MatrixOperator(matrix).to_scipy()
    assert op.dtype == np.float32
    assert (op @ np.ones(2)).dtype == np.float32


def test_refusals(matrix: Tensor) -> None:
    op = Doubled(matrix)
    with pytest.raises(DiagnosticsError, match=r"multiplies vectors \(3,\) or columns \(3, k\), got shape \(5,\)"):
        op @ matrix.new_ones(5)
    with pytest.raises(DiagnosticsError, match=r"got shape \(3, 1, 1\)"):
        op @ matrix.new_ones(3, 1, 1)
    with pytest.raises(DiagnosticsError, match=r"torch\.float32.*convert it first"):
        op @ matrix.new_ones(3).float()
    with pytest.raises(DiagnosticsError, match=r"on meta.*convert it first"):
        op @ matrix.new_ones(3).to("meta")
    with pytest.raises(TypeError, match="multiplies tensors, got ndarray"):
        op @ np.ones(3)
    with pytest.raises(DiagnosticsError, match="matvec takes one vector"):
        op.matvec(matrix.new_ones(3, 2))
    with pytest.raises(DiagnosticsError, match="need a real matrix"):
        MatrixOperator(torch.ones(3))
    with pytest.raises(DiagnosticsError, match="need a real matrix"):
        MatrixOperator(torch.ones(3, 3, dtype=torch.complex64))
    with pytest.raises(DiagnosticsError, match="positive semidefinite matrix is symmetric"):
        MatrixOperator(matrix, positive_semidefinite=True)

    class OneWay(LinearOperator):
        def matmat(self, vectors: Tensor) -> Tensor:
            return vectors

    with pytest.raises(NotImplementedError, match="OneWay is not symmetric and has no adjoint_matmat"):
        OneWay((3, 3), torch.float32, torch.device("cpu")).T @ torch.ones(3)


def test_repr(matrix: Tensor) -> None:
    assert repr(Doubled(matrix)) == f"Doubled 5 × 3, torch.float64, {matrix.device}"
    assert MatrixOperator(torch.eye(2), positive_semidefinite=True).symmetric
