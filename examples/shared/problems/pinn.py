"""Physics-informed networks: residuals of differential equations at fixed points, full batch, float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.shared.problems import pinn_equations as equations
from examples.shared.problems.common import measuring, seeded
from examples.shared.problems.pinn_derivatives import WAYS, taylor
from examples.shared.problems.pinn_equations import Equation
from examples.shared.task import Problem, Task
from hessopt import LeastSquares


def network(widths: list[int], scale: float | None = None) -> nn.Sequential:
    """Linear layers with tanh in between, float64.

    Args:
        widths: Of inputs, hidden layers and output.
        scale: Standard deviation of weights and biases (0.1 in the code of Müller and Zeinhofer); None: PyTorch's
            default initialisation.
    """
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, dtype=torch.float64), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    if scale is not None:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=scale)
    return model


def physics_informed(equation: Equation, model: nn.Sequential, derivatives: str) -> Task:
    """The task of an equation, on the model's device.

    Args:
        equation: Its batch is all of its points; one call of the model, and one residual, a point.
        model: Linear and tanh layers.
        derivatives: ``"taylor"`` or ``"autograd"``, see :mod:`ablation.problems.pinn_derivatives`.
    """
    differentiate = WAYS[derivatives]
    device = next(model.parameters()).device
    points, grid, solution = (part.to(device) for part in (equation.points, equation.grid, equation.solution))

    def evaluate_loss(batch: Tensor) -> LeastSquares:
        return LeastSquares(equation.residuals(differentiate(model, batch, equation.second)))

    def residual_rows(rows: Tensor) -> LeastSquares:
        return LeastSquares(equation.residuals(differentiate(model, points[rows], equation.second), rows))

    def measure() -> dict[str, float]:
        with measuring(model):
            error = torch.cat([model(part).squeeze(1) for part in grid.split(2500)]) - solution
            residuals = equation.residuals(taylor(model, points, equation.second))
            return {
                "objective": (error.norm() / solution.norm()).item(),
                "loss": (residuals.square().sum() / 2).item(),
            }

    return Task(
        model,
        itertools.repeat(points),
        evaluate_loss,
        measure,
        full_batch=True,
        residual_rows=residual_rows,
        strata=equation.strata,
    )


def problem(
    name: str, title: str, equation: Callable[[], Equation], widths: list[int], seconds: float, *,
    scale: float | None = None, size: str = "full", derivatives: str = "taylor",
) -> Problem:  # fmt: skip
    """A recipe; see :func:`network` and :func:`physics_informed` for the arguments."""

    def build(seed: int, device: torch.device, data: Path | None) -> Task:
        with seeded(seed):
            model = network(widths, scale).to(device)
        return physics_informed(equation(), model, derivatives)

    shape = "-".join(map(str, widths))
    return Problem(name, "pinn", f"{title}, {shape}", "relative L2 error", build, seconds, size=size)


def problems(derivatives: str = "taylor") -> list[Problem]:
    """All of them, with derivatives by the inputs in the given way."""
    return [
        problem(
            "nonlinear-poisson-1d", "-u'' + u³ = f in 1-D", equations.nonlinear_poisson_1d, [1, 32, 32, 1], 3,
            size="small", derivatives=derivatives,
        ),
        problem(
            "pendulum", "pendulum", equations.pendulum, [1, 32, 32, 1], 3, size="small", derivatives=derivatives
        ),
        problem(
            "poisson-2d", "Poisson in 2-D", equations.poisson_2d, [2, 32, 1], 10, scale=0.1, derivatives=derivatives
        ),
        problem(
            "poisson-2d-deep", "Poisson in 2-D", equations.poisson_2d, [2, 32, 32, 32, 32, 1], 20,
            derivatives=derivatives,
        ),
        problem("heat-2d", "heat equation in 2-D", equations.heat_2d, [3, 32, 32, 1], 20, derivatives=derivatives),
        problem("poisson-5d", "Poisson in 5-D", equations.poisson_5d, [5, 64, 1], 20, derivatives=derivatives),
        problem("burgers", "Burgers", equations.burgers, [2, 24, 24, 24, 24, 1], 20, derivatives=derivatives),
        problem("allen-cahn", "Allen-Cahn", equations.allen_cahn, [2, 32, 32, 32, 32, 1], 20, derivatives=derivatives),
    ]  # fmt: skip


PROBLEMS = problems()
