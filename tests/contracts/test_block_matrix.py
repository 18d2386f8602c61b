"""What every matrix of blocks does, against one dense matrix ``(S, N, N)`` in float64, to 1e-12 of its norm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.blocks.containers import BlockMatrix, MeanBlocks, SumBlocks
from diagnostics.blocks.factored import CongruentBlocks, FrontBlocks, TotalJacobians
from diagnostics.blocks.gn_factors import GaussNewtonFactors, gauss_newton_factors
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.low_rank import LowRankBlock, _Truncated, low_rank
from diagnostics.graph.graph import Graph
from tests.contracts.coverage import uncovered

Reduction = Literal["mean", "sum"]
SAMPLES = 3


class Branches(nn.Module):
    """Nodes a, b and c, of which b and c read a, and c reads b too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.a(x))
        return self.c(torch.cat([a, torch.tanh(self.b(a))], 1))


def network() -> Branches:
    torch.manual_seed(0)
    return Branches().double()


def captured(reduction: Reduction = "mean") -> Graph:
    x, y = normal(SAMPLES, 3), torch.tensor([0, 2, 1])
    return diagnostics.capture(
        network(), x, lambda z: F.cross_entropy(z, y, reduction=reduction), ["a", "b", "c"], reduction=reduction
    )


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(samples: int, size: int, seed: int = 1) -> Tensor:
    a = normal(samples, size, size, seed=seed)
    return a + a.mT


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-12 * expected.norm())


class BlockMatrixContract(ABC):
    """Properties of a matrix of blocks; a subclass makes one and says what it is."""

    kind: ClassVar[type[BlockMatrix]]

    @abstractmethod
    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        """A matrix over nodes of ``graph``, and the dense one that it is: ``(S, N, N)``, batch means ``(N, N)``."""

    @pytest.fixture(params=["mean", "sum"])
    def made(self, request: pytest.FixtureRequest) -> tuple[BlockMatrix, Tensor]:
        matrix, dense = self.make(captured(request.param))
        assert type(matrix) is self.kind
        assert close(dense, dense.mT)
        return matrix, dense

    def test_blocks_are_those_of_the_dense_matrix(self, made: tuple[BlockMatrix, Tensor]) -> None:
        matrix, dense = made
        columns = matrix.layout.columns
        assert all(
            (block - dense[..., columns(v), columns(w)]).norm() <= 1e-12 * dense.norm()
            for (v, w), block in matrix.items()
        )

    def test_the_assembled_matrix_is_the_dense_one(self, made: tuple[BlockMatrix, Tensor]) -> None:
        matrix, dense = made
        assert close(matrix.assemble(), dense)

    def test_it_is_symmetric(self, made: tuple[BlockMatrix, Tensor]) -> None:
        matrix, _ = made
        scale = matrix.assemble().norm()
        assert all((block - matrix[w, v].mT).norm() <= 1e-12 * scale for (v, w), block in matrix.items())

    def test_means_are_over_the_batch(self, made: tuple[BlockMatrix, Tensor]) -> None:
        """Blocks of single samples of a mean loss carry its 1/B already."""
        matrix, dense = made
        if dense.ndim == 3:
            dense = dense.sum(0) / (SAMPLES if matrix.layout.reduction == "sum" else 1)
        mean = matrix.mean()
        assert close(mean.assemble(), dense)
        assert mean.mean() is mean

    def test_it_is_a_mapping_of_all_ordered_pairs(self, made: tuple[BlockMatrix, Tensor]) -> None:
        matrix, _ = made
        assert len(matrix) == len(matrix.nodes) ** 2
        assert list(matrix) == [(v, w) for v in matrix.nodes for w in matrix.nodes]

    def test_blocks_asked_for_twice_are_equal_and_apart(self, made: tuple[BlockMatrix, Tensor]) -> None:
        """What a block is does not change with what was asked for before."""
        matrix, dense = made
        first = {pair: block.clone() for pair, block in matrix.items()}
        matrix.mean()
        assert all(torch.equal(block, first[pair]) for pair, block in matrix.items())
        assert close(matrix.assemble(), dense)

    def test_other_addresses_are_refused(self, made: tuple[BlockMatrix, Tensor]) -> None:
        matrix, _ = made
        with pytest.raises(KeyError, match=r"no blocks for node 'missing'; there are blocks for 'a'"):
            matrix["a", "missing"]
        with pytest.raises(KeyError, match="addressed by two node names"):
            matrix["a"]  # type: ignore[index]

    def test_the_text_names_nodes_and_sizes(self, made: tuple[BlockMatrix, Tensor]) -> None:
        matrix, _ = made
        assert repr(matrix).startswith(f"{self.kind.__name__} of {len(matrix.nodes)} nodes (a: 4, b: 2, c: 3")


def congruent(layout: Layout, seed: int = 1) -> tuple[CongruentBlocks, Tensor]:
    factors = {name: normal(layout.samples, 5, layout.sizes[name], seed=seed + i) for i, name in enumerate("ac")}
    curvature = symmetric(layout.samples, 5, seed)
    whole = torch.cat([factors["a"], torch.zeros(layout.samples, 5, layout.sizes["b"]), factors["c"]], 2)
    return CongruentBlocks(layout, factors, curvature), whole.mT @ curvature @ whole


