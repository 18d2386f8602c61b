"""BandedNewton's steps against dense linear algebra, and which of them it accepts."""

import copy
import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hessopt import BandedNewton, Damped, Fixed
from hessopt.errors import SolveError
from tests.helpers.kronecker_reference import (
    LAMBDA,
    NETWORKS,
    Dag,
    batch,
    chain,
    closure_of,
    dags,
    dense,
    flat,
    losses,
    regression,
    relative,
    step_of,
    trained,
    with_backward,
)

RTOL = 1e-8


@pytest.mark.parametrize("loss", ["mse", "cross entropy", "least squares"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backward", [False, True])
def test_step_is_the_dense_solve(name: str, loss: str, backward: bool) -> None:
    for bandwidth in (0, "n - 1", "full"):
        net = NETWORKS[name]()
        closure = closure_of(net, loss)
        expected = dense(net, batch()[0], losses(net(batch()[0]).shape[1])[loss])
        matrix = expected.ggn + LAMBDA * torch.eye(len(expected.ggn), dtype=torch.float64)
        if bandwidth == 0:
            matrix = torch.block_diag(*(matrix[s, s] for s in expected.slices))
        count = len(expected.slices) - 1 if bandwidth == "n - 1" else bandwidth
        run = with_backward(net, closure) if backward else closure
        step = step_of(net, run, bandwidth=count)
        assert relative(step, -torch.linalg.solve(matrix, expected.gradient)) < RTOL


@settings(deadline=None, derandomize=True, max_examples=60)
@given(dags(), st.integers(0, 4), st.sampled_from(["mse", "cross entropy", "least squares"]))
def test_descent_at_every_bandwidth(net: Dag, bandwidth: int, loss: str) -> None:
    x, _, _ = batch()
    expected = dense(net, x, losses(net(x).shape[1])[loss])
    step = step_of(net, closure_of(net, loss), bandwidth=bandwidth)
    assert float(expected.gradient @ step) < 0 or not expected.gradient.any()
    if bandwidth >= len(net.layers) - 1:
        matrix = expected.ggn + LAMBDA * torch.eye(len(expected.ggn), dtype=torch.float64)
        assert torch.allclose(step, -torch.linalg.solve(matrix, expected.gradient), rtol=RTOL, atol=1e-12)


def test_band_in_between_differs_from_both_ends() -> None:
    steps = []
    for bandwidth in range(4):
        net = chain()
        steps.append(step_of(net, closure_of(net, "mse"), bandwidth=bandwidth))
    assert all(relative(a, b) > 1e-3 for a, b in pairwise(steps))


def test_weight_decay_is_part_of_the_objective() -> None:
    net, x = chain(), batch()[0]
    expected = dense(net, x, losses(2)["mse"])
    theta = flat(trained(net)).detach().clone()
    groups = [
        {"params": net.layers[:2].parameters(), "weight_decay": 0.4},
        {"params": net.layers[2:].parameters(), "lr": 0.5},
    ]
    before = theta.clone()
    optimizer = BandedNewton(groups, model=net, bandwidth="full", search=Fixed(LAMBDA), weight_decay=0.1)
    optimizer.step(closure_of(net, "mse"))
    start = expected.slices[2].start
    omega, lr = torch.full_like(theta, 0.1), torch.ones_like(theta)
    omega[:start], lr[start:] = 0.4, 0.5
    matrix = expected.ggn + torch.diag(omega + LAMBDA)
    step = -lr * torch.linalg.solve(matrix, expected.gradient + omega * theta)
    assert relative(flat(trained(net)).detach() - before, step) < RTOL


def test_weight_decay_enters_the_acceptance() -> None:
    net = chain()
    optimizer = BandedNewton(net, weight_decay=0.5)
    for _ in range(20):
        before = flat(trained(net)).detach().square().sum() / 4
        loss = optimizer.step(closure_of(net, "mse"))
        after = flat(trained(net)).detach().square().sum() / 4
        step = optimizer.last_step
        assert step.accepted
        actual = loss + before - closure_of(net, "mse")() - after
        assert step.actual_reduction == pytest.approx(actual.item(), rel=1e-6, abs=1e-14)
        assert actual > -1e-14


def test_maximize_is_minimizing_the_negative() -> None:
    steps = []
    for sign in (1, -1):
        net = chain()
        closure = closure_of(net, "cross entropy")
        optimizer = BandedNewton(net, maximize=sign < 0, weight_decay=0.1)
        for _ in range(4):
            optimizer.step(lambda closure=closure, sign=sign: sign * closure())
        steps.append(flat(trained(net)).detach())
    assert torch.equal(*steps)


def test_clipped_gradients_are_used() -> None:
    net, x = chain(), batch()[0]
    expected = dense(net, x, losses(2)["mse"])
    plain = closure_of(net, "mse")

    def closure() -> Tensor:
        net.zero_grad()
        loss = plain()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        return loss

    step = step_of(net, closure, bandwidth="full")
    matrix = expected.ggn + LAMBDA * torch.eye(len(expected.ggn), dtype=torch.float64)
    clipped = expected.gradient / expected.gradient.norm() * 1e-3
    assert relative(step, -torch.linalg.solve(matrix, clipped)) < 1e-2  # clip_grad_norm_ adds 1e-6 to the norm


@pytest.mark.parametrize("bandwidth", [0, 1, 2, "full"])
def test_loss_goes_down_monotonically(bandwidth: Any) -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, bandwidth=bandwidth)
    values = [optimizer.step(closure).item() for _ in range(25)] + [closure().item()]
    assert all(b <= a for a, b in pairwise(values))
    assert values[-1] < (0.5 if bandwidth == 0 else 2e-3) * values[0]


def test_band_of_one_reaches_a_small_loss() -> None:
    net, closure = regression()
    optimizer = BandedNewton(net, bandwidth=1)
    for _ in range(60):
        optimizer.step(closure)
    assert closure().item() < 1e-6


@pytest.mark.parametrize("backward", [False, True])
def test_rejected_step_leaves_parameters_bit_for_bit(backward: bool) -> None:
    net, closure = regression()
    before = [p.detach().clone() for p in net.parameters()]
    count = 0

    def rises() -> Tensor:
        nonlocal count
        count += 1
        loss = closure() + count
        if backward:
            net.zero_grad()
            loss.backward()
        return loss

    optimizer = BandedNewton(net, search=Damped(1.0, max_rejections=3))
    loss = optimizer.step(rises)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    step = optimizer.last_step
    assert not step.accepted
    assert (step.solves, step.closure_runs, count) == (3, 4, 4)
    assert step.trial_loss > step.loss == loss.item()
    state = optimizer.state[net[0].weight]
    assert (state["step"], state["damping"], state["growth"]) == (1, 64.0, 16.0)


def test_report_of_an_accepted_step() -> None:
    net, closure = regression()
    expected = closure().item()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closure(), list(net.parameters()))])
    optimizer = BandedNewton(net, search=Damped(10.0))
    assert optimizer.last_step is None
    loss = optimizer.step(closure)
    step = optimizer.last_step
    assert not loss.requires_grad
    assert step.accepted
    assert step.loss == loss.item() == expected
    assert step.trial_loss == closure().item()
    assert step.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert step.ratio == pytest.approx((step.loss - step.trial_loss) / step.predicted_reduction, rel=1e-6)
    assert (step.damping, step.solves, step.closure_runs) == (10.0, 1, 2)


