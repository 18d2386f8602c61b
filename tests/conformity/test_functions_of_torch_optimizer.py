"""torch-optimizer's test functions: from its start to its minimum, within its tolerance, in float32 as there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from hessopt.newton_cg.optimizer import NewtonCG
from hessopt.search.rules import LevenbergMarquardt
from hessopt.wrappers.saddle import SaddleEscape


@dataclass(frozen=True)
class Case:
    function: Callable[[Tensor, Tensor], Tensor]
    minimum: tuple[float, float]


START = (1.5, 1.5)
CASES = {
    "rosenbrock": Case(lambda x, y: (1 - x) ** 2 + (y - x**2) ** 2, (1.0, 1.0)),
    "quadratic": Case(lambda x, y: x**2 + y**2, (0.0, 0.0)),
    "beale": Case(
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2, (3.0, 0.5)
    ),
}
OPTIMIZERS: dict[str, tuple[Callable[[Tensor], Optimizer], int]] = {
    "NewtonCG": (lambda x: NewtonCG([x]), 20),
    "NewtonCG, levenberg-marquardt": (lambda x: NewtonCG([x], method=LevenbergMarquardt()), 30),
    "NewtonCG, lr 0.5": (lambda x: NewtonCG([x], lr=0.5), 40),
    "SaddleEscape(SGD)": (lambda x: SaddleEscape(SGD([x], lr=3e-3, momentum=0.9)), 2000),
    "SaddleEscape(Adam)": (lambda x: SaddleEscape(Adam([x], lr=0.1)), 1200),
}
"""With the number of steps; torch-optimizer's own take 200 to 8000."""


# Its closures do that, and torch tells of the cycle that it makes.
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_finds_the_minimum(case: str, name: str, create_graph: bool, device: torch.device) -> None:
    make, steps = OPTIMIZERS[name]
    x = torch.tensor(START, device=device, requires_grad=True)
    optimizer = make(x)

    def closure() -> Any:
        optimizer.zero_grad()
        f = CASES[case].function(x[0], x[1])
        f.backward(retain_graph=True, create_graph=create_graph)
        return f

    for _ in range(steps):
        optimizer.step(closure)
    x.grad = None  # of the cycle
    assert torch.allclose(x.detach(), torch.tensor(CASES[case].minimum, device=device), atol=1e-3)
    assert type(optimizer).__name__ in repr(optimizer)
