"""Diagonals: exact where they must be, unbiased entry by entry, with true standard errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.diagonal import estimate_diagonal, exchangeable_diagonals
from diagnostics.estimators.linear_operator import MatrixOperator
from diagnostics.estimators.probes import Products
from diagnostics.estimators.sketch import Sketch
from tests.helpers.matrices import Counting, NoAdjoint, rectangular, spread, symmetric

METHODS = ["hutchinson", "xdiag"]
DECAYING = torch.arange(1, 41, dtype=torch.float64) ** -1.5


@pytest.mark.parametrize("method", METHODS)
def test_unbiased_with_true_standard_errors(method: Any) -> None:
    matrix = symmetric(spread(40)) + torch.triu(symmetric(spread(40), 3), 1)
    op = MatrixOperator(matrix)
    runs = [
        estimate_diagonal(op, method, max_products=20, generator=torch.Generator().manual_seed(s)) for s in range(600)
    ]
    values = torch.stack([run.value for run in runs])
    z = (values.mean(0) - matrix.diagonal()) / (values.std(0) / 600**0.5)
    assert z.abs().max() < 4.5
    error = torch.stack([run.standard_error for run in runs]).square().mean(0).sqrt()
    # both are from 600 runs, and good to 3 % each; the standard error of xdiag may be too large by √2, not too small
    ratio = error / values.std(0)
    assert ratio.min() > 0.87
    assert ratio.max() < (1.13 if method == "hutchinson" else 1.55)


def test_variance_is_the_squared_rest_of_the_row() -> None:
    matrix = torch.triu(symmetric(spread(40)))
    estimate = estimate_diagonal(MatrixOperator(matrix.repeat(2, 2)), max_products=79)
    doubled = matrix.repeat(2, 2)
    expected = ((doubled.square().sum(1) - doubled.diagonal().square()) / 79).sqrt()
    # each of 80 variances, from 79 samples, is off by up to √(2/78) = 16 % at one deviation, their mean by far less
    ratio = (estimate.standard_error / expected)[expected > 0]
    assert ratio.mean().item() == pytest.approx(1, rel=0.06)


def test_standard_error_is_merged_over_batches() -> None:
    op = MatrixOperator(symmetric(spread(60)))
    generator = torch.Generator().manual_seed(3)
    probes = Products(op).draw(50, "gaussian", torch.Generator().manual_seed(3))
    samples = probes * (op @ probes)
    whole = estimate_diagonal(op, max_products=50, batch=50, probe="gaussian", generator=generator)
    torch.testing.assert_close(whole.value, samples.mean(1))
    torch.testing.assert_close(whole.standard_error, samples.std(1) / 50**0.5)

    parts = estimate_diagonal(op, max_products=50, batch=7, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    pieces = [Products(op).draw(k, "rademacher", generator) for k in [7] * 7 + [1]]
    samples = torch.cat([piece * (op @ piece) for piece in pieces], 1)
    torch.testing.assert_close(parts.value, samples.mean(1))
    torch.testing.assert_close(parts.standard_error, samples.std(1) / 50**0.5)


def test_xdiag_is_the_mean_over_sketches_with_one_probe_left_out() -> None:
    n, m = 30, 6
    matrix = symmetric(spread(n)) + torch.triu(torch.ones(n, n, dtype=torch.float64))
    products = Products(MatrixOperator(matrix))
    sketch = Sketch(products, transposed=True)
    for columns in (2, 4):
        sketch.extend(products.draw(columns, "rademacher", torch.Generator().manual_seed(columns)))
    parts = sketch.leave_one_out()
    expected = []
    for i in range(m):
        q = torch.linalg.qr(matrix @ parts.probes[:, [j for j in range(m) if j != i]]).Q
        inside = q @ q.mT @ matrix
        w = parts.probes[:, i]
        expected.append(inside.diagonal() + w * (matrix @ w - inside @ w))
    torch.testing.assert_close(exchangeable_diagonals(parts), torch.stack(expected, 1), rtol=1e-10, atol=1e-10)


def test_xdiag_pays_where_the_spectrum_decays() -> None:
    matrix = symmetric(DECAYING)
    op = MatrixOperator(matrix)
    error = {
        method: torch.stack(
            [
                estimate_diagonal(op, method, max_products=24, generator=torch.Generator().manual_seed(s)).value
                - matrix.diagonal()
                for s in range(50)
            ]
        ).norm()
        for method in METHODS
    }
    assert error["xdiag"] < 0.25 * error["hutchinson"]


def test_xdiag_is_exact_where_the_rank_is_below_the_sketch(device: torch.device) -> None:
    for dtype, slack in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        matrix = rectangular(50, 50, torch.tensor([5.0, 3.0, 0.5]), dtype, device)
        estimate = estimate_diagonal(MatrixOperator(matrix), "xdiag", max_products=16, batch=3)
        assert estimate.value.dtype == dtype
        assert (estimate.value - matrix.diagonal()).abs().max() < slack


def test_a_diagonal_matrix_needs_two_probes() -> None:
    values = spread(50)
    estimate = estimate_diagonal(MatrixOperator(torch.diag(values)), max_products=2)
    torch.testing.assert_close(estimate.value, values, rtol=1e-15, atol=0)
    assert not estimate.standard_error.any()


@pytest.mark.parametrize("method", METHODS)
def test_products_tolerance_and_unit_vectors(method: Any) -> None:
    op = Counting(symmetric(spread(60).abs() + 5))
    estimate = estimate_diagonal(op, method, max_products=50, rtol=0.25, batch=6)
    assert estimate.converged
    assert estimate.products == op.columns < 50
    assert estimate.samples >= 10
    assert estimate.standard_error.norm() <= 0.25 * estimate.value.norm()
    full = estimate_diagonal(op, method, max_products=60, batch=11)
    torch.testing.assert_close(full.value, op.matrix.diagonal(), rtol=1e-14, atol=0)
    assert full.products == 60
    assert op.widest == 11
    odd = estimate_diagonal(op, method, max_products=21, batch=6)
    assert odd.products in (20, 21)
    assert not odd.converged


def test_bad_input() -> None:
    op = MatrixOperator(symmetric(spread(30)))
    with pytest.raises(ValueError, match="method is"):
        estimate_diagonal(op, "xtrace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Rademacher"):
        estimate_diagonal(op, "xdiag", probe="gaussian", max_products=10)
    with pytest.raises(ValueError, match="at least 4"):
        estimate_diagonal(op, "xdiag", max_products=2)
    with pytest.raises(ValueError, match="at least 0"):
        estimate_diagonal(op, rtol=-1)
    with pytest.raises(DiagnosticsError, match="not square"):
        estimate_diagonal(MatrixOperator(torch.ones(4, 3)))
    with pytest.raises(NotImplementedError, match="no adjoint"):
        estimate_diagonal(NoAdjoint(torch.randn(30, 30)), "xdiag", max_products=10)
    with pytest.raises(DiagnosticsError, match="product 12 of Counting"):
        estimate_diagonal(Counting(symmetric(spread(30)), bad=12), max_products=20)
