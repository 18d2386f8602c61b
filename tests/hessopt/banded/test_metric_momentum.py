"""Momentum in the metric of the curvature, against least squares and dense solves."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessopt import BandedNewton, Damped, Fixed, LeastSquares, LineSearch
from tests.helpers.kronecker_reference import (
    batch,
    chain,
    closure_of,
    dense,
    losses,
    regression,
    relative,
    resumes,
    trained,
)

F64 = torch.float64
MU, LAMBDA = 0.7, 0.05


def vector(net: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for own in trained(net) for p in own])


def residual_system(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals and their Jacobian by torch.func, in the order of the network's parameters."""
    names = dict(net.named_parameters())

    def residuals(parameters: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(net, parameters, (x,)) - y).flatten()

    jacobian = torch.func.jacrev(residuals)({k: v.detach() for k, v in names.items()})
    rows = torch.cat([jacobian[k].flatten(1) for k in names], dim=1)
    return residuals(names).detach(), rows


def squares(net: nn.Module, x: Tensor, y: Tensor) -> Any:
    return lambda: LeastSquares(net(x) - y)


@pytest.mark.parametrize("space", ["sample", "parameter"])
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_full_steps_are_the_least_squares_that_stay_near_the_last_step(space: Any, lr: float) -> None:
    net, (x, y, _) = chain(), batch()
    optimizer = BandedNewton(net, lr=lr, bandwidth="full", space=space, search=Fixed(LAMBDA), momentum=MU)
    last = torch.zeros(len(vector(net)), dtype=F64)
    for _ in range(4):
        residuals, rows = residual_system(net, x, y)
        root = LAMBDA**0.5
        matrix = torch.cat([rows, root * torch.eye(rows.shape[1], dtype=F64)])
        last = torch.linalg.lstsq(matrix, torch.cat([-residuals, root * MU * last]).unsqueeze(1)).solution.squeeze(1)
        before = vector(net)
        optimizer.step(squares(net, x, y))
        assert relative(vector(net) - before, lr * last) < 1e-8


@pytest.mark.parametrize("loss", ["mse", "cross entropy", "least squares"])
@pytest.mark.parametrize("bandwidth", [0, 1])
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_banded_steps_solve_the_models_gradient_at_the_last_step(loss: str, bandwidth: int, decay: float) -> None:
    net = chain()
    options: dict[str, Any] = {"bandwidth": bandwidth, "search": Fixed(LAMBDA), "weight_decay": decay}
    optimizer = BandedNewton(net, momentum=MU, **options)
    closure = closure_of(net, loss)
    start = vector(net)
    optimizer.step(closure)
    last = vector(net) - start
    x = batch()[0]
    for _ in range(3):
        here = vector(net)
        found = dense(net, x, losses(net(x).shape[1])[loss])
        matrix = found.ggn + decay * torch.eye(len(found.ggn), dtype=F64)
        gradient = found.gradient + decay * here
        moved = gradient + matrix @ (MU * last)
        expected = MU * last - torch.linalg.solve(completion(matrix, found.slices, bandwidth), moved)
        descends = float(gradient @ expected) < 0
        optimizer.step(closure)
        if not descends:
            expected = -torch.linalg.solve(completion(matrix, found.slices, bandwidth), gradient)
        assert relative(vector(net) - here, expected) < 1e-7
        last = expected


def completion(matrix: Tensor, slices: list[slice], bandwidth: int) -> Tensor:
    """The maximum-determinant completion of the damped band of a chain, by its inverse's definition."""
    damped = matrix + LAMBDA * torch.eye(len(matrix), dtype=F64)
    inverse = torch.zeros_like(damped)
    windows = [slice(slices[i].start, slices[i + bandwidth].stop) for i in range(len(slices) - bandwidth)]
    overlaps = [slice(b.start, a.stop) for a, b in pairwise(windows) if b.start < a.stop]
    for window in windows:
        inverse[window, window] += torch.linalg.inv(damped[window, window])
    for overlap in overlaps:
        inverse[overlap, overlap] -= torch.linalg.inv(damped[overlap, overlap])
    return torch.linalg.inv(inverse)


@pytest.mark.parametrize("search", [Damped(), LineSearch()])
def test_without_momentum_nothing_is_kept(search: Any) -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, search=search, momentum=0.0)
    for _ in range(3):
        optimizer.step(closure)
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


@pytest.mark.parametrize("search", [Damped(), LineSearch()])
@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_every_step_goes_down(search: Any, momentum: float) -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, search=search, momentum=momentum)
    values = [optimizer.step(closure).item() for _ in range(30)]
    assert all(b <= a for a, b in pairwise(values))
    assert values[-1] < 1e-2 * values[0]


def test_a_rejected_step_keeps_nothing() -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, momentum=0.9, search=Damped(max_rejections=1))
    optimizer.step(closure)
    assert optimizer.state[net[0].weight]["momentum_buffer"].any()
    values = iter([1.0, 1e9])  # the trial is worse

    def rising() -> Tensor:
        return closure() + next(values)

    optimizer.step(rising)
    assert optimizer.last_step is not None
    assert not optimizer.last_step.accepted
    assert not optimizer.state[net[0].weight]["momentum_buffer"].any()


def test_groups_have_their_own_momentum() -> None:
    net, closure = regression()
    twin, again = regression()
    first = [{"params": net[0].parameters(), "momentum": 0.9}, {"params": net[2:].parameters()}]
    apart = BandedNewton(first, model=net, bandwidth=0, search=Fixed(1.0))
    together = BandedNewton(twin, bandwidth=0, search=Fixed(1.0), momentum=0.9)
    for _ in range(3):
        apart.step(closure)
        together.step(again)
    assert "momentum_buffer" in apart.state[net[0].weight]
    assert not torch.allclose(net[2].weight, twin[2].weight, rtol=1e-6)


@pytest.mark.parametrize("through_file", [False, True])
def test_resumes_bit_for_bit(through_file: bool) -> None:
    (net, closure), (other, again) = regression(), regression(seed=9)
    optimizer, resumed = (BandedNewton(m, momentum=0.8, bandwidth=1) for m in (net, other))
    resumes((net, optimizer, closure), (other, resumed, again), through_file)


def test_copies_go_on_alike() -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, momentum=0.8)
    optimizer.step(closure)
    twin, copied = copy.deepcopy((net, optimizer))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], copied.state[q]["momentum_buffer"])


def test_out_of_range() -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1"):
        BandedNewton(net, momentum=1.0)
