"""Stochastic Lanczos quadrature against dense eigenvalues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.estimators.linear_operator import LinearOperator, MatrixOperator
from diagnostics.estimators.probes import Products
from diagnostics.estimators.spectral_density import SpectralDensity, spectral_density
from tests.helpers.matrices import Counting, spread, symmetric

EIGENVALUES = torch.cat([spread(290) * 0.3, torch.linspace(3, 9, 10, dtype=torch.float64)])


def _run(matrix: Tensor, seed: int = 0, **options: Any) -> SpectralDensity:
    return spectral_density(MatrixOperator(matrix), generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("reorthogonalise", [True, False])
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_each_rule_has_the_moments_of_its_probe(probe: Any, reorthogonalise: bool) -> None:
    matrix = symmetric(EIGENVALUES)
    density = _run(matrix, probes=3, steps=6, probe=probe, reorthogonalise=reorthogonalise)
    start = Products(MatrixOperator(matrix)).draw(3, probe, torch.Generator().manual_seed(0))
    start = start / torch.linalg.vector_norm(start, dim=0)
    image = start
    for degree in range(2 * 6):  # exact up to degree 2·steps − 1
        moment = (density.weights * density.nodes**degree).sum(-1)
        torch.testing.assert_close(moment, (start * image).sum(0), rtol=1e-10, atol=1e-10)
        image = matrix @ image
    assert not torch.allclose((density.weights * density.nodes**12).sum(-1), (start * image).sum(0), rtol=1e-6)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_spectral_sums_are_unbiased_and_intervals_cover(probe: Any) -> None:
    matrix = symmetric(EIGENVALUES)
    functions = {torch.square: EIGENVALUES.square().sum(), torch.exp: EIGENVALUES.exp().sum()}
    runs = [_run(matrix, seed, probes=8, steps=25, probe=probe) for seed in range(200)]
    for function, truth in functions.items():
        estimates = [run.spectral_sum(function) for run in runs]
        values = torch.stack([e.value for e in estimates])
        assert abs(((values.mean() - truth) / (values.std() / 200**0.5)).item()) < 4
        covered = sum(bool(e.interval()[0] <= truth <= e.interval()[1]) for e in estimates)
        assert covered >= 0.89 * 200


def test_fraction_below_is_off_by_the_weights_around_the_point_at_most() -> None:
    # Chebyshev, Markov and Stieltjes, for the measure of each probe
    matrix = symmetric(EIGENVALUES)
    values, vectors = torch.linalg.eigh(matrix)
    start = Products(MatrixOperator(matrix)).draw(20, "gaussian", torch.Generator().manual_seed(0))
    measure = (vectors.mT @ (start / torch.linalg.vector_norm(start, dim=0))).square()
    density = _run(matrix, probes=20, batch=20, steps=30, probe="gaussian")
    for x in (None, -0.2, 0.5, 5.0):
        point = 0.0 if x is None else x
        below = (density.nodes < point).sum(-1)
        around = density.weights.gather(1, torch.stack([below - 1, below.clamp(max=29)], 1)).sum(-1)
        found = (density.weights * (density.nodes < point)).sum(-1)
        assert ((found - measure[values < point].sum(0)).abs() <= around + 1e-12).all()
        assert density.fraction_below(x).item() == pytest.approx(found.mean().item(), rel=1e-12)


def test_negative_mass() -> None:
    matrix = symmetric(EIGENVALUES)
    runs = [_run(matrix, seed, probes=10, steps=100).negative_mass() for seed in range(30)]
    truth = -EIGENVALUES.clamp(max=0).sum()
    values = torch.stack([run.value for run in runs])
    assert abs(((values.mean() - truth) / (values.std() / 30**0.5)).item()) < 4
    assert values.std() / 30**0.5 < 0.01 * truth
    assert 0.5 < torch.stack([run.standard_error for run in runs]).mean() / values.std() < 1.5
    assert sum(bool(run.interval()[0] <= truth <= run.interval()[1]) for run in runs) >= 0.85 * 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reorthogonalise", [True, False])
@pytest.mark.parametrize("low", [0.0, -0.5])
def test_more_steps_than_a_low_rank_matrix_has_eigenvalues(
    dtype: torch.dtype, reorthogonalise: bool, low: float
) -> None:
    """The space is exhausted: each probe's measure is had exactly, and what follows has no weight."""
    torch.manual_seed(0)
    factor = torch.randn(4000, 4, dtype=dtype) / 4000**0.5
    values = torch.tensor([7.0, 3.0, 1.0, low], dtype=dtype)

    class LowRank(LinearOperator):
        def matmat(self, vectors: Tensor) -> Tensor:
            image: Tensor = factor @ (values[:, None] * (factor.mT @ vectors))
            return image

    op = LowRank((4000, 4000), dtype, factor.device, symmetric=True)
    density = spectral_density(op, probes=4, steps=50, reorthogonalise=reorthogonalise)
    eps = 100 * torch.finfo(dtype).eps
    assert (density.weights.sum(-1) - 1).abs().max() < eps
    start = Products(op).draw(4, "rademacher", torch.Generator().manual_seed(0))
    start = start / torch.linalg.vector_norm(start, dim=0)
    image = start
    for degree in range(8):
        moment = (density.weights * density.nodes**degree).sum(-1)
        assert (moment - (start * image).sum(0)).abs().max() < eps * 7**degree
        image = op @ image
    root = torch.linalg.qr(factor.double()).R
    exact = torch.linalg.eigvalsh(root * values.double() @ root.mT)
    assert density.nodes.max().item() <= exact.max().item() + 1000 * eps
    assert density.nodes.min().item() >= min(exact.min().item(), 0) - 1000 * eps


