"""Spectral norms against dense and scipy's singular values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.sparse.linalg import svds

from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.estimators.linear_operator import MatrixOperator
from diagnostics.estimators.spectral_norm import spectral_norm
from tests.helpers.matrices import Counting, NoAdjoint, rectangular, spread, symmetric

VALUES = torch.linspace(1, 3, 40, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (60, 60), (1, 9), (9, 1)])
def test_rectangular(device: torch.device, shape: tuple[int, int]) -> None:
    for dtype, slack in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        matrix = rectangular(*shape, VALUES[-min(*shape, 40) :], dtype, device)
        op = Counting(matrix)
        found = spectral_norm(op)
        assert found.converged
        assert found.products == op.columns
        assert found.item() == pytest.approx(3, rel=slack)
        assert abs(found.item() - 3) <= found.error.item() <= 2 * torch.finfo(dtype).eps ** 0.5 * 3
        assert found.value.dtype == dtype
        # the right singular vector, to the accuracy of the residual over the gap of squares
        assert torch.linalg.vector_norm(matrix @ found.vector).item() == pytest.approx(3, rel=slack)
        assert torch.linalg.vector_norm(found.vector).item() == pytest.approx(1, rel=slack)
    if min(shape) > 1:
        assert found.item() == pytest.approx(svds(MatrixOperator(matrix.cpu()).to_scipy(), k=1)[1].item(), rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_symmetric(sign: int) -> None:
    eigenvalues = torch.cat([spread(200), torch.tensor([sign * 6.0, -sign * 5.9], dtype=torch.float64)])
    op = Counting(symmetric(eigenvalues))
    found = spectral_norm(op)
    assert found.item() == pytest.approx(6, rel=1e-13)
    assert found.converged
    assert found.products == op.columns
    general = spectral_norm(NoSymmetry(op.matrix))
    assert general.item() == pytest.approx(6, rel=1e-13)
    assert found.products < general.products  # one product a step, not two


class NoSymmetry(Counting):
    """Forgets that the matrix is symmetric."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(matrix)
        self.symmetric = False


def test_power_iterations() -> None:
    matrix = rectangular(40, 60, torch.tensor([2.0, 1.0, 0.5]))
    op = Counting(matrix)
    found = spectral_norm(op, "power")
    assert found.products == op.columns == 40  # 20 iterations, as in the paper
    assert found.item() == pytest.approx(2, rel=1e-14)
    assert abs(found.item() - 2) <= found.error.item() + 1e-14
    few = spectral_norm(op, "power", max_products=6)
    assert few.products == 6
    vector = few.vector
    # the bound is the residual of Aᵀ A v = σ² v over σ
    sigma = torch.linalg.vector_norm(matrix @ vector)
    residual = torch.linalg.vector_norm(matrix.mT @ (matrix @ vector) - sigma**2 * vector) / sigma
    assert few.error.item() == pytest.approx(residual.item(), rel=1e-10)
    assert abs(few.item() - 2) <= few.error.item()
    assert not few.converged
    assert spectral_norm(op, "power", rtol=1e-3).products < 40
    assert spectral_norm(op, "power", rtol=1e-3).converged


def test_the_error_bounds_the_distance_to_a_singular_value() -> None:
    values = torch.linspace(2.9, 3, 40, dtype=torch.float64)
    op = MatrixOperator(rectangular(50, 60, values))
    for method in ("lanczos", "power"):
        for budget in (2, 4, 8, 16):
            found = spectral_norm(op, method, max_products=budget)  # type: ignore[arg-type]
            assert (values - found.item()).abs().min() <= found.error.item() + 1e-14
            assert found.item() <= 3 + 1e-14
            assert found.products <= budget


def test_lanczos_needs_fewer_products_than_power_iterations() -> None:
    op = MatrixOperator(rectangular(100, 120, torch.linspace(0, 3, 100)))
    lanczos = spectral_norm(op, rtol=1e-3)
    power = spectral_norm(op, "power", rtol=1e-3, max_products=5000)
    assert lanczos.converged
    assert power.converged
    assert lanczos.products < 0.5 * power.products


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_warm_start(method: Any) -> None:
    matrix = rectangular(100, 120, torch.linspace(0, 3, 100))
    cold = spectral_norm(MatrixOperator(matrix), method, rtol=1e-4, max_products=4000)
    nearby = MatrixOperator(matrix + 1e-6 * rectangular(100, 120, torch.ones(100)))
    warm = spectral_norm(nearby, method, rtol=1e-4, start=cold.vector, max_products=4000)
    assert warm.converged
    assert warm.products < cold.products
    assert warm.item() == pytest.approx(torch.linalg.matrix_norm(nearby.matrix, 2).item(), rel=1e-6)


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_the_zero_matrix(method: Any) -> None:
    found = spectral_norm(MatrixOperator(torch.zeros(30, 40)), method)
    assert found.item() == found.error.item() == 0
    assert found.converged


def test_bad_input() -> None:
    op = MatrixOperator(rectangular(30, 40, torch.ones(3)))
    with pytest.raises(ValueError, match="method is"):
        spectral_norm(op, "qr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_products"):
        spectral_norm(op, max_products=1)
    with pytest.raises(ValueError, match="rtol"):
        spectral_norm(op, "power", rtol=-1)
    for method in ("lanczos", "power"):
        with pytest.raises(DiagnosticsError, match="start must be a vector"):
            spectral_norm(op, method, start=torch.ones(30, dtype=torch.float64))  # type: ignore[arg-type]
        with pytest.raises(DiagnosticsError, match="product 4 of"):
            spectral_norm(Counting(rectangular(30, 40, VALUES[:30]), bad=4), method)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match="no adjoint"):
            spectral_norm(NoAdjoint(torch.randn(30, 40)), method)  # type: ignore[arg-type]
    with pytest.raises(MemoryBudgetError, match="basis of"):
        spectral_norm(op, memory_limit=40 * 8 * 5)
