"""Extreme eigenpairs against dense decompositions and scipy's eigsh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from diagnostics.errors import DiagnosticsError, MemoryBudgetError
from diagnostics.estimators.lanczos import ExtremeEigenpairs, extreme_eigenpairs
from diagnostics.estimators.linear_operator import LinearOperator, MatrixOperator
from tests.helpers.matrices import Counting, spread, symmetric

ENDS = ["smallest", "largest", "both", "magnitude"]
OUTLIERS = torch.cat([spread(300) * 0.1, torch.tensor([40.0, 15.0, 14.0, -3.0, -2.5], dtype=torch.float64)])


def _expected(eigenvalues: Tensor, k: int, which: str) -> Tensor:
    ordered = eigenvalues.sort().values
    if which == "smallest":
        return ordered[:k]
    if which == "largest":
        return ordered.flip(0)[:k]
    if which == "magnitude":
        return ordered[ordered.abs().argsort(descending=True)[:k]]
    return torch.cat([ordered[:k], ordered[-k:]])


def _check(found: ExtremeEigenpairs, matrix: Tensor, expected: Tensor, slack: float) -> None:
    scale = torch.linalg.matrix_norm(matrix, 2).item()
    error = (found.values - expected.to(found.values)).abs()
    assert error.max() <= slack * scale
    assert (error <= found.residuals + slack * scale).all()
    true = torch.linalg.vector_norm(matrix @ found.vectors - found.vectors * found.values, dim=0)
    assert (true <= 1.01 * found.residuals + slack * scale).all()
    k = found.vectors.shape[1]
    identity = torch.eye(k, dtype=matrix.dtype, device=matrix.device)
    assert (found.vectors.mT @ found.vectors - identity).abs().max() <= 100 * torch.finfo(matrix.dtype).eps ** 0.5


@pytest.mark.parametrize("reorthogonalise", ["full", "selective"])
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("eigenvalues", [spread(300), OUTLIERS], ids=["normal", "outliers"])
def test_against_the_known_spectrum(
    device: torch.device, eigenvalues: Tensor, which: Any, reorthogonalise: Any
) -> None:
    full = reorthogonalise == "full"
    for dtype, slack in ((torch.float32, 2e-6 if full else 2e-5), (torch.float64, 1e-14 if full else 1e-12)):
        op = Counting(symmetric(eigenvalues, dtype=dtype, device=device))
        rtol = 100 * torch.finfo(dtype).eps if full else None
        found = extreme_eigenpairs(op, 3, which, rtol=rtol, reorthogonalise=reorthogonalise)
        assert found.converged
        assert found.products == op.columns < 150
        assert found.values.dtype == found.vectors.dtype == found.residuals.dtype == dtype
        assert found.vectors.device.type == device.type
        _check(found, op.matrix, _expected(eigenvalues, 3, which), slack)


def test_against_arpack() -> None:
    op = MatrixOperator(symmetric(spread(300, 4)))
    found = extreme_eigenpairs(op, 4, "smallest", rtol=1e-10)
    values = eigsh(op.to_scipy(), k=4, which="SA", tol=0, return_eigenvectors=False)
    assert sorted(found.values.tolist()) == pytest.approx(sorted(values.tolist()), rel=1e-12)


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("vectors", [14, 20, 30])
def test_thick_restart(which: Any, vectors: int) -> None:
    eigenvalues = spread(300)
    op = Counting(symmetric(eigenvalues))
    found = extreme_eigenpairs(op, 3, which, memory_limit=vectors * 300 * 8, max_products=1500)
    free = extreme_eigenpairs(op, 3, which)
    assert found.converged
    assert found.products > vectors  # so that it did restart
    assert found.products >= free.products
    _check(found, op.matrix, _expected(eigenvalues, 3, which), 1e-14)


@pytest.mark.parametrize("reorthogonalise", ["full", "selective"])
def test_no_ghosts_after_many_steps(reorthogonalise: Any) -> None:
    op = MatrixOperator(symmetric(OUTLIERS))
    found = extreme_eigenpairs(op, 3, "both", rtol=1e-13, max_products=200, reorthogonalise=reorthogonalise)
    _check(found, op.matrix, _expected(OUTLIERS, 3, "both"), 1e-13)
    assert found.converged == (reorthogonalise == "full")  # selective keeps half of the digits of the residuals


def test_n_steps_are_exact() -> None:
    eigenvalues = spread(12)
    op = Counting(symmetric(eigenvalues))
    found = extreme_eigenpairs(op, 12, "smallest", rtol=0)
    assert found.converged
    assert found.products == op.columns == 12
    _check(found, op.matrix, eigenvalues, 1e-14)


@pytest.mark.parametrize("memory", [2**33, 22 * 250 * 8, 14 * 250 * 8])
@pytest.mark.parametrize("which", ENDS)
def test_repeated_eigenvalues_are_found_when_verified(which: Any, memory: int) -> None:
    eigenvalues = spread(250)
    eigenvalues[1] = eigenvalues[0]
    eigenvalues[-2] = eigenvalues[-1]
    op = MatrixOperator(symmetric(eigenvalues))
    found = extreme_eigenpairs(op, 2, which, verify=True, memory_limit=memory, max_products=2000)
    assert found.converged
    _check(found, op.matrix, _expected(eigenvalues, 2, which), 1e-14)


def test_a_third_copy_behind_a_larger_one_is_found() -> None:
    eigenvalues = torch.cat([spread(150), torch.tensor([-9.0, 7.0, 7.0, 7.0, 6.5], dtype=torch.float64)])
    op = MatrixOperator(symmetric(eigenvalues))
    found = extreme_eigenpairs(op, 4, "magnitude", verify=True)
    assert found.converged
    _check(found, op.matrix, torch.tensor([-9.0, 7.0, 7.0, 7.0]), 1e-14)


@pytest.mark.parametrize("reorthogonalise", ["full", "selective"])
@pytest.mark.parametrize("which", ENDS)
def test_low_rank_has_a_repeated_zero(which: Any, reorthogonalise: Any) -> None:
    eigenvalues = torch.zeros(200, dtype=torch.float64)
    eigenvalues[:15] = torch.arange(1, 16)
    op = MatrixOperator(symmetric(eigenvalues))
    found = extreme_eigenpairs(op, 3, which, verify=True, reorthogonalise=reorthogonalise)
    assert found.converged
    _check(found, op.matrix, _expected(eigenvalues, 3, which), 1e-11)


def test_an_exhausted_space_is_followed_by_another() -> None:
    # four different eigenvalues, the smallest seven times: one start sees four directions
    eigenvalues = torch.tensor([-1.0] * 7 + [2.0] * 20 + [3.0] * 20 + [5.0] * 3, dtype=torch.float64)
    op = MatrixOperator(torch.diag(eigenvalues))
    found = extreme_eigenpairs(op, 5, "smallest")
    assert found.converged
    _check(found, op.matrix, eigenvalues[:5], 1e-13)
    # with two wanted pairs at the moment of exhaustion, of which the second is not the second smallest
    _check(extreme_eigenpairs(op, 2, "smallest"), op.matrix, eigenvalues[:2], 1e-13)
    both = extreme_eigenpairs(op, 3, "both")
    _check(both, op.matrix, torch.tensor([-1, -1, -1, 5, 5, 5]), 1e-13)
    identity = extreme_eigenpairs(MatrixOperator(torch.eye(100)), 4, "largest")
    assert identity.converged
    assert identity.products <= 6
    assert (identity.values - 1).abs().max() < 1e-6
    zero = extreme_eigenpairs(MatrixOperator(torch.zeros(100, 100)), 2)
    assert zero.converged
    assert not zero.values.any()


def test_start_at_an_eigenvector_does_not_hide_the_others() -> None:
    eigenvalues = spread(100)
    op = MatrixOperator(torch.diag(eigenvalues))
    start = torch.zeros(100, dtype=torch.float64)
    start[50] = 2  # an interior one: the space is exhausted at once
    found = extreme_eigenpairs(op, 2, start=start)
    assert found.converged
    _check(found, op.matrix, eigenvalues[:2], 1e-14)


def test_warm_start() -> None:
    matrix = symmetric(spread(400))
    cold = extreme_eigenpairs(MatrixOperator(matrix), rtol=1e-5)
    nearby = matrix + 1e-7 * symmetric(spread(400, 1), 1)
    warm = extreme_eigenpairs(MatrixOperator(nearby), rtol=1e-5, start=cold.vectors[:, 0])
    assert warm.converged
    assert warm.products < cold.products  # not by much: nothing may have overtaken the eigenvector
    assert warm.values.item() == pytest.approx(torch.linalg.eigvalsh(nearby)[0].item(), rel=1e-8)


class _Diagonal(LinearOperator):
    def __init__(self, values: Tensor) -> None:
        super().__init__((len(values), len(values)), values.dtype, values.device, symmetric=True)
        self.values = values

    def matmat(self, vectors: Tensor) -> Tensor:
        return self.values[:, None] * vectors


def _rare(name: str, n: int) -> Tensor:
    """Spectra of which a random vector contains next to nothing at the lower end."""
    few = torch.logspace(2, 0, 10, dtype=torch.float64)
    values = torch.zeros(n, dtype=torch.float64)
    if name == "rank two":
        values[:2] = torch.tensor([172.0, -27.0])
    elif name == "low rank":
        values[:11] = torch.cat([few, torch.tensor([-0.1])])
    elif name == "low rank on a ridge":
        values[:] = 0.01
        values[:11] = torch.cat([few, torch.tensor([-0.1])])
    elif name == "small bulk":
        values[:] = 1e-3 * spread(n)
        values[:11] = torch.cat([few, torch.tensor([-0.5])])
    else:
        values[:] = torch.linspace(0, 0.1, n)
        values[:23] = torch.cat([torch.linspace(1, 50, 20), torch.tensor([-1.0, -0.9, -0.8])])
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["rank two", "low rank", "low rank on a ridge", "small bulk", "outliers"])
@pytest.mark.parametrize("n", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_small_negative_eigenvalue_is_found_beside_large_positive_ones(n: int, name: str, dtype: torch.dtype) -> None:
    op = _Diagonal(_rare(name, n).to(dtype))
    smallest, largest = op.values.min().item(), op.values.max().item()
    for seed in range(3):
        for rtol in (1e-2, None):
            generator = torch.Generator().manual_seed(seed)
            found = extreme_eigenpairs(op, which="smallest", rtol=rtol, max_products=60, generator=generator)
            assert found.converged
            assert found.values.item() == pytest.approx(smallest, rel=1e-3)
            both = extreme_eigenpairs(op, which="both", rtol=rtol, max_products=60, generator=generator)
            assert both.converged
            assert both.values.tolist() == pytest.approx([smallest, largest], rel=1e-3)


def test_too_few_products_for_a_small_eigenvalue_are_no_convergence() -> None:
    op = _Diagonal(_rare("outliers", 1000))
    for most in range(1, 12):
        found = extreme_eigenpairs(op, which="smallest", rtol=1e-2, max_products=most)
        assert not found.converged or found.values.item() == pytest.approx(-1, rel=0.02)
        assert found.values.item() > -1 - 1e-12  # a Ritz value is a curvature that the matrix has


def test_a_negative_eigenvalue_below_the_rounding_of_a_coupling_is_found() -> None:
    values = torch.zeros(1_000_000)
    values[0], values[1] = 172, -0.1
    for seed in range(3):
        found = extreme_eigenpairs(_Diagonal(values), generator=torch.Generator().manual_seed(seed))
        assert found.converged
        assert found.values.item() == pytest.approx(-0.1, rel=1e-3)


def test_a_start_that_has_been_overtaken_is_left() -> None:
    values = torch.cat([torch.linspace(-1, 4, 400, dtype=torch.float64), torch.tensor([-3.0, -2.9])])
    start = torch.zeros(402, dtype=torch.float64)
    start[-1] = 1  # -2.9, which was the smallest, to a residual of 1e-4
    start[100] = 1e-4
    found = extreme_eigenpairs(_Diagonal(values), rtol=1e-3, start=start)
    assert found.converged
    assert found.values.item() == pytest.approx(-3, rel=1e-3)


def test_what_is_smaller_than_the_floor_needs_no_relative_accuracy() -> None:
    op = _Diagonal(torch.linspace(1e-4, 1, 2000, dtype=torch.float64))
    exact = extreme_eigenpairs(op, which="smallest", rtol=1e-3)
    enough = extreme_eigenpairs(op, which="smallest", rtol=1e-3, floor=1e-2)
    assert enough.converged
    assert enough.products < exact.products
    assert 1e-4 < enough.values.item() <= 1e-4 + 1e-2


def test_not_converged_is_said() -> None:
    op = Counting(symmetric(spread(400)))
    found = extreme_eigenpairs(op, 2, max_products=10)
    assert not found.converged
    assert found.products == op.columns == 10
    assert (found.residuals > 1e-8).all()
    assert "not converged" in str(found)
    eigenvalues = spread(400)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (eigenvalues - value).abs().min() <= residual
    assert not extreme_eigenpairs(op, 2, verify=True, max_products=50).converged  # no products left to verify


def test_randomness() -> None:
    op = MatrixOperator(symmetric(spread(100)))
    before = torch.get_rng_state()
    first, again = (extreme_eigenpairs(op, max_products=5) for _ in range(2))
    other = extreme_eigenpairs(op, max_products=5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.values == again.values != other.values


def test_bad_input() -> None:
    op = MatrixOperator(symmetric(spread(30)))
    for options, message in [
        ({"which": "middle"}, "which is"),
        ({"k": 0}, "between 1 and 30"),
        ({"k": 31}, "between 1 and 30"),
        ({"k": 16, "which": "both"}, "between 1 and 15"),
        ({"rtol": -1e-9}, "at least 0"),
        ({"floor": -1e-9}, "at least 0"),
        ({"k": 5, "max_products": 4}, "must be at least 5"),
        ({"k": 5, "max_products": 9, "reorthogonalise": "selective"}, "must be at least 10"),
        ({"reorthogonalise": "none"}, "reorthogonalise is"),
    ]:
        with pytest.raises(ValueError, match=message):
            extreme_eigenpairs(op, **options)  # type: ignore[arg-type]
    with pytest.raises(DiagnosticsError, match="not symmetric"):
        extreme_eigenpairs(MatrixOperator(torch.triu(torch.ones(5, 5))))
    with pytest.raises(DiagnosticsError, match="not square"):
        extreme_eigenpairs(MatrixOperator(torch.ones(5, 6)))
    with pytest.raises(DiagnosticsError, match="start must be a vector"):
        extreme_eigenpairs(op, start=torch.ones(30))
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(DiagnosticsError, match="finite vector that is not zero"):
            extreme_eigenpairs(op, start=torch.full((30,), value, dtype=torch.float64))
    with pytest.raises(DiagnosticsError, match=r"product 7 of Counting 60 × 60.* is not finite"):
        extreme_eigenpairs(Counting(symmetric(spread(60)), bad=7))
    with pytest.raises(MemoryBudgetError, match="fewer pairs"):
        extreme_eigenpairs(op, 3, memory_limit=6 * 30 * 8)
    with pytest.raises(MemoryBudgetError, match='reorthogonalise="full"'):
        extreme_eigenpairs(op, 3, memory_limit=20 * 30 * 8, reorthogonalise="selective")
