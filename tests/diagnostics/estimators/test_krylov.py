"""The Krylov space: its relation to the matrix, restarts, and how far out a missed eigenvalue may lie; densely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from diagnostics.estimators.krylov import CHANCE, Krylov
from diagnostics.estimators.linear_operator import MatrixOperator
from diagnostics.estimators.probes import Products
from tests.helpers.matrices import Counting, spread, symmetric

F64 = torch.float64


def _space(matrix: Tensor, steps: int, **options: Any) -> Krylov:
    given = {"wanted": 1, "reorthogonalise": "full", "memory_limit": 2**30, "start": None, **options}
    return Krylov(Products(MatrixOperator(matrix)), steps=steps, generator=torch.Generator().manual_seed(0), **given)


def test_each_step_is_one_product_and_the_projection_is_tridiagonal() -> None:
    """``A Vᵀ = Vᵀ T + v cᵀ`` with orthonormal V, from the given start on; T's entries outside of the band are zero."""
    op = Counting(symmetric(spread(40)))
    start = torch.ones(40, dtype=F64) / 40**0.5
    space = Krylov(
        Products(op), wanted=1, steps=40, reorthogonalise="full", memory_limit=2**30,
        generator=torch.Generator().manual_seed(0), start=start,
    )  # fmt: skip
    for size in range(1, 16):
        space.step()
        assert (space.size, op.columns, space.full) == (size, size, False)
    basis, projected = space._basis[:15], space._projected[:15, :15]
    assert torch.equal(basis[0], start)
    assert torch.allclose(basis @ basis.mT, torch.eye(15, dtype=F64), rtol=0, atol=1e-14)
    assert torch.allclose(basis @ op.matrix @ basis.mT, projected, rtol=0, atol=1e-13)
    assert not projected.triu(2).any()
    assert not projected.tril(-2).any()
    residual = basis @ op.matrix - projected @ basis - torch.outer(space._coupling, space._next)
    assert residual.abs().max() < 1e-13


def test_residuals_of_ritz_pairs_are_those_of_the_vectors() -> None:
    matrix = symmetric(spread(50))
    space = _space(matrix, 50)
    for _ in range(20):
        space.step()
    ritz = space.ritz()
    vectors = space.vectors(ritz, torch.arange(20))
    assert torch.allclose(vectors.mT @ vectors, torch.eye(20, dtype=F64), rtol=0, atol=1e-13)
    assert torch.allclose((vectors.mT @ matrix @ vectors).diagonal(), ritz.values, rtol=0, atol=1e-13)
    true = torch.linalg.vector_norm(matrix @ vectors - vectors * ritz.values, dim=0)
    assert torch.allclose(true, ritz.residuals, rtol=1e-8, atol=1e-12)


def test_a_start_in_an_invariant_space_exhausts_it_and_a_random_one_follows() -> None:
    """Of two eigenvectors: after two steps their space is complete; all steps together are the whole matrix."""
    values = torch.arange(1.0, 9.0, dtype=F64)
    space = _space(torch.diag(values), 8, start=torch.tensor([0.6, 0, 0, 0.8, 0, 0, 0, 0], dtype=F64))
    space.step()
    assert not space.exhausted
    space.step()
    assert space.exhausted
    assert torch.allclose(space.ritz().values, values[[0, 3]], rtol=1e-14)
    while not space.full:
        space.step()
    assert torch.allclose(space.ritz().values, values, rtol=1e-13)


def test_beginning_again_keeps_what_has_converged_and_is_orthogonal_to_it() -> None:
    matrix = symmetric(torch.cat([spread(30) * 0.01, torch.tensor([5.0, 9.0], dtype=F64)]))
    space = _space(matrix, 32)
    for _ in range(12):
        space.step()
    ritz = space.ritz()
    kept = torch.tensor([10, 11])
    vectors = space.vectors(ritz, kept)
    space.begin_again(ritz, kept)
    assert space.size == 2
    assert (vectors.mT @ space._next).abs().max() < 1e-14
    for _ in range(6):
        space.step()
    basis = space._basis[:8]
    assert torch.allclose(basis @ basis.mT, torch.eye(8, dtype=F64), rtol=0, atol=1e-13)
    assert torch.allclose(space.ritz().values[-2:], torch.tensor([5.0, 9.0], dtype=F64), rtol=1e-12)


