"""What a step costs in gradients, and the warning where it is many."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hessopt import BandedNewton, NewtonCG
from hessopt.banded import step_cost
from hessopt.banded.step_cost import CostWarning, gradient_operations
from hessopt.network.parameter_uses import UseRecorder

NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), (5, 6)),
    "positions": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), (5, 4, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2)), (5, 2, 8, 7)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_of_a_gradient_are_those_that_pytorch_counts(name: str) -> None:
    make, shape = NETWORKS[name]
    net, x = make(), torch.randn(shape, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        net(x).square().sum().backward()
    recorder = UseRecorder(list(net.parameters()))
    with recorder.recording():
        net(x)
    # A multiplication and an addition are two.
    assert gradient_operations(recorder.uses) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


def warnings_of(
    caplog: pytest.LogCaptureFixture, outputs: int, batch: int, steps: int = 3, **options: Any
) -> list[str]:
    caplog.clear()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))
    x = torch.randn(batch, 4)
    optimizer = BandedNewton(net, **options)
    for _ in range(steps):
        optimizer.step(lambda: functional.mse_loss(net(x), torch.zeros(batch, outputs)))
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("space", ["auto", "sample", "parameter"])
def test_a_dear_step_is_warned_of_once_with_what_to_take(
    space: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cost, "FEW_OPERATIONS", 1e4)
    monkeypatch.setattr(step_cost, "MANY_GRADIENTS", 100 if space == "sample" else 10)
    (message,) = warnings_of(caplog, 8, 40, space=space)
    assert "320 rows" in message
    assert "86 parameters" in message
    assert all(way in message for way in ("KroneckerNewton", "smaller batch", "NewtonCG"))
    monkeypatch.setattr(step_cost, "MANY_GRADIENTS", 1e5)
    assert warnings_of(caplog, 8, 40, space=space) == []


def test_small_problems_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    """As the README's: a ratio above 100 of next to nothing."""
    assert warnings_of(caplog, 8, 40, steps=1, space="sample") == []
    warning = CostWarning(False)
    warning.check(1e8, 1e4, 320, 86)
    assert not warning.given


def test_the_whole_hessian_points_to_newton_cg(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cost, "FEW_OPERATIONS", 1e4)
    monkeypatch.setattr(step_cost, "MANY_GRADIENTS", 10)
    (message,) = warnings_of(caplog, 8, 10, curvature="hessian")
    assert 'curvature="hessian"' in message
    assert NewtonCG.__name__ in message
