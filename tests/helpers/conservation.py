"""Small trainings whose drift must be the identity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.conservation.monitor import ConservationMonitor, ConservationReport

STEPS = 200
TOLERANCE = 1e-10  # absolute, float64; C is of order 10 and the drifts are 1e-4 to 10


def mlp(*between: nn.Module, bias: bool = False, widths: tuple[int, ...] = (6, 12, 9, 3)) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b, bias=bias), *(copy.deepcopy(between) if i < len(widths) - 2 else ())]
    return nn.Sequential(*layers).double()


def data_of(device: torch.device | str = "cpu", *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, *(shape or (6,)), generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(3, (32,), generator=generator).to(device)


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    steps: int = STEPS,
    batch: int | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    schedule: Callable[[int], float] | None = None,
    decoupled: float = 0.0,
    before_step: Callable[[nn.Module], Any] | None = None,
    **settings: Any,
) -> ConservationReport:
    x, y = data
    opt = optimizer(model.parameters(), **{"lr": 0.1, **settings})
    monitor = ConservationMonitor(model, x, decoupled_weight_decay=decoupled)
    detach = monitor.attach(opt)
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        rows = slice(None) if batch is None else torch.randperm(len(x), generator=generator)[:batch].to(x.device)
        if schedule is not None:
            opt.param_groups[0]["lr"] = schedule(step)
        opt.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        if before_step is not None:
            before_step(model)
        if decoupled:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 - opt.param_groups[0]["lr"] * decoupled)
        opt.step()
    detach()
    return monitor.report()


def check(report: ConservationReport, *, quantities: int, least_drift: float = 1e-6) -> None:
    assert len(report.drifts) == quantities
    for drift in report.drifts:
        assert drift.exact, drift.reason
        assert drift.residual is not None
        assert drift.drift.abs().sum() > least_drift  # there was something to predict
        assert drift.residual.abs().max() <= TOLERANCE, drift.quantity.name
        assert drift.healthy
    assert report.healthy
