"""Traces: exact where they must be, unbiased, with standard errors that tell the truth."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.estimators.linear_operator import MatrixOperator
from diagnostics.estimators.probes import Products
from diagnostics.estimators.sketch import Sketch
from diagnostics.estimators.trace import estimate_trace, exchangeable_traces
from diagnostics.results.estimate import Estimate
from tests.helpers.matrices import Counting, rectangular, spread, symmetric

METHODS = ["hutchinson", "hutch++", "xtrace"]
PROBES = ["rademacher", "gaussian"]
DECAYING = torch.arange(1, 61, dtype=torch.float64) ** -2


def _many(matrix: Tensor, seeds: int, **options: Any) -> list[Estimate]:
    op = MatrixOperator(matrix)
    return [estimate_trace(op, generator=torch.Generator().manual_seed(seed), **options) for seed in range(seeds)]


def _values(estimates: list[Estimate]) -> Tensor:
    return torch.stack([e.value for e in estimates])


@pytest.mark.parametrize(("method", "probe"), list(itertools.product(METHODS, PROBES)))
@pytest.mark.parametrize("signed", [True, False])
def test_unbiased(method: Any, probe: Any, signed: bool) -> None:
    # unsymmetric, and with eigenvalues of both signs
    eigenvalues = DECAYING * (torch.where(torch.arange(60) % 3 == 0, -1, 1) if signed else 1)
    matrix = symmetric(eigenvalues)
    matrix = matrix + 0.1 * torch.triu(symmetric(spread(60), 5), 1) / 60
    values = _values(_many(matrix, 400, method=method, probe=probe, max_products=24))
    z = (values.mean() - matrix.trace()) / (values.std() / 400**0.5)
    assert abs(z.item()) < 4


@pytest.mark.parametrize(("method", "probe"), list(itertools.product(METHODS, PROBES)))
def test_intervals_cover(method: Any, probe: Any) -> None:
    for matrix in (symmetric(spread(80)), symmetric(torch.arange(1, 81, dtype=torch.float64) ** -1)):
        covered = 0
        for estimate in _many(matrix, 400, method=method, probe=probe, max_products=40):
            low, high = estimate.interval(0.95)
            covered += bool(low <= matrix.trace() <= high)
        assert covered >= 0.91 * 400  # 3.6 binomial standard deviations below 95 %


@pytest.mark.parametrize("probe", PROBES)
def test_sketching_pays_where_the_spectrum_decays(probe: Any) -> None:
    matrix = symmetric(DECAYING)
    deviation = {
        method: (_values(_many(matrix, 200, method=method, probe=probe, max_products=30)) - matrix.trace()).std()
        for method in METHODS
    }
    assert deviation["hutch++"] < 0.1 * deviation["hutchinson"]
    assert deviation["xtrace"] < 0.75 * deviation["hutch++"]


def test_hutchinson_has_its_textbook_variance() -> None:
    matrix = symmetric(spread(50))
    off = matrix.square().sum() - matrix.diagonal().square().sum()
    for probe, variance in (("rademacher", 2 * off), ("gaussian", 2 * matrix.square().sum())):
        estimates = _many(matrix, 500, method="hutchinson", probe=probe, max_products=20)
        errors = torch.stack([e.standard_error for e in estimates])
        # a variance from 500 samples is off by √(2/500) = 6 %
        assert _values(estimates).var().item() == pytest.approx(variance.item() / 20, rel=0.26)
        assert errors.square().mean().item() == pytest.approx(variance.item() / 20, rel=0.1)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_exact_where_the_rank_is_below_the_sketch(method: Any, probe: Any) -> None:
    matrix = rectangular(50, 50, torch.tensor([5.0, 3.0, 0.5]))
    for batch in (1, 3, 50):
        estimate = estimate_trace(MatrixOperator(matrix), method, max_products=16, probe=probe, batch=batch)
        assert abs(estimate.value - matrix.trace()) < 1e-13
        assert estimate.standard_error < 1e-13


@pytest.mark.parametrize("probe", PROBES)
def test_xtrace_is_the_mean_over_sketches_with_one_probe_left_out(probe: Any) -> None:
    n, m = 30, 6
    matrix = symmetric(spread(n)) + torch.triu(torch.ones(n, n, dtype=torch.float64))
    sketch = Sketch(Products(MatrixOperator(matrix)))
    generator = torch.Generator().manual_seed(1)
    products = Products(MatrixOperator(matrix))
    for columns in (2, 1, 3):
        sketch.extend(products.draw(columns, probe, generator))
    parts = sketch.leave_one_out()
    expected = []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        q = torch.linalg.qr(matrix @ parts.probes[:, others]).Q
        outside = torch.eye(n, dtype=torch.float64) - q @ q.mT
        w = outside @ parts.probes[:, i]
        scale = (n - m + 1) / w.square().sum() if probe == "gaussian" else 1
        expected.append((q.mT @ matrix @ q).trace() + scale * w @ matrix @ w)
    found = exchangeable_traces(parts, rescale=probe == "gaussian")
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-11, atol=1e-11)


def test_a_dependent_probe_leaves_the_sketch_as_it_is() -> None:
    # the matrix sees entries 0 and 1 only, and of three probes two look alike there
    matrix = torch.zeros(10, 10, dtype=torch.float64)
    matrix[0, 0], matrix[1, 1], matrix[0, 1] = 2, 3, 1
    probes = torch.ones(10, 3, dtype=torch.float64)
    probes[1, 0] = -1
    probes[4, 1] = -1
    sketch = Sketch(Products(MatrixOperator(matrix)))
    sketch.extend(probes)
    parts = sketch.leave_one_out()
    for i in range(3):
        others = matrix @ probes[:, [j for j in range(3) if j != i]]
        u, s, _ = torch.linalg.svd(others, full_matrices=False)
        u = u[:, s > 1e-10]
        span = parts.basis @ parts.basis.mT - torch.outer(
            parts.basis @ parts.removed[:, i], parts.basis @ parts.removed[:, i]
        )
        torch.testing.assert_close(span @ matrix @ span, u @ u.mT @ matrix @ u @ u.mT, rtol=1e-12, atol=1e-12)
    assert (parts.removed[:, 0].norm() - 1).abs() < 1e-12  # the only one to tell entry 1 apart
    assert not parts.removed[:, 1:].any()


@pytest.mark.parametrize("method", METHODS)
def test_the_zero_matrix(method: Any) -> None:
    estimate = estimate_trace(MatrixOperator(torch.zeros(40, 40)), method, max_products=24)
    assert estimate.value == 0
    assert estimate.standard_error == 0
    assert estimate.converged


@pytest.mark.parametrize("method", METHODS)
def test_unit_vectors_where_products_suffice(method: Any) -> None:
    op = Counting(torch.triu(symmetric(spread(23))))
    estimate = estimate_trace(op, method, max_products=23, batch=7)
    assert estimate.item() == pytest.approx(op.matrix.trace().item(), rel=1e-13)
    assert estimate.standard_error == 0
    assert estimate.converged
    assert estimate.products == op.columns == 23
    assert op.widest == 7


@pytest.mark.parametrize("method", METHODS)
def test_products_are_counted_and_bounded(method: Any) -> None:
    for budget in (4, 5, 9, 31, 50):
        op = Counting(symmetric(spread(80)))
        estimate = estimate_trace(op, method, max_products=budget, batch=6)
        assert estimate.products == op.columns <= budget
        assert op.columns >= budget - 1  # XTrace uses an even number
        assert op.widest <= 6
        assert not estimate.converged


@pytest.mark.parametrize("method", METHODS)
def test_stops_at_the_tolerance(method: Any) -> None:
    op = MatrixOperator(symmetric(spread(200).abs()))
    loose = estimate_trace(op, method, rtol=0.1, max_products=190)
    tight = estimate_trace(op, method, rtol=0.01, max_products=190)
    assert loose.converged
    assert loose.products < tight.products
    for estimate, rtol in ((loose, 0.1), (tight, 0.01)):
        assert estimate.converged == bool(estimate.standard_error <= rtol * estimate.value.abs())
    assert loose.samples >= 10


@pytest.mark.parametrize("method", METHODS)
def test_dtypes_and_devices(device: torch.device, method: Any) -> None:
    for dtype, slack in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        matrix = symmetric(torch.tensor([3.0, 2.0, -1.0] + [0.0] * 60), dtype=dtype, device=device)
        estimate = estimate_trace(MatrixOperator(matrix), method, max_products=30)
        assert estimate.value.dtype == dtype
        assert estimate.value.device.type == device.type
        if method != "hutchinson":
            assert abs(estimate.item() - 4) < slack


@pytest.mark.parametrize("method", METHODS)
def test_randomness(method: Any) -> None:
    op = MatrixOperator(symmetric(spread(120)))
    before = torch.get_rng_state()
    first, again = estimate_trace(op, method), estimate_trace(op, method)
    other = estimate_trace(op, method, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.value == again.value != other.value


def test_bad_input() -> None:
    square = MatrixOperator(symmetric(spread(30)))
    for options, message in [
        ({"method": "hutch"}, "method is"),
        ({"max_products": 3}, "at least 4"),
        ({"max_products": 1, "method": "hutchinson"}, "2 samples give a standard error"),
        ({"rtol": -1e-3}, "at least 0"),
        ({"rtol": float("nan")}, "at least 0"),
        ({"batch": 0}, "batch"),
        ({"probe": "uniform"}, "probe is"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimate_trace(square, **options)  # type: ignore[arg-type]
    with pytest.raises(DiagnosticsError, match="not square"):
        estimate_trace(MatrixOperator(torch.ones(3, 4)))
    with pytest.raises(DiagnosticsError, match="float32 or float64"):
        estimate_trace(MatrixOperator(torch.ones(3, 3, dtype=torch.float16)))
    with pytest.raises(DiagnosticsError, match="no entries"):
        estimate_trace(MatrixOperator(torch.ones(0, 0)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [1, 14, 23])
def test_a_product_that_is_not_finite_is_named(method: Any, bad: int) -> None:
    with pytest.raises(DiagnosticsError, match=f"product {bad} of Counting 60 × 60.* is not finite"):
        estimate_trace(Counting(symmetric(spread(60)), bad), method, max_products=24)
