"""What every likelihood does, against the density and its dense Fisher matrix in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diagnostics.operators.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from tests.contracts.coverage import uncovered


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class LikelihoodContract(ABC):
    """Properties of a likelihood; a subclass makes one, and says its density and units."""

    kind: ClassVar[type[Likelihood]]
    shape: ClassVar[tuple[int, ...]] = (3, 4)

    def make(self) -> Likelihood:
        return self.kind()

    @abstractmethod
    def loss(self, z: Tensor) -> Tensor:
        """``-log p(y)`` of some targets y, but for what does not depend on z."""

    def units(self) -> Tensor:
        """The number of each entry's unit, like z."""
        return torch.arange(self.shape[0]).view(-1, *[1] * (len(self.shape) - 1)).expand(self.shape)

    def fisher(self) -> tuple[Tensor, Tensor]:
        """z and the dense Fisher matrix: the Hessian of the negative logarithm of the density."""
        z = normal(*self.shape)
        size = z.numel()
        hessian = torch.autograd.functional.hessian(self.loss, z)
        assert isinstance(hessian, Tensor)
        return z, hessian.reshape(size, size)

    @staticmethod
    def unit_vectors(z: Tensor) -> Tensor:
        return torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)

    def test_the_information_is_the_curvature_of_the_loss(self) -> None:
        """To 1e-12: exponential families have a curvature that does not depend on y."""
        z, fisher = self.fisher()
        found = self.make().information(z, self.unit_vectors(z)).reshape(fisher.shape)
        torch.testing.assert_close(found, fisher, rtol=1e-12, atol=1e-12)

    def test_the_root_multiplies_to_the_information(self) -> None:
        """``S Sᵀ = F`` to 1e-12."""
        z, fisher = self.fisher()
        root = self.make().root(z, self.unit_vectors(z)).reshape(fisher.shape).mT  # column i is S eᵢ
        torch.testing.assert_close(root @ root.mT, fisher, rtol=1e-12, atol=1e-12)

    def test_the_root_stays_within_units(self) -> None:
        z, fisher = self.fisher()
        root = self.make().root(z, self.unit_vectors(z)).reshape(fisher.shape)
        unit = self.units().reshape(-1)
        assert not root[unit.unsqueeze(0) != unit.unsqueeze(1)].any()

    def test_scores_have_mean_zero_and_the_information_as_covariance(self) -> None:
        """Of 40000 draws, to 6 standard errors of each entry."""
        z, fisher = self.fisher()
        count = 40_000
        scores = self.make().scores(z, count, torch.Generator().manual_seed(0)).reshape(count, -1)
        assert scores.dtype == z.dtype
        assert bool((scores.mean(0).abs() <= 6 * (fisher.diagonal() / count).sqrt()).all())
        squares = scores.unsqueeze(2) * scores.unsqueeze(1)
        error = (squares.mean(0) - fisher).abs()
        assert bool((error <= 6 * squares.std(0) / count**0.5 + 1e-12).all())

    def test_one_generator_draws_one_sample(self) -> None:
        z = normal(*self.shape)
        draws = [self.make().scores(z, 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert draws[0].shape == (2, *self.shape)
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_sums_over_units(self) -> None:
        """Kept dimensions broadcast to z; to 1e-14."""
        values = normal(2, *self.shape, seed=4)
        unit = self.units().reshape(-1)
        same = (unit.unsqueeze(0) == unit.unsqueeze(1)).double()
        expected = (values.reshape(2, -1) @ same).view_as(values)
        torch.testing.assert_close(self.make().unit_sum(values).expand_as(values), expected, rtol=1e-14, atol=1e-14)

    def test_the_factor_of_a_loss_is_found(self) -> None:
        """A factor for each unit, one of them zero; to 1e-12."""
        z, _ = self.fisher()
        likelihood = self.make()
        information = likelihood.information(z, normal(1, *self.shape, seed=5))
        weights = torch.linspace(0, 2, int(self.units().max()) + 1, dtype=torch.float64)[self.units()]
        found = likelihood.factor(weights * information, information).expand(1, *self.shape).squeeze(0)
        torch.testing.assert_close(found, weights, rtol=1e-12, atol=1e-12)

    def test_no_information_gives_the_factor_zero(self) -> None:
        nothing = torch.zeros(1, *self.shape, dtype=torch.float64)
        found = self.make().factor(normal(1, *self.shape), nothing)
        assert not found.any()


class TestCategorical(LikelihoodContract):
    kind = Categorical

    def make(self) -> Likelihood:
        return Categorical(-1)

    def loss(self, z: Tensor) -> Tensor:
        return F.cross_entropy(z, torch.tensor([0, 3, 1]), reduction="sum")


class TestCategoricalOfPositions(LikelihoodContract):
    """Classes in the second dimension, as of images."""

    kind = Categorical
    shape = (2, 3, 2)

    def make(self) -> Likelihood:
        return Categorical(1)

    def loss(self, z: Tensor) -> Tensor:
        return F.cross_entropy(z, torch.tensor([[0, 2], [1, 1]]), reduction="sum")

    def units(self) -> Tensor:
        return torch.arange(4).view(2, 1, 2).expand(self.shape)


class TestGaussian(LikelihoodContract):
    kind = Gaussian

    def loss(self, z: Tensor) -> Tensor:
        return (z - normal(*self.shape, seed=2)).square().sum() / 2


class TestBernoulli(LikelihoodContract):
    kind = Bernoulli
    shape = (3, 2, 2)

    def loss(self, z: Tensor) -> Tensor:
        targets = (normal(*self.shape, seed=2) > 0).double()
        return F.binary_cross_entropy_with_logits(z, targets, reduction="sum")


class TestPoisson(LikelihoodContract):
    kind = Poisson

    def loss(self, z: Tensor) -> Tensor:
        return F.poisson_nll_loss(z, torch.arange(12.0, dtype=torch.float64).view(3, 4), reduction="sum")


def test_every_implementation_is_covered() -> None:
    assert uncovered(Likelihood, LikelihoodContract) == set()