@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_negative_mass_of_a_semidefinite_matrix_is_zero(device: torch.device, reorthogonalise: bool) -> None:
    eigenvalues = torch.cat([torch.zeros(150), torch.linspace(0, 100, 50)])
    for dtype in (torch.float32, torch.float64):
        op = MatrixOperator(symmetric(eigenvalues, dtype=dtype, device=device))
        density = spectral_density(op, steps=80, reorthogonalise=reorthogonalise)
        assert density.nodes.min() < 0  # by rounding, and that is not curvature
        assert density.negative_mass().item() == density.fraction_below().item() == 0
        assert density.rounding == pytest.approx(80 * torch.finfo(dtype).eps * 100, rel=1e-3)
        assert density.negative_mass(threshold=0.0).item() > 0


def test_small_negative_eigenvalues_count() -> None:
    eigenvalues = torch.cat([torch.full((20,), -1e-9), torch.linspace(0, 1, 180)]).double()
    mass = spectral_density(MatrixOperator(symmetric(eigenvalues)), steps=180).negative_mass()
    assert mass.item() == pytest.approx(2e-8, rel=0.5)


def test_exact_where_steps_suffice() -> None:
    op = Counting(symmetric(EIGENVALUES[-40:]))
    density = spectral_density(op, steps=40, batch=11)
    assert density.products == op.columns == 40
    assert op.widest == 11
    torch.testing.assert_close(density.nodes[0], EIGENVALUES[-40:].sort().values, rtol=1e-12, atol=1e-13)
    mass = density.negative_mass()
    assert mass.item() == pytest.approx(-EIGENVALUES[-40:].clamp(max=0).sum().item(), rel=1e-12)
    assert mass.standard_error.item() == 0
    assert mass.converged
    assert density.converged


@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_an_exhausted_space(reorthogonalise: bool) -> None:
    # two different eigenvalues: every probe is done after two steps, the others go on with weight 0
    eigenvalues = torch.tensor([2.0] * 30 + [-1.0] * 70, dtype=torch.float64)
    density = _run(torch.diag(eigenvalues), probes=4, steps=7, reorthogonalise=reorthogonalise)
    assert density.nodes.isfinite().all()
    assert (density.weights > 1e-12).sum(-1).tolist() == [2] * 4
    torch.testing.assert_close(density.weights.sum(-1), torch.ones(4, dtype=torch.float64))
    # with Rademacher probes on a diagonal matrix all weights are known: 0.3 and 0.7
    assert density.spectral_sum(torch.abs).item() == pytest.approx(130, rel=1e-12)
    assert density.negative_mass().item() == pytest.approx(70, rel=1e-12)
    zero = _run(torch.zeros(100, 100), probes=3, steps=5)
    assert zero.spectral_sum(torch.abs).item() == zero.negative_mass().item() == 0


