"""Param groups as one objective over a flat vector."""

import math

import pytest
import torch
from torch import nn

from hessopt.closure.objective import Objective
from hessopt.errors import ClosureError


def groups(maximize: bool = False) -> list[dict[str, object]]:
    a, b = (
        nn.Parameter(torch.full(shape, value, dtype=torch.float64)) for shape, value in (((2, 2), 1.0), ((3,), 2.0))
    )
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    return [
        {"params": [a, frozen], "lr": 0.5, "weight_decay": 0.0, "maximize": maximize},
        {"params": [b], "lr": 0.5, "weight_decay": 4.0, "maximize": maximize},
    ]


@pytest.mark.parametrize("maximize", [False, True])
def test_gradient_and_curvature(maximize: bool) -> None:
    objective = Objective(groups(maximize))
    sign = -1 if maximize else 1
    assert objective.rates == 0.5
    slope = torch.arange(7, dtype=torch.float64)
    decay = torch.tensor([0, 0, 0, 0, 4, 4, 4], dtype=torch.float64)
    assert torch.equal(objective.gradient(slope), sign * slope + decay * 2)
    assert torch.equal(objective.curvature(lambda v: 3 * v)(slope), (3 * sign + decay) * slope)
    with pytest.raises(ClosureError, match=r"gradient of parameter 0, .* is not finite"):
        objective.gradient(slope * math.nan)
    with pytest.raises(ClosureError, match="none of the optimizer's parameters"):
        Objective([{**groups()[0], "params": [nn.Parameter(torch.ones(1), requires_grad=False)]}])


def test_there_and_back() -> None:
    objective = Objective(groups())
    a, b = objective.parameters
    loss = (a**4).sum()
    (before,) = torch.autograd.grad(loss, [a], create_graph=True)
    step = torch.full((7,), 0.1, dtype=torch.float64)
    values = [p.detach().clone() for p in objective.parameters]
    with objective.moved(step) as change:
        assert torch.allclose(b, torch.full_like(b, 2.1))
        assert change(5.0) == pytest.approx(5.0 + 0.5 * 4 * 3 * (2.1**2 - 2**2))
    assert all(torch.equal(p, value) for p, value in zip(objective.parameters, values, strict=True))
    torch.autograd.grad(before.sum(), [a], retain_graph=True)  # the tape is still good
    with pytest.raises(ZeroDivisionError), objective.moved(step):
        raise ZeroDivisionError
    assert all(torch.equal(p, value) for p, value in zip(objective.parameters, values, strict=True))
    objective.move(step)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(before.sum(), [a])


def test_mixed_precision_and_rates() -> None:
    a, b = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(1, dtype=torch.float32))
    common = {"weight_decay": 0.0, "maximize": False}
    objective = Objective([{"params": [a], "lr": torch.tensor(0.1), **common}, {"params": [b], "lr": 0.2, **common}])
    assert objective.dtype == torch.float32
    assert isinstance(objective.rates, torch.Tensor)
    assert objective.rates.tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert [p.dtype for p in objective.parts(torch.zeros(3))] == [torch.bfloat16, torch.float32]
    assert torch.equal(objective.flat([None, b]), torch.tensor([0.0, 0.0, 1.0]))