class TestCongruentBlocks(BlockMatrixContract):
    kind = CongruentBlocks

    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        """One node, b, does not reach the curvature."""
        return congruent(Layout.of(graph))


class TestFrontBlocks(BlockMatrixContract):
    kind = FrontBlocks

    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        """Fronts ``Φ_v[v, s]``, some of them absent; J by inversion: ``J = (1 − D)⁻¹``."""
        layout = Layout.of(graph)
        size = {name: layout.sizes[name] for name in layout.names}
        pairs = {"b": ["a"], "c": ["a", "b"]}
        local = {u: {p: normal(SAMPLES, size[u], size[p], seed=7) for p in pairs.get(u, ())} for u in layout.names}
        fronts = {
            "a": {"a": symmetric(SAMPLES, size["a"])},
            "b": {"a": normal(SAMPLES, size["b"], size["a"]), "b": symmetric(SAMPLES, size["b"])},
            "c": {"b": normal(SAMPLES, size["c"], size["b"]), "c": symmetric(SAMPLES, size["c"])},
        }
        steps, phi = self._whole(layout, local), self._whole(layout, fronts)
        lower = phi @ torch.linalg.inv(torch.eye(steps.shape[-1]) - steps)
        own = torch.block_diag(*(torch.ones(d, d) for d in size.values()))
        below = torch.ones_like(lower[0]).tril() * (1 - own)
        dense = lower * (own + below) + (lower * below).mT
        return FrontBlocks(layout, fronts, TotalJacobians(graph, layout, local)), dense

    @staticmethod
    def _whole(layout: Layout, blocks: dict[str, dict[str, Tensor]]) -> Tensor:
        size = sum(layout.sizes[name] for name in layout.names)
        whole = torch.zeros(SAMPLES, size, size, dtype=torch.float64)
        for u, row in blocks.items():
            for p, block in row.items():
                whole[:, layout.columns(u), layout.columns(p)] = block
        return whole


class TestSumBlocks(BlockMatrixContract):
    kind = SumBlocks

    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        layout = Layout.of(graph)
        (first, one), (second, two) = congruent(layout), congruent(layout, seed=5)
        return SumBlocks(first, second), one + two


class TestMeanBlocks(BlockMatrixContract):
    kind = MeanBlocks

    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        layout = Layout.of(graph).mean()
        dense = symmetric(1, sum(layout.sizes[name] for name in layout.names))[0]
        rows = {v: dense[layout.columns(v), : layout.width(v)] for v in layout.names}
        return MeanBlocks(layout, rows), dense


class LowRankContract(BlockMatrixContract):
    """Factors besides."""

    def test_factors_multiply_to_the_blocks(self, made: tuple[BlockMatrix, Tensor]) -> None:
        matrix, dense = made
        assert isinstance(matrix, _Truncated | GaussNewtonFactors)
        for v, w in matrix:
            factors = matrix.factors(v, w)
            assert isinstance(factors, LowRankBlock)
            assert close(factors.left @ factors.right.mT, matrix[v, w])
            exact = dense[..., matrix.layout.columns(v), matrix.layout.columns(w)]
            assert bool((factors.error(exact) <= factors.bound + 1e-12 * dense.norm()).all())


class TestTruncated(LowRankContract):
    kind = _Truncated

    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        """Of rank 1 before and after the cut."""
        layout = Layout.of(graph)
        left = {name: normal(SAMPLES, 1, layout.sizes[name]) for name in layout.names}
        whole = torch.cat(list(left.values()), 2)
        return low_rank(CongruentBlocks(layout, left, symmetric(SAMPLES, 1)), rank=1), whole.mT @ (
            symmetric(SAMPLES, 1) @ whole
        )


class TestTruncatedMeans(LowRankContract):
    kind = _Truncated

    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        """Batch means, cut nowhere."""
        matrix, dense = congruent(Layout.of(graph))
        dense = dense.sum(0) / (SAMPLES if matrix.layout.reduction == "sum" else 1)
        return low_rank(matrix.mean(), tolerance=0.0), dense


class TestGaussNewtonFactors(LowRankContract):
    kind = GaussNewtonFactors

    def make(self, graph: Graph) -> tuple[BlockMatrix, Tensor]:
        """``Jᵀ (diag(p) − p pᵀ) J`` of cross-entropy; J by differentiating the network after each node, by sample."""
        model, z = network(), graph["c"].value.detach()
        p = z.softmax(1)
        curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        curvature = curvature / (SAMPLES if graph.reduction == "mean" else 1)

        def after_a(h: Tensor) -> Tensor:
            a = torch.tanh(h)
            return model.c(torch.cat([a, torch.tanh(model.b(a))]))

        a = graph["a"].value.detach()
        b = graph["b"].value.detach()
        to_c = model.c.weight.detach()
        jacobians = [
            torch.cat([torch.func.jacrev(after_a)(a[s]), to_c[:, 4:] * (1 - torch.tanh(b[s]) ** 2), torch.eye(3)], 1)
            for s in range(SAMPLES)
        ]
        whole = torch.stack(jacobians).detach()
        return gauss_newton_factors(graph), whole.mT @ curvature @ whole


def test_every_implementation_is_covered() -> None:
    assert uncovered(BlockMatrix, BlockMatrixContract) == set()
