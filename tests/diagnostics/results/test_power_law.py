"""Fits against exact laws and numpy, and the inequality that least squares forces, on any numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.results.power_law import fit_exponents, fit_power_law, participation_ratio, zeta_reference

RANKS = torch.arange(1, 21, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "gamma"), [(2.0, 0.7), (0.5, 1.8), (3.0, 0.3)])
def test_exact_laws(alpha: float, gamma: float) -> None:
    sigma = 3e-7 * RANKS**-gamma
    fits = fit_exponents(sigma, 5e4 * sigma**alpha)
    assert fits.alpha.exponent == pytest.approx(alpha, abs=1e-12)
    assert fits.gamma.exponent == pytest.approx(gamma, abs=1e-12)
    assert fits.s.exponent == pytest.approx(alpha * gamma, abs=1e-12)
    assert fits.s_ranked.exponent == pytest.approx(alpha * gamma, abs=1e-12)
    assert fits.alpha.intercept == pytest.approx(math.log(5e4), abs=1e-10)
    assert fits.alpha.r2 == pytest.approx(1, abs=1e-12)
    assert fits.alpha.standard_error == pytest.approx(0, abs=1e-7)
    assert fits.identity.ranked_error == pytest.approx(0, abs=1e-12)


def test_s_is_of_sorted_curvatures() -> None:
    fits = fit_exponents(RANKS**-0.5, (RANKS**-2)[torch.randperm(20, generator=torch.Generator().manual_seed(0))])
    assert fits.s.exponent == pytest.approx(2, abs=1e-12)
    assert fits.s_ranked.exponent < 1.5
    assert fits.identity.sorting == pytest.approx(2 - fits.s_ranked.exponent)
    product = fits.alpha.exponent * fits.gamma.exponent
    assert fits.identity.error == pytest.approx(2 - product)
    assert fits.identity.inside == (fits.identity.error <= fits.identity.bound)


def test_noisy_fit_is_that_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(15, dtype=torch.float64, generator=generator) + 0.1
    y = x**1.3 * (0.5 * torch.randn(15, dtype=torch.float64, generator=generator)).exp()
    fit = fit_power_law(x, y)
    u, v = np.log(x.numpy()), np.log(y.numpy())
    (slope, intercept), covariance = np.polyfit(u, v, 1, cov=True)
    assert fit.exponent == pytest.approx(slope, rel=1e-10)
    assert fit.intercept == pytest.approx(intercept, rel=1e-10)
    assert fit.standard_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-10)
    assert fit.r2 == pytest.approx(np.corrcoef(u, v)[0, 1] ** 2, rel=1e-10)
    assert fit.decay().exponent == -fit.exponent
    assert fit.decay().r2 == fit.r2


positive = st.floats(-12, 12).map(lambda t: 10.0**t)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(positive, positive), min_size=3, max_size=25))
def test_bound_holds_for_any_numbers(pairs: list[tuple[float, float]]) -> None:
    values = torch.tensor(pairs, dtype=torch.float64)
    sigma, h = values[:, 0].sort(descending=True).values, values[:, 1]
    fits = fit_exponents(sigma, h)
    identity = fits.identity
    if math.isnan(fits.alpha.exponent):  # all σ alike: there is no slope on them
        assert float(sigma.max() / sigma.min()) < 1 + 1e-9
        return
    rounding = 1e-8 * (1 + abs(fits.s.exponent) + abs(fits.alpha.exponent * fits.gamma.exponent))
    assert identity.sorting >= -rounding
    if math.isfinite(identity.bound):
        assert identity.ranked_error <= identity.bound + rounding
        assert identity.error <= identity.bound + identity.sorting + rounding


def test_bound_is_attained() -> None:
    """Where the residual of log h lies along the part of log k that log σ does not explain: B is not loose."""
    u = torch.tensor([0.0, -0.4, -0.9, -2.0, -2.2, -3.5], dtype=torch.float64)  # log σ
    k = torch.arange(1, 7, dtype=torch.float64).log()
    du, dk = u - u.mean(), k - k.mean()
    rest = dk - (dk @ du) / (du @ du) * du
    fits = fit_exponents(u.exp(), (1.7 * u + 0.8 * rest).exp())
    assert fits.alpha.exponent == pytest.approx(1.7, abs=1e-12)
    assert fits.identity.ranked_error > 0.01
    assert fits.identity.ranked_error == pytest.approx(fits.identity.bound, rel=1e-10)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_points_give_nan(count: int) -> None:
    fits = fit_exponents(torch.ones(count).cumsum(0).flip(0), torch.ones(count))
    assert fits.alpha.points == count
    assert all(math.isnan(v) for v in (fits.alpha.exponent, fits.s.r2, fits.identity.error, fits.identity.bound))


def test_constants() -> None:
    flat = fit_power_law(RANKS, torch.full_like(RANKS, 3.0))
    assert flat.exponent == pytest.approx(0, abs=1e-14)
    assert math.isnan(fit_power_law(torch.full_like(RANKS, 3.0), RANKS).exponent)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (RANKS, RANKS - 1, "y has values that are not positive"),
        (RANKS * math.inf, RANKS, "x has values that are not positive or not finite"),
        (RANKS, RANKS[:3], "one shape"),
    ],
)
def test_bad_points(x: Tensor, y: Tensor, says: str) -> None:
    with pytest.raises(DiagnosticsError, match=says):
        fit_power_law(x, y)


def test_order_of_singular_values() -> None:
    with pytest.raises(DiagnosticsError, match="descending"):
        fit_exponents(RANKS, RANKS)


def test_participation() -> None:
    assert participation_ratio(torch.ones(7)) == pytest.approx(7)
    assert participation_ratio(torch.tensor([1e-30, 3e-30])) == pytest.approx(16 / 10)  # squares underflow in float32
    assert math.isnan(participation_ratio(torch.zeros(3)))
    for s in (1.5, 2.0, 3.0):
        ranks = torch.arange(1, 2_000_001, dtype=torch.float64)
        tail = (2_000_000.5 ** (1 - s)) / (s - 1)  # of the sum of k^(−s)
        whole = (float((ranks**-s).sum()) + tail) ** 2 / float((ranks ** (-2 * s)).sum())
        assert zeta_reference(s) == pytest.approx(whole, rel=1e-9)
    assert math.isnan(zeta_reference(1.0))
