"""The banded solve is the inverse of the maximum-determinant completion, by properties that characterise it."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from diagnostics.errors import MemoryBudgetError
from hessopt.banded.linear_solve import banded_solve, check_solve_memory, least_damping
from hessopt.errors import SolveError
from hessopt.network.cliques import Bandwidth, Cliques, band_cliques
from tests.helpers.kronecker_reference import (
    NETWORKS,
    Dag,
    Dense,
    batch,
    chain,
    dags,
    dense,
    factors_of,
    flat,
    relative,
    unflat,
)

RTOL = 1e-8


class Problem:
    """Factors of a network, their dense counterparts, and a damping that differs between all parameters."""

    def __init__(self, net: Dag, loss: str = "mse", size: int = 5, scale: float = 1.0) -> None:
        x, y, labels = batch(size, outputs=sum(net.layers[v].out_features for v in net.outputs))
        losses: dict[str, Callable[[Tensor], Tensor]] = {
            "mse": lambda z: functional.mse_loss(z, y),
            "cross entropy": lambda z: functional.cross_entropy(z, labels),
        }
        tape, self.factors = factors_of(net, x, losses[loss])
        self.distance = tape.distances()
        self.parameters = [list(layer.parameters) for layer in tape.layers]
        self.damping = [
            [scale * (0.05 + 0.01 * v + 0.02 * i) for i in range(len(p))] for v, p in enumerate(self.parameters)
        ]
        self.dense: Dense = dense(net, x, losses[loss])
        pairs = zip(self.parameters, self.damping, strict=True)
        self.diagonal = flat([[torch.full_like(p, d) for p, d in zip(*pair, strict=True)] for pair in pairs])
        self.matrix = self.dense.ggn + self.diagonal.diag()

    def solve(self, gradient: Tensor, bandwidth: Bandwidth, **options: int) -> Tensor:
        cliques = band_cliques(self.distance, bandwidth)
        return flat(banded_solve(self.factors, unflat(gradient, self.parameters), self.damping, cliques, **options))

    def operator(self, bandwidth: Bandwidth) -> Tensor:
        """The matrix of the solve, column by column."""
        return torch.stack([self.solve(g, bandwidth) for g in torch.eye(len(self.matrix), dtype=torch.float64)], dim=1)

    def inside(self, bandwidth: Bandwidth) -> Tensor:
        """Which pairs of parameters are in a common clique, (P, P)."""
        mask = torch.zeros_like(self.matrix, dtype=torch.bool)
        for clique in band_cliques(self.distance, bandwidth).cliques:
            for v in clique:
                for w in clique:
                    mask[self.dense.slices[v], self.dense.slices[w]] = True
        return mask


@pytest.mark.parametrize("loss", ["mse", "cross entropy"])
@pytest.mark.parametrize("name", NETWORKS)
def test_full_and_zero_are_the_dense_and_the_block_diagonal_solve(name: str, loss: str) -> None:
    problem = Problem(NETWORKS[name](), loss)
    gradient = problem.dense.gradient
    exact = torch.linalg.solve(problem.matrix, gradient)
    assert relative(problem.solve(gradient, "full"), exact) < RTOL
    blocks = torch.cat([torch.linalg.solve(problem.matrix[s, s], gradient[s]) for s in problem.dense.slices])
    assert relative(problem.solve(gradient, 0), blocks) < RTOL
    assert relative(problem.solve(gradient, len(problem.factors)), exact) < RTOL


def check_completion(problem: Problem, bandwidth: Bandwidth) -> None:
    """Of all positive definite matrices that equal M inside the pattern, one has its inverse vanish outside."""
    operator, inside = problem.operator(bandwidth), problem.inside(bandwidth)
    assert relative(operator, operator.T) < RTOL
    assert torch.linalg.eigvalsh(operator)[0] > 0
    assert float(operator[~inside].abs().sum()) == 0
    completion = torch.linalg.inv(operator)
    assert relative(completion[inside], problem.matrix[inside]) < RTOL


@pytest.mark.parametrize("bandwidth", [0, 1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_maximum_determinant_completion(name: str, bandwidth: int) -> None:
    problem = Problem(NETWORKS[name](), "cross entropy" if bandwidth % 2 else "mse")
    check_completion(problem, bandwidth)
    if name == "chain":  # where the band is chordal, the pattern is the band and nothing else
        distance = torch.from_numpy(problem.distance)
        for v, s in enumerate(problem.dense.slices):
            for w, t in enumerate(problem.dense.slices):
                assert bool(problem.inside(bandwidth)[s, t].all()) == bool(distance[v, w] <= bandwidth)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(dags(), st.sampled_from([0, 1, 2, 3, "full"]), st.sampled_from([1.0, 1e-2]))
def test_completion_on_random_networks(net: Dag, bandwidth: Bandwidth, scale: float) -> None:
    problem = Problem(net, size=3, scale=scale)
    check_completion(problem, bandwidth)
    gradient = problem.dense.gradient
    assert float(gradient @ problem.solve(gradient, bandwidth)) > 0 or not gradient.any()


@pytest.mark.parametrize("bandwidth", [0, 1, "full"])
def test_parts_that_fit_into_memory_give_the_same(bandwidth: Bandwidth) -> None:
    problem = Problem(chain(6))
    gradient = problem.dense.gradient
    whole = problem.solve(gradient, bandwidth)
    matrix = problem.factors[0].size ** 2 * 8
    for count in (4, 6, 9):
        assert relative(problem.solve(gradient, bandwidth, memory_limit=count * matrix), whole) < 1e-13


def test_memory_is_refused_with_the_size() -> None:
    problem = Problem(chain())
    matrix = problem.factors[0].size ** 2 * 8
    with pytest.raises(MemoryBudgetError, match=r"GiB at least \(10 rows.*memory_limit"):
        problem.solve(problem.dense.gradient, 1, memory_limit=4 * matrix - 1)
    with pytest.raises(MemoryBudgetError, match=r"needs 14.9 GiB .*\(31623 rows.*limit of 4 GiB"):
        check_solve_memory(31623, torch.float32, 4 * 2**30)
    assert check_solve_memory(1000, torch.float32, 20 * 4 * 1000**2) == 9
    assert check_solve_memory(0, torch.float32, 1000) > 0


def test_without_curvature_the_step_is_the_scaled_gradient() -> None:
    net = chain()
    tape, factors = factors_of(net, batch()[0], lambda z: z.sum())
    gradients = [[torch.ones_like(p) for p in layer.parameters] for layer in tape.layers]
    step = banded_solve(factors, gradients, [[0.5, 0.25]] * 4, band_cliques(tape.distances(), 1))
    assert all(torch.equal(w, torch.full_like(w, 2)) and torch.equal(b, torch.full_like(b, 4)) for w, b in step)


class Broken:
    """A factor whose Gram matrix is not positive semidefinite, or not finite."""

    size = 2

    def __init__(self, value: float) -> None:
        self.value = value

    def gram(self, damping: object) -> Tensor:
        return torch.full((2, 2), self.value)

    def jvp(self, step: object) -> Tensor:
        return torch.zeros(2)

    def vjp(self, y: Tensor) -> list[Tensor]:
        return [y]

    def trace(self) -> Tensor:
        return torch.tensor(2 * self.value)


@pytest.mark.parametrize("value", [-3.0, float("nan"), float("inf")])
def test_failed_factorization(value: float) -> None:
    with pytest.raises(
        SolveError, match=r"not positive definite in torch.float32: the damping, at least 0.5, .*float64"
    ):
        banded_solve([Broken(value)], [[torch.ones(2)]], [[0.5]], Cliques(((0,),), ()))


def test_least_damping() -> None:
    problem = Problem(chain())
    expected = 10 * torch.finfo(torch.float64).eps * float(problem.dense.ggn.trace())
    assert least_damping(problem.factors) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("bandwidth", [0, 1, "full"])
def test_float32_keeps_its_accuracy_down_to_the_least_damping(bandwidth: Bandwidth) -> None:
    def solve(dtype: torch.dtype, damping: float | None = None) -> tuple[Tensor, float]:
        net = chain(5, width=24, outputs=6, features=24).to(dtype)
        x = torch.randn(48, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
        labels = torch.arange(48) % 6
        tape, factors = factors_of(net, x, lambda z: functional.cross_entropy(z, labels))
        slopes = iter(torch.autograd.grad(functional.cross_entropy(net(x), labels), list(net.parameters())))
        gradients = [[next(slopes) for _ in layer.parameters] for layer in tape.layers]
        damping = least_damping(factors) if damping is None else damping
        step = banded_solve(factors, gradients, [[damping, damping]] * 5, band_cliques(tape.distances(), bandwidth))
        return flat(step).double(), damping

    found, least = solve(torch.float32)
    expected, _ = solve(torch.float64, least)
    assert relative(found, expected) < 0.05
