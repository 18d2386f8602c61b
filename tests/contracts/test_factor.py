"""What every square-root factor does, against its dense matrix Ĵ in float64, to 1e-12 of the result's norm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from hessopt.factors.sample_factors import DenseFactor, Factor, OuterFactor
from tests.contracts.coverage import uncovered


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-12 * expected.norm())


class FactorContract(ABC):
    """Properties of a factor; a subclass makes one and says what it is."""

    kind: ClassVar[type]

    @abstractmethod
    def make(self) -> tuple[Factor, Tensor, list[torch.Size]]:
        """A factor, its matrix ``(N, P)``, and the shapes of its parameters."""

    @pytest.fixture
    def made(self) -> tuple[Factor, Tensor, list[torch.Size]]:
        made = self.make()
        assert type(made[0]) is self.kind
        return made

    def test_the_matrix(self, made: tuple[Factor, Tensor, list[torch.Size]]) -> None:
        factor, dense, _ = made
        assert factor.size == len(dense)
        assert close(factor.matrix(), dense)

    def test_products_with_steps(self, made: tuple[Factor, Tensor, list[torch.Size]]) -> None:
        factor, dense, shapes = made
        step = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
        assert close(factor.jvp(step), dense @ torch.cat([s.reshape(-1) for s in step]))

    def test_products_with_rows(self, made: tuple[Factor, Tensor, list[torch.Size]]) -> None:
        factor, dense, shapes = made
        y = normal(len(dense), seed=3)
        found = factor.vjp(y)
        assert [part.shape for part in found] == shapes
        assert close(torch.cat([part.reshape(-1) for part in found]), dense.mT @ y)

    def test_the_gram_matrix_with_another_damping_for_each_parameter(
        self, made: tuple[Factor, Tensor, list[torch.Size]]
    ) -> None:
        factor, dense, shapes = made
        damping = [0.3 + 2.0 * i for i in range(len(shapes))]
        spread = [
            torch.full((shape.numel(),), d, dtype=torch.float64) for shape, d in zip(shapes, damping, strict=True)
        ]
        found = factor.gram(damping)
        assert close(found, dense / torch.cat(spread) @ dense.mT)
        assert close(found, found.mT)

    def test_the_trace(self, made: tuple[Factor, Tensor, list[torch.Size]]) -> None:
        factor, dense, _ = made
        assert close(factor.trace(), dense.square().sum())


class OuterContract(FactorContract):
    """Outer products of K' = 2 root columns, B = 3 samples and some uses of a layer."""

    kind = OuterFactor
    uses, width, inputs, shared, weight, bias = 1, 4, 3, True, True, True

    def make(self) -> tuple[Factor, Tensor, list[torch.Size]]:
        features = self.inputs * self.weight + self.bias
        left = normal(2, 3, self.uses, self.width)
        right = normal(1 if self.shared else 2, 3, self.uses, features, seed=1)
        rows = [
            sum(
                (torch.outer(left[k, b, t], right[0 if self.shared else k, b, t]) for t in range(self.uses)),
                torch.zeros(self.width, features, dtype=torch.float64),
            )
            for k in range(2)
            for b in range(3)
        ]
        parts = [row[:, : self.inputs].reshape(-1) for row in rows] if self.weight else [row[:0, 0] for row in rows]
        ends = [row[:, -1] if self.bias else row[:0, 0] for row in rows]
        shapes = [torch.Size((self.width, self.inputs))] * self.weight + [torch.Size((self.width,))] * self.bias
        dense = torch.stack([torch.cat(pair) for pair in zip(parts, ends, strict=True)])
        return OuterFactor(left, right, has_weight=self.weight, has_bias=self.bias), dense, shapes


class TestOuterFactor(OuterContract):
    pass


class TestOuterFactorWithoutBias(OuterContract):
    bias = False


class TestOuterFactorOfABias(OuterContract):
    weight = False


class TestOuterFactorOfSeveralUses(OuterContract):
    uses, shared = 3, False


class TestOuterFactorThatIsFormed(OuterContract):
    """So many uses that Ĵ is formed for the Gram matrix."""

    uses, width, inputs = 20, 2, 1


class TestDenseFactor(FactorContract):
    kind = DenseFactor

    def make(self) -> tuple[Factor, Tensor, list[torch.Size]]:
        shapes = [torch.Size((2, 3)), torch.Size((2,)), torch.Size(())]
        dense = normal(5, 9)
        return DenseFactor(dense, tuple(shapes)), dense, shapes


def test_every_implementation_is_covered() -> None:
    assert uncovered(Factor, FactorContract) == set()
