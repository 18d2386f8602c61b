"""Powers of damped factors, against eigendecompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessopt.spectral import factor_powers
from hessopt.spectral.factor_powers import FactorPowers


def factors(count: int, n: int, rank: int, seed: int = 0) -> Tensor:
    """Of ``rank`` directions that stand out, on a flat rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, rank, generator=generator, dtype=torch.float64)
    return x @ x.mT + 0.01 * torch.eye(n, dtype=torch.float64)


def dense(factor: Tensor, exponent: float, damping: float) -> Tensor:
    n = factor.shape[1]
    shift = damping**0.5 * factor.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, vectors = torch.linalg.eigh(factor + shift * torch.eye(n, dtype=factor.dtype))
    return (vectors * values.unsqueeze(1) ** -exponent) @ vectors.mT


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_full_powers_are_those_of_the_eigenvalues(exponent: float) -> None:
    f = factors(3, 7, 4)
    powers = FactorPowers(f, exponent, 1e-2)
    powers.refresh(f, first=True)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    expected = dense(f, exponent, 1e-2)
    torch.testing.assert_close(powers.left(x), expected @ x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(powers.right(x.mT), x.mT @ expected, rtol=1e-10, atol=1e-12)
    square = torch.randn(3, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(powers.both(square), expected @ square @ expected, rtol=1e-10, atol=1e-12)


def test_low_rank_powers_are_exact_where_the_rest_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_powers, "FULL", 10)
    monkeypatch.setattr(factor_powers, "RANK", 6)
    f = factors(2, 40, 6)
    powers = FactorPowers(f, 0.5, 1e-2)
    powers.refresh(f, first=True)
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    expected = dense(f, 0.5, 1e-2)
    torch.testing.assert_close(powers.left(x), expected @ x, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(powers.right(x.mT), x.mT @ expected, rtol=1e-5, atol=1e-7)


def test_eigenvectors_are_carried_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """One iteration from those before comes nearer to a factor that has changed than the start was."""
    monkeypatch.setattr(factor_powers, "FULL", 10)
    monkeypatch.setattr(factor_powers, "RANK", 6)
    x = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = x + 0.1 * torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eye = torch.eye(40, dtype=torch.float64).unsqueeze(0)
    before, now = (0.01 * eye + t @ t.mT for t in (x, moved))
    powers = FactorPowers(now, 0.5, 1e-2)
    powers.refresh(before, first=True)
    errors = []
    for _ in range(3):
        errors.append(float((powers.left(eye) - dense(now, 0.5, 1e-2)).norm()))
        powers.refresh(now, first=False)
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 0.1 * errors[1]


def test_diagonal_and_zero_factors() -> None:
    f = torch.rand(2, 5, dtype=torch.float64)
    powers = FactorPowers(f, 0.25, 1e-2)
    powers.refresh(f, first=True)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = torch.diag_embed((f + 0.1 * f.mean(1, keepdim=True)) ** -0.25)
    torch.testing.assert_close(powers.left(x), expected @ x, rtol=1e-12, atol=0)
    torch.testing.assert_close(powers.right(x.mT), x.mT @ expected, rtol=1e-12, atol=0)
    zero = torch.zeros(1, 4, 4, dtype=torch.float64)
    powers = FactorPowers(zero, 0.25, 1e-2)
    powers.refresh(zero, first=True)
    torch.testing.assert_close(powers.left(x[:1, :4]), x[:1, :4], rtol=1e-12, atol=0)
