"""The recursions of SGD with momentum, decay and schedules, and the optimizers that have none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diagnostics.conservation.monitor import ConservationMonitor
from tests.helpers.conservation import STEPS, check, data_of, mlp, train


def test_heavy_ball() -> None:
    check(train(mlp(nn.ReLU()), data_of(), lr=0.02, momentum=0.9), quantities=2)


def test_heavy_ball_with_mini_batches_decay_and_dampening() -> None:
    report = train(
        mlp(nn.ReLU(), bias=True), data_of(), batch=8, lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.02
    )
    check(report, quantities=2)


def test_nesterov() -> None:
    report = train(mlp(nn.ReLU()), data_of(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01)
    check(report, quantities=2)


def test_maximize() -> None:
    report = train(mlp(nn.ReLU()), data_of(), steps=20, lr=1e-3, maximize=True, momentum=0.5)
    check(report, quantities=2, least_drift=1e-9)


def test_weight_decay_of_plain_sgd() -> None:
    report = train(mlp(nn.ReLU()), data_of(), weight_decay=0.05)
    check(report, quantities=2, least_drift=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_weight_decay(momentum: float) -> None:
    report = train(mlp(nn.ReLU()), data_of(), lr=0.02, decoupled=0.05, momentum=momentum)
    check(report, quantities=2, least_drift=1e-2)
    drift, rate = report.drifts[0], (1 - 0.02 * 0.05) ** 2
    if not momentum:  # C⁺ = (1 − ηλ)² C + η²δ: without gradients, C would have decayed to this
        decayed = drift.start.sum() * rate**STEPS
        assert abs((drift.value.sum() - decayed).item()) < abs((drift.start.sum() - decayed).item())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_learning_rate_schedule(momentum: float) -> None:
    def rate(step: int) -> float:
        return 0.05 / (1 + step / 50)

    report = train(mlp(nn.ReLU()), data_of(), schedule=rate, momentum=momentum, weight_decay=0.01)
    check(report, quantities=2)


def test_momentum_that_is_switched_off_and_on() -> None:
    model, (x, y) = mlp(nn.ReLU()), data_of()
    opt = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
    monitor: ConservationMonitor | None = None
    for step in range(60):
        opt.param_groups[0]["momentum"] = 0.0 if 20 <= step < 40 else 0.9
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step == 10:  # begins in the middle of a run: the buffers are not empty
            monitor = ConservationMonitor(model, x)
            monitor.attach(opt)
        opt.step()
    assert monitor is not None
    check(monitor.report(), quantities=2)


def test_clipping_by_norm_is_exact_and_by_value_shows() -> None:
    def by_norm(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    def by_value(model: nn.Module) -> None:
        nn.utils.clip_grad_value_(model.parameters(), 0.005)

    check(train(mlp(nn.ReLU()), data_of(), before_step=by_norm), quantities=2)
    report = train(mlp(nn.ReLU()), data_of(), before_step=by_value)
    assert not report.healthy
    assert "EXACT, BUT BROKEN" in str(report)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizers_that_have_no_identity(optimizer: type[torch.optim.Optimizer]) -> None:
    report = train(mlp(nn.ReLU()), data_of(), steps=50, optimizer=optimizer, lr=1e-2)
    for drift in report.drifts:
        assert drift.quantity.exact  # the network is homogeneous
        assert not drift.exact
        assert optimizer.__name__ in drift.reason
        assert drift.residual is None
        assert drift.healthy is None
        assert drift.drift.abs().sum() > 1e-3
        assert drift.gradient_sum.abs().sum() > 0


def test_groups_with_different_settings_are_not_exact() -> None:
    model, (x, y) = mlp(nn.ReLU()), data_of()
    groups = [{"params": [model[0].weight, model[2].weight]}, {"params": [model[4].weight], "lr": 0.2}]
    opt = torch.optim.SGD(groups, lr=0.1)
    monitor = ConservationMonitor(model, x, opt)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    monitor.step()
    first, second = monitor.report().drifts
    assert first.exact
    assert first.healthy
    assert not second.exact
    assert "different settings" in second.reason
    partial = ConservationMonitor(model, x, torch.optim.SGD([model[0].weight], lr=0.1))
    assert all("is not in the optimizer" in d.reason for d in partial.report().drifts)
