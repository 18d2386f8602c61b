"""NewtonCG solves the test functions of Moré, Garbow and Hillstrom, all of them, from the paper's starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from examples.shared.test_functions import PROBLEMS
from hessopt.closure.protocol import LeastSquares
from hessopt.newton_cg.optimizer import NewtonCG
from hessopt.wrappers.saddle import SaddleEscape

BY_NAME = {problem.name: problem for problem in PROBLEMS}
MAX_STEPS = 400
UNSOLVED: dict[str, str] = {}
"""Name: why. A test fails where one of them is solved."""

ELSEWHERE = {
    "Freudenstein-Roth": 1,  # the local minimum that every descent method reaches from this start
    "trigonometric": 1,
    "Biggs EXP6": 1,  # the saddle
}
"""Which of the published minima is reached where it is not the lowest."""
EARLY = {"Powell badly scaled", "Meyer"}
"""The first gradient is so large (2e4, 9e10) that 1e-8 of it is met well above the minimum."""


def solve(name: str, on_residuals: bool) -> tuple[Tensor, NewtonCG, bool]:
    problem = BY_NAME[name]
    x = problem.x0().requires_grad_()
    optimizer = NewtonCG([x], curvature="auto" if on_residuals else "hessian")

    def closure() -> Tensor | LeastSquares:
        return LeastSquares(2**0.5 * problem.residuals(x)) if on_residuals else problem(x)

    optimizer.step(closure)
    assert optimizer.last_step is not None
    tolerance = 1e-8 * max(1.0, optimizer.last_step.gradient_norm)
    for _ in range(MAX_STEPS):
        before = x.detach().clone()
        optimizer.step(closure)
        if optimizer.last_step.gradient_norm <= tolerance:
            return before, optimizer, True
    return x.detach(), optimizer, False


@pytest.mark.parametrize("on_residuals", [False, True], ids=["hessian", "residuals"])
@pytest.mark.parametrize("name", BY_NAME)
def test_solves(name: str, on_residuals: bool) -> None:
    problem = BY_NAME[name]
    x, _, solved = solve(name, on_residuals)
    assert solved == (name not in UNSOLVED)
    x.requires_grad_()
    f = problem(x)
    (g,) = torch.autograd.grad(f, x)
    (g0,) = torch.autograd.grad(problem(start := problem.x0().requires_grad_()), start)
    assert g.norm() <= 1e-8 * max(1.0, g0.norm())
    if name not in EARLY:
        slack = 1e-7 * max(1.0, problem(start).item())
        assert f.item() == pytest.approx(problem.minima[ELSEWHERE.get(name, 0)].value, rel=1e-4, abs=slack)
    if name != "Biggs EXP6":
        eigenvalues = torch.linalg.eigvalsh(hessian(problem, x.detach()))
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1]


def test_saddle_escape_leaves_the_published_minimum_that_is_a_saddle() -> None:
    """Biggs EXP6: from where NewtonCG, by the start's symmetry, ends, to the lowest minimum."""
    problem = BY_NAME["Biggs EXP6"]
    x, _, solved = solve("Biggs EXP6", on_residuals=False)
    assert solved
    assert problem(x).item() == pytest.approx(5.65565e-3, rel=1e-5)
    x.requires_grad_()
    optimizer = SaddleEscape(torch.optim.LBFGS([x], line_search_fn="strong_wolfe"))
    for _ in range(40):
        optimizer.step(lambda: problem(x))
    assert optimizer.escapes == 1
    assert problem(x).item() < 1e-6
