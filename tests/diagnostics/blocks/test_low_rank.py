"""Truncated blocks against NumPy's singular value decomposition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

import diagnostics
from diagnostics.blocks.low_rank import discarded, kept_rank, low_rank
from tests.helpers.networks import Diamond, ResidualCat


def _wavy(z: Tensor) -> Tensor:
    return (torch.sin(z) * z).mean()


@pytest.fixture
def blocks(device: torch.device) -> diagnostics.HessianBlocks:
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, device=device)
    return diagnostics.hessian_blocks(diagnostics.capture(ResidualCat().double().to(device), x, _wavy))


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_truncation_to_a_rank_is_the_best_approximation_and_knows_its_error(
    blocks: diagnostics.HessianBlocks, rank: int
) -> None:
    exact = blocks.mean().total
    approximate = low_rank(exact, rank=rank)
    for v, w in exact:
        u, values, vt = np.linalg.svd(exact[v, w].cpu().numpy())
        best = (u[:, :rank] * values[:rank]) @ vt[:rank] if rank < len(values) else exact[v, w].cpu().numpy()
        tail = np.sqrt((values[rank:] ** 2).sum())
        block = approximate.factors(v, w)
        scale = values[0]
        assert block.rank == min(rank, len(values))
        assert np.abs(approximate[v, w].cpu().numpy() - best).max() < 1e-12 * scale
        assert block.error(exact[v, w]).item() == pytest.approx(tail, rel=1e-10, abs=1e-14 * scale)
        assert block.bound.item() == pytest.approx(tail, rel=1e-10, abs=1e-14 * scale)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_a_tolerance_gets_the_least_rank_that_keeps_it(blocks: diagnostics.HessianBlocks, tolerance: float) -> None:
    exact = blocks.mean().total
    approximate = low_rank(exact, tolerance=tolerance)
    cut = 0
    for v, w in exact:
        block = approximate.factors(v, w)
        norm = exact[v, w].norm()
        assert block.error(exact[v, w]) <= tolerance * norm * (1 + 1e-12)
        values = np.linalg.svd(exact[v, w].cpu().numpy(), compute_uv=False)
        assert np.sqrt((values[block.rank - 1 :] ** 2).sum()) > tolerance * norm.item()  # one less is too few
        cut += block.rank < len(values)
    assert cut > 0


def test_every_sample_keeps_the_tolerance(blocks: diagnostics.HessianBlocks) -> None:
    approximate = low_rank(blocks.total, tolerance=0.2)
    for v, w in blocks.total:
        block = approximate.factors(v, w)
        error = block.error(blocks.total[v, w])
        assert error.shape == block.bound.shape == (6,)
        assert (error <= 0.2 * torch.linalg.matrix_norm(blocks.total[v, w]) * (1 + 1e-12)).all()
        assert torch.allclose(error, block.bound, rtol=1e-10, atol=1e-16)
        assert v == w or torch.equal(approximate[v, w], approximate[w, v].mT)
    assert torch.allclose(approximate.mean().assemble(), approximate.assemble().sum(0), rtol=1e-12, atol=1e-16)
    averaged = low_rank(blocks.mean().total, rank=2)
    assert torch.equal(averaged.mean().assemble(), averaged.assemble())


def test_singular_values_whose_squares_underflow_are_still_counted() -> None:
    values = torch.tensor([3e-30, 4e-30, 0.0]).sort(descending=True).values  # float32: squares are 0
    assert discarded(values).tolist() == pytest.approx([5e-30, 3e-30, 0, 0])
    assert kept_rank(values, tolerance=0.5) == 2
    assert kept_rank(values, tolerance=0.7) == 1
    assert kept_rank(values, tolerance=0.0) == 2
    assert kept_rank(torch.zeros(2, 3), tolerance=0.0) == 0
    assert kept_rank(values, rank=7) == kept_rank(values) == 3


def test_a_zero_block_has_rank_zero() -> None:
    torch.manual_seed(0)
    graph = diagnostics.capture(Diamond().double(), torch.randn(3, 5, dtype=torch.float64), lambda z: z.sum())
    gn = diagnostics.hessian_blocks(graph).mean().gn
    approximate = low_rank(gn, tolerance=0.1)
    assert approximate.factors("stem", "merge").rank == 0
    assert torch.equal(approximate["stem", "merge"], gn["stem", "merge"])


def test_rank_or_tolerance_must_be_given(blocks: diagnostics.HessianBlocks) -> None:
    for arguments in ({}, {"rank": 1, "tolerance": 0.1}):
        with pytest.raises(ValueError, match="give either rank or tolerance"):
            low_rank(blocks.total, **arguments)
    with pytest.raises(ValueError, match="rank must not be negative"):
        low_rank(blocks.total, rank=-1)
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        low_rank(blocks.total, tolerance=float("nan"))


def test_the_table_sets_errors_beside_bounds(blocks: diagnostics.HessianBlocks) -> None:
    exact = blocks.total
    table = low_rank(exact, rank=2).compare(exact)
    assert table.nodes == exact.nodes
    i, j = 0, 3
    block = low_rank(exact, rank=2).factors("stem", "merge")
    assert table.rank[i, j] == table.rank[j, i] == 2
    difference = exact["stem", "merge"] - block.left @ block.right.mT
    assert table.error[i, j].item() == pytest.approx(difference.norm().item(), rel=1e-12)
    assert table.norm[j, i].item() == pytest.approx(exact["stem", "merge"].norm().item(), rel=1e-12)
    assert (table.error <= table.bound * (1 + 1e-9) + 1e-15).all()
    lines = str(table).splitlines()
    assert lines[0].split() == ["v", "w", "rank", "error", "bound", "|H|"]
    assert len(lines) == 2 + 15
    assert json.loads(json.dumps(table.to_dict()))["rank"] == table.rank.tolist()
