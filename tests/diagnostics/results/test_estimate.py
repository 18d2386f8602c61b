"""What an estimate says of itself."""

from __future__ import annotations

import pytest
import torch

from diagnostics.errors import DiagnosticsError
from diagnostics.results.estimate import Estimate, enough, exact, mean_of


def test_mean_of() -> None:
    samples = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    estimate = mean_of(samples, 6, rtol=0.5)
    assert estimate.item() == 3
    assert estimate.standard_error.item() == pytest.approx((7 / 3) ** 0.5)  # s² = (4 + 1 + 9)/2
    assert (estimate.samples, estimate.products) == (3, 6)
    assert not estimate.converged
    assert mean_of(samples, 6, rtol=0.51).converged
    with pytest.raises(DiagnosticsError, match="at least 2 samples"):
        mean_of(samples[:1], 1, 0.0)


def test_tolerance_of_a_vector_is_in_the_euclidean_norm() -> None:
    samples = torch.tensor([[10.0, 0.0], [10.0, 2.0]])  # value (10, 1), standard error (0, 1)
    assert mean_of(samples, 2, rtol=0.1).converged
    assert not mean_of(samples, 2, rtol=0.09).converged


def test_stopping_needs_ten_samples() -> None:
    assert not enough(mean_of(torch.ones(9), 9, rtol=0.1))
    assert enough(mean_of(torch.ones(10), 10, rtol=0.1))
    assert not enough(mean_of(torch.arange(10.0), 10, rtol=0.1))


def test_interval_is_students() -> None:
    estimate = Estimate(torch.tensor(3.0), torch.tensor(2.0), samples=3, products=3, converged=False)
    low, high = estimate.interval(0.95)
    assert (low.item(), high.item()) == pytest.approx((3 - 8.6053, 3 + 8.6053), abs=1e-4)  # t = 4.30265, 2 degrees
    with pytest.raises(ValueError, match="between 0 and 1"):
        estimate.interval(95)


def test_exact_values_have_no_error() -> None:
    estimate = exact(torch.tensor(2.5), 4)
    assert estimate.interval() == (2.5, 2.5)
    assert str(estimate) == "2.5 ± 0 (4 products, converged)"
    assert str(mean_of(torch.eye(3), 3, 0.0)) == "(3,) entries, largest standard error 0.33 (3 products)"
