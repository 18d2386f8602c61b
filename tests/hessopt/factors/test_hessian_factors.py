"""BandedNewton with the absolute value of the Hessian, against torch.func and dense linear algebra."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.errors import MemoryBudgetError
from hessopt import BandedNewton, Damped, Fixed, LeastSquares, LineSearch
from tests.helpers.kronecker_reference import Dag, batch, chain, dags, regression, relative, resumes, skip, trained

F64 = torch.float64
LAMBDA = 0.05

LOSSES: dict[str, Any] = {
    "mse": lambda z, y: functional.mse_loss(z, y),
    "not convex": lambda z, y: torch.sin(3 * z).sum() + (z * z.roll(1, 0)).mean(),  # samples couple, too
    "root": lambda z, y: functional.mse_loss(z, y).sqrt(),
}


def flat(net: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for own in trained(net) for p in own])


def by_double_back_propagation(net: nn.Module, x: Tensor, y: Tensor, loss: Any) -> tuple[Tensor, Tensor, list[slice]]:
    """Gradient, ``|H|``, and the slices of the layers, in the order of :func:`flat`; row by row."""
    names = {p: name for name, p in net.named_parameters()}
    chosen = [p for own in trained(net) for p in own]

    def objective(*values: Tensor) -> Tensor:
        state = dict(zip([names[p] for p in chosen], values, strict=True))
        found: Tensor = loss(torch.func.functional_call(net, state, (x,)), y)
        return found

    values = tuple(p.detach().clone().requires_grad_() for p in chosen)
    slopes = torch.autograd.grad(objective(*values), values, materialize_grads=True, allow_unused=True)
    gradient = torch.cat([g.flatten() for g in slopes])
    blocks = torch.autograd.functional.hessian(objective, values)
    rows = [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for p, row in zip(chosen, blocks, strict=True)]
    hessian = torch.cat(rows)
    eigenvalues, eigenvectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    ends, slices = 0, []
    for own in trained(net):
        size = sum(p.numel() for p in own)
        slices.append(slice(ends, ends + size))
        ends += size
    return gradient, eigenvectors @ eigenvalues.abs().diag() @ eigenvectors.mT, slices


def step_of(net: nn.Module, closure: Any, **options: Any) -> Tensor:
    before = flat(net)
    BandedNewton(net, curvature="hessian", search=Fixed(LAMBDA), **options).step(closure)
    return flat(net) - before


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", [chain, skip])
@pytest.mark.parametrize("space", ["auto", "parameter"])
def test_step_is_the_dense_solve(make: Any, loss: str, space: Any) -> None:
    for bandwidth in (0, "full"):
        net, (x, y, _) = make(), batch()
        gradient, matrix, slices = by_double_back_propagation(net, x, y, LOSSES[loss])
        if bandwidth == 0:
            matrix = torch.block_diag(*(matrix[s, s] for s in slices))
        step = step_of(net, lambda net=net, x=x, y=y: LOSSES[loss](net(x), y), bandwidth=bandwidth, space=space)
        expected = -torch.linalg.solve(matrix + LAMBDA * torch.eye(len(matrix), dtype=F64), gradient)
        assert relative(step, expected) < 1e-8


@settings(deadline=None, derandomize=True, max_examples=25)
@given(dags(), st.integers(0, 3), st.sampled_from(list(LOSSES)))
def test_descent_at_every_bandwidth(net: Dag, bandwidth: int, loss: str) -> None:
    x, y, _ = batch(outputs=net(batch()[0]).shape[1])
    gradient, matrix, _ = by_double_back_propagation(net, x, y, LOSSES[loss])
    step = step_of(net, lambda: LOSSES[loss](net(x), y), bandwidth=bandwidth)
    assert float(gradient @ step) < 0 or not gradient.any()
    if bandwidth >= len(net.layers) - 1:
        expected = -torch.linalg.solve(matrix + LAMBDA * torch.eye(len(matrix), dtype=F64), gradient)
        assert relative(step, expected) < 1e-7


def test_a_quadratic_saddle_by_hand() -> None:
    """½ a² − ½ b²: the step goes to the axis, and away along it."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.tensor([1.0, 0.25], dtype=F64))

        def forward(self) -> Tensor:
            return self.at

    net = Point()
    optimizer = BandedNewton(net, curvature="hessian", search=Fixed(1e-9))
    signs = torch.tensor([1.0, -1.0], dtype=F64)
    optimizer.step(lambda: (signs * net().square()).sum() / 2)
    assert torch.allclose(net.at, torch.tensor([0.0, 0.5], dtype=F64), atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("search", [Damped(), LineSearch()])
def test_every_step_goes_down(momentum: float, search: Any) -> None:
    net, (x, y, _) = chain(), batch()
    optimizer = BandedNewton(net, curvature="hessian", momentum=momentum, search=search, bandwidth="auto")
    values = [optimizer.step(lambda: functional.mse_loss(net(x), y)).item() for _ in range(25)]
    assert all(b <= a for a, b in pairwise(values))
    assert values[-1] < 0.1 * values[0]


def test_maximize_is_minimizing_the_negative() -> None:
    ends = []
    for sign in (1, -1):
        net, (x, y, _) = chain(), batch()
        optimizer = BandedNewton(net, curvature="hessian", maximize=sign < 0)
        for _ in range(5):
            optimizer.step(lambda n=net, s=sign, x=x, y=y: s * functional.mse_loss(n(x), y))
        ends.append(flat(net))
    assert torch.allclose(*ends, rtol=1e-9)


def test_terms_beside_the_output_and_layers_of_any_kind() -> None:
    """A penalty, a module called twice, batch-norm in training mode, attention, residuals: nothing is asked of them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True), nn.Flatten(), nn.BatchNorm1d(12)
    ).double()
    x = torch.randn(5, 3, 4, dtype=F64)

    def closure() -> Tensor:
        return (net(net(x).view(5, 3, 4)) - 1).square().mean() + 0.1 * sum(p.square().sum() for p in net.parameters())

    optimizer = BandedNewton(net, curvature="hessian", bandwidth=1)
    values = [optimizer.step(closure).item() for _ in range(8)]
    assert values[-1] < values[0]
    plain, (inputs, targets, _) = chain(), batch()
    BandedNewton(plain, curvature="hessian").step(lambda: LeastSquares(plain(inputs) - targets))


@pytest.mark.parametrize("through_file", [False, True])
def test_resumes_bit_for_bit(through_file: bool) -> None:
    (net, closure), (other, again) = regression(), regression(seed=9)
    optimizer, resumed = (BandedNewton(m, curvature="hessian", bandwidth=1) for m in (net, other))
    resumes((net, optimizer, closure), (other, resumed, again), through_file)
    assert copy.deepcopy(optimizer).curvature == "hessian"


def test_refusals() -> None:
    net, closure = regression()
    with pytest.raises(ValueError, match='has no factors by samples: pass space="parameter"'):
        BandedNewton(net, curvature="hessian", space="sample")
    with pytest.raises(ValueError, match="curvature must be one of"):
        BandedNewton(net, curvature="fisher")  # type: ignore[arg-type]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(MemoryBudgetError, match=r"the Hessian of \d+ parameters .*curvature=\"ggn\", hessopt.NewtonCG"):
        BandedNewton(net, curvature="hessian", memory_limit=10_000).step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_what_does_not_fit_is_never_sent_to_the_space_of_samples() -> None:
    """Whatever the limit, ``|H|`` fits or the advice is one that ``curvature="hessian"`` can take."""
    net, closure = regression()
    bytes_of_a_matrix = 8 * sum(p.numel() for p in net.parameters()) ** 2
    for matrices in (0.5, 1, 2, 3, 3.99):
        limit = int(matrices * bytes_of_a_matrix)
        with pytest.raises(MemoryBudgetError, match=r"memory_limit") as caught:
            BandedNewton(net, curvature="hessian", memory_limit=limit).step(closure)
        assert 'space="sample"' not in str(caught.value)
    BandedNewton(net, curvature="hessian", memory_limit=4 * bytes_of_a_matrix).step(closure)
