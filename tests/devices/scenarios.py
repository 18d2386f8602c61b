"""One step of every optimizer, and one call of every tool, watched on the pretended accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import diagnostics
from diagnostics.training.monitor import MonitorLimits
from hessopt import (
    BandedNewton,
    KroneckerAveraging,
    KroneckerCoordinates,
    KroneckerNewton,
    LeastSquares,
    NewtonCG,
    PowerLaw,
    SaddleEscape,
    SpectralNewton,
)
from tests.helpers.pretend_device import Traffic, watch

PRODUCTS = 4
"""Of iterative methods: so few that all are needed, whatever rounding does."""
SETTLED, INTERVAL = 16, 8
"""Steps until updates come at their intervals, and the longest of these."""


@dataclass
class Task:
    device: torch.device

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = {"generator": generator, "dtype": torch.float64}
        self.x = torch.randn(64, 6, **draw).to(self.device)
        self.y = torch.randint(3, (64,), generator=generator).to(self.device)
        self.targets = torch.randn(64, 3, **draw).to(self.device)
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
        self.net = nn.Sequential(*layers).double().to(self.device)
        self.loss = nn.CrossEntropyLoss()

    def value(self) -> Tensor:
        loss: Tensor = self.loss(self.net(self.x), self.y)
        return loss

    def rows(self, rows: Tensor) -> LeastSquares:
        return LeastSquares((self.net(self.x[rows]) - self.targets[rows]) / 8)


def plain(make: Callable[[Task], Any]) -> Callable[[Task], Callable[[], None]]:
    def build(task: Task) -> Callable[[], None]:
        optimizer = make(task)

        def step() -> None:
            optimizer.zero_grad()
            task.value().backward()
            optimizer.step()

        return step

    return build


def closed(make: Callable[[Task], Any], backward: bool = False) -> Callable[[Task], Callable[[], None]]:
    def build(task: Task) -> Callable[[], None]:
        optimizer = make(task)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = task.value()
            if backward:
                loss.backward()
            return loss

        return lambda: optimizer.step(closure)

    return build


def on_rows(task: Task) -> Callable[[], None]:
    optimizer = BandedNewton(task.net, rows=64)
    return lambda: optimizer.step(task.rows)


def hessian_product(task: Task) -> Callable[[], None]:
    op = diagnostics.HessianOperator(task.net, [(task.x, task.y)], functional.cross_entropy)
    v = torch.ones(op.shape[0], dtype=torch.float64, device=task.device)
    return lambda: op @ v


def estimate(task: Task) -> Callable[[], None]:
    graph = diagnostics.capture(task.net, task.x, lambda z: functional.cross_entropy(z, task.y))
    return lambda: diagnostics.estimate_metrics(graph, probes=4)


def monitored(task: Task) -> Callable[[], None]:
    monitor = diagnostics.Monitor(
        task.net, functional.cross_entropy, probes=4, limits=MonitorLimits(max_products=PRODUCTS)
    )
    return lambda: monitor.measure((task.x, task.y))


AVERAGES = KroneckerAveraging(factor_every=4, inverse_every=8)
COORDINATES = KroneckerCoordinates(averages=KroneckerAveraging(0.95, factor_every=4, inverse_every=8, rows=4))
AVERAGING: dict[str, Callable[[Task], Callable[[], None]]] = {
    "SpectralNewton": plain(lambda t: SpectralNewton(t.net, t.loss, coordinates=COORDINATES)),
    "KroneckerNewton": plain(lambda t: KroneckerNewton(t.net, loss=t.loss, averages=AVERAGES)),
    'KroneckerNewton(bandwidth="auto")': plain(
        lambda t: KroneckerNewton(t.net, loss=t.loss, averages=AVERAGES, bandwidth="auto")
    ),
}
"""Whose steps differ: updates and refreshes at intervals."""
STEADY: dict[str, Callable[[Task], Callable[[], None]]] = {
    "SpectralNewton(PowerLaw)": plain(lambda t: SpectralNewton(t.net, coordinates=PowerLaw())),
    "NewtonCG": closed(lambda t: NewtonCG(t.net, curvature="hessian", max_products=PRODUCTS, forcing=1e-9)),
    "BandedNewton": closed(lambda t: BandedNewton(t.net)),
    "BandedNewton(rows=)": on_rows,
    "SaddleEscape(AdamW)": closed(
        lambda t: SaddleEscape(torch.optim.AdamW(t.net.parameters()), model=t.net, max_products=PRODUCTS), backward=True
    ),
    "HessianOperator @ v": hessian_product,
    "estimate_metrics": estimate,
    "Monitor.measure": monitored,
}
"""The first step or call, which checks and sets up, and the third."""


def traffic(device: torch.device) -> Iterator[tuple[str, Traffic]]:
    """What goes between host and device, by ``"what: when"``."""
    for name, build in AVERAGING.items():
        step = build(Task(device))
        for _ in range(SETTLED):
            step()
        steps = [watched(step) for _ in range(INTERVAL)]
        steps.sort(key=lambda t: (t.reads.total(), t.copies.total()))
        yield f"{name}: between refreshes", steps[INTERVAL // 2]
        yield f"{name}: refresh", steps[-1]
    for name, build in STEADY.items():
        step = build(Task(device))
        steps = [watched(step) for _ in range(3)]
        yield f"{name}: first", steps[0]
        yield f"{name}: later", steps[2]


def watched(step: Callable[[], None]) -> Traffic:
    with watch() as found:
        step()
    return found