def test_the_capacity_is_what_fits_and_less_than_needed_is_refused() -> None:
    matrix = symmetric(spread(60))
    assert _space(matrix, 30).capacity == 30
    assert _space(matrix, 30, memory_limit=13 * 60 * 8).capacity == 12
    with pytest.raises(MemoryBudgetError, match="a basis of 6 vectors takes"):
        _space(matrix, 30, wanted=2, memory_limit=6 * 60 * 8)


def test_thick_restart_keeps_the_lanczos_relation() -> None:
    matrix = symmetric(spread(60))
    products = Products(MatrixOperator(matrix))
    generator = torch.Generator().manual_seed(0)
    space = Krylov(
        products,
        wanted=2,
        steps=60,
        reorthogonalise="full",
        memory_limit=13 * 60 * 8,
        generator=generator,
        start=None,
    )
    assert space.capacity == 12
    for _ in range(3):
        while not space.full:
            space.step()
        basis = space._basis[: space.size]
        projected = space._projected[: space.size, : space.size]
        assert (basis @ basis.mT - torch.eye(12, dtype=torch.float64)).abs().max() < 1e-14
        assert (basis @ matrix @ basis.mT - projected).abs().max() < 1e-13
        residual = basis @ matrix - projected @ basis - torch.outer(space._coupling, space._next)
        assert residual.abs().max() < 1e-13
        space.restart(space.ritz(), torch.tensor([0, 1, 2, 10, 11]))


def test_selective_keeps_half_the_digits_of_orthogonality_where_none_loses_it() -> None:
    outliers = torch.cat([spread(300) * 0.1, torch.tensor([40.0, 15.0, 14.0, -3.0, -2.5], dtype=torch.float64)])
    matrix = symmetric(outliers)

    def basis(reorthogonalise: Any) -> tuple[Krylov, float]:
        space = Krylov(
            Products(MatrixOperator(matrix)),
            wanted=2,
            steps=120,
            reorthogonalise=reorthogonalise,
            memory_limit=2**30,
            generator=torch.Generator().manual_seed(0),
            start=None,
        )
        for _ in range(120):
            space.step()
        rows = space._basis[:120]
        return space, (rows @ rows.mT - torch.eye(120, dtype=torch.float64)).abs().max().item()

    space, level = basis("selective")
    assert 1e-13 < level < 1e-6  # less than full, and enough
    assert 0 < len(space._locked) < 120
    assert basis("full")[1] < 1e-14
    top = space.ritz().values[-3:]
    assert top.tolist() == pytest.approx([14, 15, 40], rel=1e-13)  # no ghosts


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("steps", [2, 5, 15, 40])
@pytest.mark.parametrize("restarts", [False, True])
def test_no_eigenvector_of_the_start_lies_beyond_the_frontier(steps: int, sign: int, restarts: bool) -> None:
    """With the share that a start really has of the outermost eigenvector in place of the one it has by chance."""
    for seed in range(5):
        values = torch.cat([spread(150, seed), torch.tensor([-6.0, 5.0], dtype=torch.float64)])
        outermost = int((sign * values).argmin())
        for share in (1e-1, 1e-5, 1e-9):
            start = torch.randn(152, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            start[outermost] = 0
            start /= start.norm()
            start[outermost] = share
            space = Krylov(
                Products(MatrixOperator(torch.diag(values))),
                wanted=1,
                steps=152,
                reorthogonalise="full",
                memory_limit=2**30 if not restarts else 13 * 152 * 8,
                generator=torch.Generator().manual_seed(0),
                start=start / start.norm(),
                noise=share / (CHANCE * (torch.pi / 2 / 152) ** 0.5),
            )
            for _ in range(steps):
                if space.full:
                    space.restart(space.ritz(), torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]))
                space.step()
            value, distance = space.frontier(sign)
            slack = 1.1 if restarts else 1 + 1e-9
            assert sign * value - distance * slack <= sign * values[outermost].item() + 1e-12