def test_without_reorthogonalisation_ghosts_share_the_weight() -> None:
    matrix = symmetric(EIGENVALUES)
    kept, lost = (_run(matrix, probes=3, steps=120, reorthogonalise=flag) for flag in (True, False))
    top = (EIGENVALUES.max() - lost.nodes).abs() < 1e-6
    assert (top.sum(-1) > 1).any()
    assert ((EIGENVALUES.max() - kept.nodes).abs() < 1e-6).sum(-1).max() == 1
    for function in (torch.abs, torch.square, torch.exp):
        torch.testing.assert_close(
            lost.spectral_sum(function).value, kept.spectral_sum(function).value, rtol=2e-3, atol=0
        )


def test_density() -> None:
    matrix = symmetric(EIGENVALUES)
    grid = torch.linspace(-4, 12, 2001, dtype=torch.float64)
    found = _run(matrix, probes=100, steps=80).density(grid, 0.3)
    assert torch.trapezoid(found.value, grid).item() == pytest.approx(1, rel=1e-6)
    exact = _run(matrix, steps=300).density(grid, 0.3)
    gauss = torch.distributions.Normal(EIGENVALUES, 0.3).log_prob(grid[:, None]).exp().mean(-1)
    torch.testing.assert_close(exact.value, gauss, rtol=1e-10, atol=1e-12)
    peaks = gauss > 0.01 * gauss.max()
    z = (found.value - gauss)[peaks] / found.standard_error[peaks]
    assert z.abs().max() < 5
    assert found.value.shape == found.standard_error.shape == grid.shape
    with pytest.raises(ValueError, match="sigma"):
        _run(matrix, steps=5).density(grid, 0.0)
    with pytest.raises(ValueError, match="grid"):
        _run(matrix, steps=5).density(grid[None], 0.1)


def test_products_batches_and_tolerance() -> None:
    op = Counting(symmetric(EIGENVALUES))
    density = spectral_density(op, probes=7, steps=9, batch=3)
    assert density.products == op.columns == 63
    assert op.widest == 3
    assert density.nodes.shape == density.weights.shape == (7, 9)
    assert not density.converged
    early = spectral_density(op, probes=200, steps=9, batch=6, rtol=0.05, target=torch.square)
    assert early.converged
    assert 10 <= len(early.nodes) < 200
    estimate = early.spectral_sum(torch.square)
    assert estimate.standard_error <= 0.05 * estimate.value
    op.widest = 0
    small = spectral_density(op, probes=7, steps=9, memory_limit=2 * 17 * 300 * 8)
    assert op.widest == 2
    assert small.nodes.shape == (7, 9)


def test_dtype_and_device(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        op = MatrixOperator(symmetric(EIGENVALUES, dtype=dtype, device=device))
        density = spectral_density(op, steps=20)
        assert density.nodes.dtype == density.weights.dtype == dtype
        assert density.nodes.device.type == device.type
        low, high = density.spectral_sum(torch.square).interval(0.999)
        assert low <= EIGENVALUES.square().sum() <= high


def test_randomness() -> None:
    op = MatrixOperator(symmetric(EIGENVALUES))
    before = torch.get_rng_state()
    first, again = (spectral_density(op, steps=5) for _ in range(2))
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes, _run(op.matrix, 7, steps=5).nodes)
    assert torch.equal(torch.get_rng_state(), before)
    assert "negative" in str(first)


def test_bad_input() -> None:
    op = MatrixOperator(symmetric(EIGENVALUES))
    for options, message in [
        ({"probes": 1}, "at least 2 probes"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rtol": -1}, "at least 0"),
        ({"batch": 0}, "batch"),
        ({"probe": "uniform"}, "probe is"),
    ]:
        with pytest.raises(ValueError, match=message):
            spectral_density(op, **options)  # type: ignore[arg-type]
    with pytest.raises(DiagnosticsError, match="not symmetric"):
        spectral_density(MatrixOperator(torch.triu(torch.ones(5, 5))))
    with pytest.raises(DiagnosticsError, match="product 14 of Counting"):
        spectral_density(Counting(op.matrix, bad=14))
    with pytest.raises(MemoryBudgetError, match="reorthogonalise=False"):
        spectral_density(op, memory_limit=300 * 8 * 40)
    spectral_density(op, memory_limit=300 * 8 * 40, reorthogonalise=False)
