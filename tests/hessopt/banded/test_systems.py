"""Solves with the completion of a band, in the space of samples and in that of parameters, against dense inverses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from hessopt import BandedNewton
from hessopt.banded.systems import ParameterSystem, SampleSystem, banded_operations
from hessopt.errors import SolveError
from hessopt.factors.sample_factors import DenseFactor
from hessopt.network.cliques import Cliques, band_cliques
from tests.helpers.kronecker_reference import batch, dags, dense, factors_of, flat, losses, regression, unflat

F64 = torch.float64
RTOL = 1e-8
ROWS = 7
SHAPES = [[torch.Size((2, 2)), torch.Size((2,))], [torch.Size((3, 2))], [torch.Size((1, 2)), torch.Size((1,))]]
DAMPING = [[0.05, 0.4], [0.2], [0.1, 0.3]]
SIZES = [6, 6, 3]


def _chain(bandwidth: Any) -> Cliques:
    index = np.arange(3.0)
    return band_cliques(np.abs(index[:, None] - index), bandwidth)


def _factors(seed: int = 0) -> tuple[list[Tensor], list[DenseFactor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(ROWS, size, dtype=F64, generator=generator) for size in SIZES]
    return rows, [DenseFactor(j, tuple(shapes)) for j, shapes in zip(rows, SHAPES, strict=True)]


def _completion_inverse(rows: Sequence[Tensor], cliques: Cliques) -> Tensor:
    """The sum over cliques minus that over separators of the inverses of principal blocks, padded with zeros."""
    diagonal = [torch.full(shape, d, dtype=F64).flatten() for own in zip(SHAPES, DAMPING, strict=True)
                for shape, d in zip(*own, strict=True)]  # fmt: skip
    joined = torch.cat(list(rows), 1)
    matrix = joined.mT @ joined + torch.diag(torch.cat(diagonal))
    offsets = np.cumsum([0, *SIZES])
    inverse = torch.zeros_like(matrix)
    for members, sign in [*((c, 1) for c in cliques.cliques), *((s, -1) for s in cliques.separators)]:
        at = torch.cat([torch.arange(int(offsets[v]), int(offsets[v + 1])) for v in members])
        inverse[at[:, None], at] += sign * torch.linalg.inv(matrix[at[:, None], at])
    return inverse


@pytest.mark.parametrize("kind", [SampleSystem, ParameterSystem])
@pytest.mark.parametrize("bandwidth", [0, 1, 2, "full"])
@pytest.mark.parametrize("from_residuals", [False, True])
def test_solve_is_the_inverse_of_the_completion(kind: Any, bandwidth: Any, from_residuals: bool) -> None:
    """Of a gradient that is no ``Ĵᵀ r``, or of one that is, with r given."""
    rows, factors = _factors()
    cliques = _chain(bandwidth)
    inverse = _completion_inverse(rows, cliques)
    generator = torch.Generator().manual_seed(3)
    residuals = torch.randn(ROWS, dtype=F64, generator=generator) if from_residuals else None
    gradient = (
        torch.randn(sum(SIZES), dtype=F64, generator=generator)
        if residuals is None
        else torch.cat(rows, 1).mT @ residuals
    )
    like = [[torch.zeros(shape, dtype=F64) for shape in own] for own in SHAPES]
    found = kind(factors, SHAPES, 2**30).solve(unflat(gradient, like), DAMPING, cliques, residuals)
    assert [[t.shape for t in own] for own in found] == SHAPES
    assert torch.allclose(flat(found), inverse @ gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [SampleSystem, ParameterSystem])
def test_one_system_serves_several_dampings_and_bandwidths(kind: Any) -> None:
    """What is kept of the first solve is nothing that depends on its damping; nor is kept what does not fit."""
    _, factors = _factors()
    like = [[torch.ones(shape, dtype=F64) for shape in own] for own in SHAPES]
    limits = [2**30, 4 * ROWS**2 * 8] if kind is SampleSystem else [2**30]  # one clique at a time, and no Gram matrix
    systems = [kind(factors, SHAPES, limit) for limit in limits]
    for factor, bandwidth in ((1.0, 1), (0.1, 1), (10.0, "full"), (1.0, 0)):
        damping = [[factor * 0.3] * len(own) for own in SHAPES]
        fresh = flat(kind(factors, SHAPES, 2**30).solve(like, damping, _chain(bandwidth)))
        for system in systems:
            assert torch.allclose(flat(system.solve(like, damping, _chain(bandwidth))), fresh, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [SampleSystem, ParameterSystem])
def test_norms_of_blocks(kind: Any) -> None:
    rows, factors = _factors()
    expected = torch.stack([torch.stack([torch.linalg.matrix_norm(a.mT @ b) for b in rows]) for a in rows])
    assert torch.allclose(kind(factors, SHAPES, 2**30).block_norms(), expected, rtol=1e-10)


def test_what_is_not_positive_definite_is_refused() -> None:
    _, factors = _factors()
    like = [[torch.ones(shape, dtype=F64) for shape in own] for own in SHAPES]
    negative = [[-50.0] * len(own) for own in SHAPES]
    with pytest.raises(SolveError, match=r"not positive definite in torch\.float64: the damping, at least -50"):
        ParameterSystem(factors, SHAPES, 2**30).solve(like, negative, _chain(1))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(dags(), st.sampled_from([0, 1, 2, "full"]))
def test_both_spaces_give_the_same_step(net: Any, bandwidth: Any) -> None:
    x = batch()[0]
    tape, factors = factors_of(net, x, losses(net(x).shape[1])["mse"])
    parameters = [list(layer.parameters) for layer in tape.layers]
    shapes = [[p.shape for p in own] for own in parameters]
    expected = dense(net, x, losses(net(x).shape[1])["mse"], [dict(net.named_modules())[o.name] for o in tape.layers])
    gradients = unflat(expected.gradient, parameters)
    damping = [[0.05 + 0.01 * v, 0.2][: len(own)] for v, own in enumerate(parameters)]
    cliques = band_cliques(tape.distances(), bandwidth)
    systems = [kind(factors, shapes, 2**30) for kind in (SampleSystem, ParameterSystem)]
    a, b = (flat(system.solve(gradients, damping, cliques)) for system in systems)
    assert torch.allclose(a, b, rtol=RTOL, atol=1e-12)
    again = [flat(system.solve(gradients, [[0.1] * len(own) for own in parameters], cliques)) for system in systems]
    assert torch.allclose(*again, rtol=RTOL, atol=1e-12)
    blocks = torch.stack([torch.stack([expected.ggn[s, t].norm() for t in expected.slices]) for s in expected.slices])
    for system in systems:
        assert torch.allclose(system.block_norms(), blocks, rtol=1e-7, atol=1e-9)


def test_operations() -> None:
    chain_of_two = band_cliques(np.array([[0.0, 1.0], [1.0, 0.0]]), 0)
    # six passes of 10 rows; Gram matrices and two systems 10³/3; blocks 10 P²/2 and P³/3
    assert banded_operations(10, [16, 25], chain_of_two, grams=[8.0, 12.5]) == pytest.approx(
        60 * 41 + 100 * 20.5 + 2 * 1000 / 3
    )
    blocks = 10 * (16**2 + 25**2) / 2 + (16**3 + 25**3) / 3
    assert banded_operations(10, [16, 25], chain_of_two) == pytest.approx(60 * 41 + blocks)
    whole = band_cliques(np.array([[0.0, 1.0], [1.0, 0.0]]), "full")
    assert banded_operations(10, [16, 25], whole) == pytest.approx(60 * 41 + 10 * 41**2 / 2 + 41**3 / 3)


def test_dense_memory_is_refused() -> None:
    net, closure = regression()
    with pytest.raises(MemoryBudgetError, match='Use space="sample", which curvature="ggn" has, or raise'):
        BandedNewton(net, space="parameter", memory_limit=500_000).step(closure)
    BandedNewton(net, memory_limit=500_000).step(closure)  # "auto" takes the other space
