"""Estimates of all blocks of a dense matrix that is given by products, against the blocks themselves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diagnostics.errors import MemoryBudgetError
from diagnostics.matrix_free.pair_estimates import Sampling, estimate_pairs
from diagnostics.matrix_free.pair_products import Responses

F64 = torch.float64
SIZES = (9, 12, 4)
SAMPLES = 2
STREAMED = {"deflate": 0, "spectral_rounds": 0}


class _Dense:
    """Blocks of the matrices ``H = G + T``, ``(S, Σd, Σd)``."""

    def __init__(self, gn: Tensor, tensor: Tensor, sizes: Sequence[int] = SIZES) -> None:
        self.names = tuple("abcdef"[: len(sizes)])
        self.samples, self.like = len(gn), gn
        self.parts = {"G": gn, "T": tensor, "H": gn + tensor}
        self._sizes = dict(zip(self.names, sizes, strict=True))
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._at = {name: slice(*pair) for name, pair in zip(self.names, pairwise(ends), strict=True)}
        self.columns = 0

    def size(self, name: str) -> int:
        return self._sizes[name]

    def block(self, part: str, v: str, w: str) -> Tensor:
        return self.parts[part][:, self._at[v], self._at[w]]

    def _times(self, part: str, w: str, vectors: Tensor) -> dict[str, Tensor]:
        return {v: self.block(part, v, w) @ vectors for v in self.names}

    def respond(self, w: str, vectors: Tensor) -> Responses:
        self.columns += vectors.shape[2]
        return Responses(vectors, self._times("G", w, vectors), self._times("T", w, vectors))

    def total(self, w: str, vectors: Tensor) -> dict[str, Tensor]:
        return self._times("H", w, vectors)

    def of_blocks(self, function: Any, part: str) -> Tensor:
        rows = [torch.stack([function(self.block(part, v, w)) for w in self.names]) for v in self.names]
        return torch.stack(rows)  # (n, n, S)


def _matrices(rank: int | None = None, tensor_size: float = 0.5) -> _Dense:
    generator = torch.Generator().manual_seed(0)
    n = sum(SIZES)
    parts = []
    for scale in (1.0, tensor_size):
        root = torch.randn(SAMPLES, n, rank or n, dtype=F64, generator=generator)
        signs = torch.where(torch.arange(rank or n) % 2 == 0, 1.0, -1.0).double() if scale != 1 else 1.0
        parts.append(scale * (root * signs) @ root.mT / n)
    return _Dense(*parts)


def _sampling(probes: int, **options: Any) -> Sampling:
    given = {"distribution": "rademacher", "deflate": 2, "spectral_tolerance": 1e-9, "spectral_rounds": 30, **options}
    return Sampling(probes, **given)


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _squares(block: Tensor) -> Tensor:
    return block.square().sum((1, 2))


def _two_norm(block: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(block, 2)


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["kept", "streamed"])
def test_all_unit_vectors_give_the_blocks_norms_without_an_error(options: dict[str, Any]) -> None:
    pairs = _matrices()
    found = estimate_pairs(pairs, _sampling(12, **options), _seed(0))
    for part in "HGT":
        full, without = found.squares[part]
        assert torch.allclose(full, pairs.of_blocks(_squares, part), rtol=1e-12)
        assert torch.equal(without, full.unsqueeze(-1).expand(-1, -1, -1, 12))
    assert torch.allclose(found.spectral, pairs.of_blocks(_two_norm, "H"), rtol=1e-10)
    assert found.missing.abs().max() < 1e-12
    assert pairs.columns == sum(SIZES)
    table = found.table(torch.ones(3, 3), products=7, passes=5)
    resonance = pairs.of_blocks(_squares, "H").sqrt()
    diagonal = resonance.diagonal().mT.sqrt()  # (n, S)
    expected = {
        "resonance": resonance,
        "gn_norm": pairs.of_blocks(_squares, "G").sqrt(),
        "tensor_norm": pairs.of_blocks(_squares, "T").sqrt(),
        "coupling": resonance / (diagonal[:, None] * diagonal[None]),
        "stable_rank": (resonance / pairs.of_blocks(_two_norm, "H")).square(),
    }
    assert table.standard_errors is not None
    for name, values in expected.items():
        assert torch.allclose(getattr(table, name), values.mean(2), rtol=1e-9), name
        assert (getattr(table.standard_errors, name) <= 1e-9 * values.mean(2)).all(), name
    assert (table.standard_errors.products, table.standard_errors.passes) == (7, 5)


def test_each_probe_is_a_sample_of_either_triangle() -> None:
    """Without deflation: ``‖A[v,w] r‖²`` for r at w and ``‖A[w,v] s‖²`` for s at v, by the same generator, averaged.

    The node with four entries is given all unit vectors: its pairs are exact from its side alone.
    """
    pairs, sampling, m = _matrices(), _sampling(5, **STREAMED), 5
    found = estimate_pairs(pairs, sampling, _seed(4))
    generator = _seed(4)
    drawn = {w: sampling.draw(pairs, w, generator) for w in pairs.names}
    assert torch.equal(drawn["c"], torch.eye(4, dtype=F64).expand(SAMPLES, 4, 4))
    for part in "HGT":
        full, without = found.squares[part]
        for i, v in enumerate(pairs.names):
            for j, w in enumerate(pairs.names):
                block = pairs.block(part, v, w)
                if "c" in (v, w):
                    exact = _squares(block)
                    assert torch.allclose(full[i, j], exact, rtol=1e-12)
                    assert torch.allclose(without[i, j], exact[:, None].expand(-1, m), rtol=1e-12)
                    continue
                samples = ((block @ drawn[w]).square().sum(1) + (block.mT @ drawn[v]).square().sum(1)) / 2  # (S, m)
                assert torch.allclose(full[i, j], samples.mean(1), rtol=1e-12)
                for k in range(m):
                    rest = samples[:, [n for n in range(m) if n != k]].mean(1)
                    assert torch.allclose(without[i, j, :, k], rest, rtol=1e-12)


def test_directions_that_hold_a_matrix_of_low_rank_make_it_exact() -> None:
    pairs = _matrices(rank=2)  # of G and T each: the responses span four directions
    exact = {part: pairs.of_blocks(_squares, part) for part in "HGT"}
    for deflate, level in ((4, 1e-10), (1, None)):
        found = estimate_pairs(pairs, _sampling(5, deflate=deflate), _seed(1))
        for part in "HGT":
            full, without = found.squares[part]
            if level is None:
                assert ((full - exact[part]).abs() > 1e-3 * exact[part]).any(), part
            else:
                assert torch.allclose(full, exact[part], rtol=level), part
                assert torch.allclose(without, exact[part].unsqueeze(-1).expand_as(without), rtol=level), part


@pytest.mark.parametrize("options", [{"deflate": 1}, STREAMED], ids=["kept", "streamed"])
def test_a_known_gauss_newton_part_is_taken_as_it_is_and_takes_its_error_away(options: dict[str, Any]) -> None:
    """Without a tensor part H is G: what the probes say of it is wholly explained."""
    pairs = _matrices(tensor_size=0.0)
    exact = pairs.of_blocks(_squares, "G")
    alone = estimate_pairs(pairs, _sampling(5, **options), _seed(2)).squares["H"][0]
    found = estimate_pairs(pairs, _sampling(5, **options), _seed(2), exact)
    assert (alone - exact).abs().max() > 1e-3 * exact.max()
    for part in "HG":
        full, without = found.squares[part]
        assert torch.allclose(full, exact, rtol=1e-9)
        assert torch.allclose(without, exact.unsqueeze(-1).expand_as(without), rtol=1e-9)
    assert not found.squares["T"][0].any()


def test_the_control_is_a_line_through_the_samples_at_the_known_norm() -> None:
    """By least squares: the samples of H and T over those of G, at ``‖G[v,w]‖²``; and again without each probe."""
    pairs, sampling, m = _matrices(), _sampling(6, **STREAMED), 6
    exact = pairs.of_blocks(_squares, "G")
    found = estimate_pairs(pairs, sampling, _seed(6), exact)
    generator = _seed(6)
    drawn = {w: sampling.draw(pairs, w, generator) for w in pairs.names}

    def samples(part: str, v: str, w: str) -> Tensor:
        block = pairs.block(part, v, w)
        return ((block @ drawn[w]).square().sum(1) + (block.mT @ drawn[v]).square().sum(1)) / 2  # (S, m)

    def at_known(part: str, kept: list[int], s: int, i: int, j: int) -> float:
        names = pairs.names[i], pairs.names[j]
        control = samples("G", *names)[s, kept] - exact[i, j, s]
        design = torch.stack([torch.ones_like(control), control], 1)
        line = torch.linalg.lstsq(design, samples(part, *names)[s, kept].unsqueeze(1)).solution
        return max(0.0, line[0].item())

    for part in "HT":
        full, without = found.squares[part]
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the third node has all unit vectors
            for s in range(SAMPLES):
                assert full[i, j, s].item() == pytest.approx(at_known(part, list(range(m)), s, i, j), rel=1e-8)
                for k in range(m):
                    kept = [n for n in range(m) if n != k]
                    assert without[i, j, s, k].item() == pytest.approx(at_known(part, kept, s, i, j), rel=1e-8)


def test_spectral_norms_are_bounds_from_below_that_iterations_reach() -> None:
    pairs = _matrices()
    true = pairs.of_blocks(_two_norm, "H")
    rough = estimate_pairs(pairs, _sampling(3, **STREAMED), _seed(3))
    fine = estimate_pairs(pairs, _sampling(3), _seed(3))
    assert (rough.spectral <= true * (1 + 1e-12)).all()
    assert (rough.spectral < 0.99 * true).any()
    assert torch.allclose(fine.spectral, true, rtol=1e-6)
    assert (fine.missing <= 1e-6).all()
    assert (rough.missing > 1e-3).any()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_have_unit_variance_and_the_generator_decides(distribution: Any) -> None:
    pairs = _matrices()
    sampling = _sampling(8, distribution=distribution)
    drawn = sampling.draw(pairs, "b", _seed(0))
    assert drawn.shape == (SAMPLES, 12, 8)
    assert torch.equal(drawn, sampling.draw(pairs, "b", _seed(0)))
    assert not torch.equal(drawn, sampling.draw(pairs, "b", _seed(1)))
    values = torch.cat([sampling.draw(pairs, "b", _seed(s)).flatten() for s in range(50)])  # 9600 of them
    assert values.mean().abs() < 4 / len(values) ** 0.5
    assert (values.square().mean() - 1).abs() < 4 * (2 / len(values)) ** 0.5
    assert (values.abs() == 1).all() == (distribution == "rademacher")


def test_sampling_is_reduced_to_what_fits() -> None:
    sampling, sizes = Sampling(30, "rademacher", 10, 1e-2, 20), [100, 50, 80]
    assert sampling.within(sizes, 8, sampling.planned_bytes(sizes, 8)) == sampling
    for limit in range(27 * 230 * 8, sampling.planned_bytes(sizes, 8), 997):
        fitting = sampling.within(sizes, 8, limit)
        assert fitting.planned_bytes(sizes, 8) <= limit
        assert fitting.streams
        more = Sampling(fitting.probes + 1, "rademacher", 0, 1e-2, 0)
        assert fitting.probes == 30 or more.planned_bytes(sizes, 8) > limit
    with pytest.raises(MemoryBudgetError, match="with 3 probes each"):
        sampling.within(sizes, 8, 27 * 230 * 8 - 1)