def test_fixed_damping_runs_the_closure_once() -> None:
    net, closure = regression()
    count = 0

    def counted() -> Tensor:
        nonlocal count
        count += 1
        return closure()

    optimizer = BandedNewton(net, search=Fixed())
    for _ in range(3):
        optimizer.step(counted)
    assert count == 3
    assert optimizer.last_step.closure_runs == 1
    assert optimizer.state[net[0].weight] == {"step": 3, "damping": 1e-2, "growth": 2.0, "bandwidth": 3}


def test_singular_solve_raises_with_fixed_damping_and_is_damped_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessopt.banded.step.least_damping", lambda factors, **_: 0.0)
    net, closure = regression(dtype=torch.float32)
    with torch.no_grad():
        net[0].weight *= 1e4
        net[-1].weight *= 1e6
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(SolveError, match="Use more damping or float64"):
        BandedNewton(net, bandwidth=0, search=Fixed(1e-10)).step(closure)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    optimizer = BandedNewton(net, bandwidth=0, search=Damped(1e-10, max_rejections=20))
    optimizer.step(closure)
    assert optimizer.last_step.accepted
    assert optimizer.last_step.solves > optimizer.last_step.closure_runs - 1


def test_damping_is_kept_above_the_precision() -> None:
    net, closure = regression(dtype=torch.float32)
    optimizer = BandedNewton(net, search=Fixed(1e-10))
    optimizer.step(closure)
    assert optimizer.last_step.damping > 1e-8
    assert torch.cat([p.flatten() for p in net.parameters()]).isfinite().all()


def test_float32_trains() -> None:
    net, closure = regression(dtype=torch.float32)
    optimizer = BandedNewton(net)
    for _ in range(40):
        optimizer.step(closure)
    assert closure().item() < 1e-5


@pytest.mark.parametrize("options", [{"space": "sample"}, {"space": "parameter"}, {"curvature": "hessian"}])
@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_layers_of_different_precision(
    options: dict[str, Any], first: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps are those of the same network in float64, to the rounding of float32, and in closed form."""

    class Cast(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.dtype)

    second = torch.float64 if first == torch.float32 else torch.float32
    torch.manual_seed(0)
    mixed = nn.Sequential(nn.Linear(4, 5).to(first), nn.Tanh(), Cast(second), nn.Linear(5, 2).to(second))
    double = copy.deepcopy(mixed).double()
    double[2].dtype = torch.float64
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    for net, a, b in ((mixed, first, second), (double, torch.float64, torch.float64)):
        optimizer = BandedNewton(net, bandwidth="full", **options)
        for _ in range(2):
            optimizer.step(functools.partial(_mean_squares, net, x.to(a), y.to(b)))
    for p, q in zip(mixed.parameters(), double.parameters(), strict=True):
        assert torch.allclose(p.double(), q, rtol=1e-3, atol=1e-4)
    assert "closed form" not in caplog.text


def _mean_squares(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(net(x), y)
