"""Small problems, contenders and a study for the tests of the ablation framework."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.shared.task import Problem, Task
from examples.studies.ablation.budget import Budget
from examples.studies.ablation.contender import Contender, Finished, GradientStep
from examples.studies.ablation.study import Session, Study
from examples.studies.ablation.table import Table
from hessopt import LeastSquares

LONG = Budget(1e6, 1e6)


def build(seed: int, device: torch.device, data: Path | None, *, batches: int = 0) -> Task:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, generator=draw)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)
    loss = nn.MSELoss()

    def evaluate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z = net(batch[0])
        return loss(z, batch[1]), z

    def some() -> Any:
        while True:
            chosen = torch.randint(32, (batches,), generator=draw)
            yield x[chosen], y[chosen]

    @torch.no_grad()
    def measure() -> dict[str, float]:
        torch.rand(3)  # a measurement that draws must not change the run
        return {"objective": loss(net(x), y).item()}

    def residual_rows(rows: Tensor) -> LeastSquares:
        return LeastSquares((net(x[rows]) - y[rows]) * (2 / y.numel()) ** 0.5)

    stream = some() if batches else itertools.repeat((x, y))
    return Task(net, stream, evaluate, measure, not batches, loss, lambda batch: batch, None, residual_rows, (32,))


def build_batches(seed: int, device: torch.device, data: Path | None) -> Task:
    return build(seed, device, data, batches=8)


FULL = Problem("full", "a", "Full batch", "loss", build, 1.0)
BATCHES = Problem("batches", "b", "Mini-batches", "loss", build_batches, 1.0)


def contender(name: str, build: Any, **more: Any) -> Contender:
    return Contender(name, name, build, more.pop("grid", [{}]), **more)


def steps(count: int) -> Any:
    """SGD that ends by itself."""

    class Some(GradientStep):
        taken = 0

        def step(self, batch: Any) -> float:
            if self.taken == count:
                raise Finished("enough")
            self.taken += 1
            return super().step(batch)

    return lambda task, lr=0.1: Some(task, torch.optim.SGD(task.model.parameters(), lr=lr))


SGD = contender("sgd", steps(5), grid=[{"lr": 0.1}, {"lr": 0.3}, {"lr": 1e-4}])
OURS = contender("ours", steps(6), grid=[{"lr": 0.01}, {"lr": 0.3}, {"lr": 1e-4}], ours=True)
NEVER = contender("never", lambda task, **_: GradientStep(task, schedule="none such"), grid=SGD.grid)


def session(path: Path, **changes: Any) -> Session:
    settings: dict[str, Any] = {
        "problems": ["full", "batches"],
        "contenders": ["sgd", "ours", "never"],
        "seeds": [1, 2, 3],
        "seconds": 1e6,
        "gradient_equivalents": 100.0,
        "variants": {"fast": {"contender": "ours", "lr": 0.2}},
    }
    study = Study("toy", **{**settings, **changes})
    problems = {problem.name: problem for problem in (FULL, BATCHES)}
    return Session(study, Table(path), problems, {c.name: c for c in (SGD, OURS, NEVER)})


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for row in rows:
        curve = [point[1:] for point in row["curve"]]
        kept.append({**row, "seconds": None, "curve": curve})
    return kept
