"""Frobenius norms of rectangular matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.linear_operator import MatrixOperator
from diagnostics.estimators.norms import estimate_frobenius_norm
from tests.helpers.matrices import Counting, NoAdjoint, rectangular, spread, symmetric

METHODS = ["hutchinson", "projected"]
FLAT = torch.linspace(1, 2, 40, dtype=torch.float64)
SHAPES = [(40, 70), (70, 50), (60, 60)]


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_square_is_unbiased_and_intervals_cover(shape: tuple[int, int], method: Any, probe: Any) -> None:
    matrix = rectangular(*shape, FLAT)
    runs = [
        estimate_frobenius_norm(
            MatrixOperator(matrix),
            method,
            squared=True,
            probe=probe,
            max_products=36,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(400)
    ]
    values = torch.stack([run.value for run in runs])
    truth = matrix.square().sum()
    assert abs(((values.mean() - truth) / (values.std() / 20)).item()) < 4
    inside = sum(bool(run.interval()[0] <= truth <= run.interval()[1]) for run in runs)
    assert inside >= 0.91 * 400


def test_gaussian_variance() -> None:
    # ‖A r‖² = Σ σ² χ², of variance 2 Σ σ⁴
    matrix = rectangular(40, 70, FLAT)
    run = estimate_frobenius_norm(MatrixOperator(matrix), squared=True, probe="gaussian", max_products=69)
    expected = (2 * FLAT.pow(4).sum() / 69) ** 0.5
    assert run.standard_error.item() == pytest.approx(expected.item(), rel=0.35)  # of 69 samples: four deviations


@pytest.mark.parametrize("method", METHODS)
def test_root_follows_from_the_square(method: Any) -> None:
    op = MatrixOperator(rectangular(40, 70, FLAT))
    square = estimate_frobenius_norm(op, method, squared=True, max_products=30)
    root = estimate_frobenius_norm(op, method, max_products=30)
    assert root.item() == pytest.approx(square.item() ** 0.5, rel=1e-14)
    assert root.standard_error.item() == pytest.approx(square.standard_error.item() / (2 * root.item()), rel=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_exact_for_low_rank_and_pays_for_decay(device: torch.device, shape: tuple[int, int]) -> None:
    for dtype, slack in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        matrix = rectangular(*shape, torch.tensor([5.0, 3.0, 0.5]), dtype, device)
        estimate = estimate_frobenius_norm(MatrixOperator(matrix), "projected", max_products=12, batch=3)
        assert estimate.item() == pytest.approx((25 + 9 + 0.25) ** 0.5, rel=slack)
        assert estimate.standard_error < slack
        assert estimate.value.dtype == dtype
        assert estimate.value.device.type == device.type
    values = torch.arange(1, 41, dtype=torch.float64) ** -1
    op = MatrixOperator(rectangular(*shape, values))
    runs = {
        method: [
            estimate_frobenius_norm(op, method, max_products=30, generator=torch.Generator().manual_seed(s)).item()
            for s in range(50)
        ]
        for method in METHODS
    }
    spreads = {method: torch.tensor(run).std() for method, run in runs.items()}
    assert spreads["projected"] < 0.2 * spreads["hutchinson"]


def test_fewer_rows_than_a_third_of_the_products() -> None:
    matrix = rectangular(5, 90, torch.linspace(1, 2, 5))
    estimate = estimate_frobenius_norm(MatrixOperator(matrix), "projected", max_products=60)
    assert estimate.item() == pytest.approx(matrix.norm().item(), rel=1e-14)
    assert estimate.standard_error < 1e-14


@pytest.mark.parametrize("method", METHODS)
def test_products_tolerance_and_unit_vectors(method: Any) -> None:
    op = Counting(rectangular(40, 70, FLAT))
    estimate = estimate_frobenius_norm(op, method, rtol=0.05, max_products=66, batch=6)
    assert estimate.converged
    assert estimate.products == op.columns < 66
    assert estimate.standard_error <= 0.05 * estimate.value
    assert op.widest == 6
    full = estimate_frobenius_norm(op, method, max_products=70, batch=11)
    assert full.item() == pytest.approx(op.matrix.norm().item(), rel=1e-14)
    assert (full.products, full.standard_error.item(), full.converged) == (70, 0, True)
    op.columns = 0
    every = estimate_frobenius_norm(op, method, max_products=41, batch=6)
    assert every.products == op.columns == 41


@pytest.mark.parametrize("method", METHODS)
def test_the_zero_matrix(method: Any) -> None:
    estimate = estimate_frobenius_norm(MatrixOperator(torch.zeros(30, 40)), method, max_products=20)
    assert estimate.item() == estimate.standard_error.item() == 0
    assert estimate.converged


def test_bad_input() -> None:
    op = MatrixOperator(symmetric(spread(30)))
    with pytest.raises(ValueError, match="method is"):
        estimate_frobenius_norm(op, "svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2"):
        estimate_frobenius_norm(op, max_products=1)
    with pytest.raises(ValueError, match="at least 0"):
        estimate_frobenius_norm(op, rtol=-1)
    estimate_frobenius_norm(NoAdjoint(torch.randn(30, 40)), max_products=10)
    with pytest.raises(NotImplementedError, match="no adjoint"):
        estimate_frobenius_norm(NoAdjoint(torch.randn(30, 40)), "projected", max_products=10)
    with pytest.raises(DiagnosticsError, match="product 12 of Counting"):
        estimate_frobenius_norm(Counting(rectangular(30, 40, FLAT[:30]), bad=12), max_products=20)
