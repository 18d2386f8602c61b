"""Training on a budget of time: what is counted, and what the curve holds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.shared.models import mlp
from examples.shared.timing import costs_in_gradients, train_for


class Twice(torch.optim.SGD):
    """Runs the closure twice a step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


@pytest.mark.parametrize(("kind", "runs"), [(torch.optim.SGD, 1), (Twice, 2)])
def test_no_time_is_one_step(kind: type[torch.optim.SGD], runs: int) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def loss_of(batch: Tensor) -> Tensor:
        return (batch * weight).square().sum() / 2

    batches = itertools.repeat(torch.tensor([1.0, 2.0], dtype=torch.float64))
    found = train_for(0.0, kind([weight], lr=0.1), batches, loss_of, lambda: weight.sum().item(), lambda n: 10.0 * n)
    assert (found.steps, found.work) == (1, 10 * runs)
    assert torch.allclose(weight, torch.tensor([0.9, 0.6], dtype=torch.float64), atol=1e-15)
    ((seconds, value),) = found.curve
    assert seconds > 0
    assert value == pytest.approx(1.5, abs=1e-15)


def test_the_curve_ends_with_the_training() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    found = train_for(0.01, optimizer, itertools.repeat(1.0), lambda b: -b * weight.sum(), lambda: weight.item())
    assert found.work == found.steps == weight.item() == found.curve[-1][1]
    assert found.curve == sorted(found.curve)
    assert len(found.curve) <= 21


def test_costs_leave_the_network_as_it_was() -> None:
    model, x = mlp([3, 4, 4, 2]), torch.randn(5, 3)
    costs = costs_in_gradients(model, x, lambda z: z.square().mean())
    assert all(cost > 0 for cost in costs)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
