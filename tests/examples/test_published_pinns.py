"""ENGD-W and SPRING against dense algebra in the space of parameters, on the problems of their authors."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor, nn

from examples.benchmarks import published_pinns as published
from examples.benchmarks.published_pinns import PROBLEMS, Ours, Published, Rival, Spring, linearized, pulled
from examples.shared.problems.pinn import network
from examples.shared.problems.pinn_derivatives import autograd, taylor

F64 = torch.float64
each = pytest.mark.parametrize("name", PROBLEMS)


def small(name: str) -> tuple[nn.Sequential, Published]:
    torch.manual_seed(0)
    problem = PROBLEMS[name]
    return network([5, 4, 3, 1]), Published(problem.draw, problem.solution, (5, 4, 3, 1), {})


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@each
def test_solutions_satisfy_the_equations_and_points_lie_where_they_should(name: str) -> None:
    problem = PROBLEMS[name]
    equation = problem.draw(200, 60, generator())
    exact = equation.residuals(autograd(lambda x: problem.solution(x).unsqueeze(1), equation.points, equation.second))
    assert exact.abs().max() < 1e-13
    bent = autograd(lambda x: (problem.solution(x) + x[:, 0] ** 2 + 0.1).unsqueeze(1), equation.points, equation.second)
    assert all(part.abs().max() > 1e-3 for part in equation.residuals(bent).split([200, 60]))
    inside, known = (condition.points for condition in equation.conditions)
    assert ((inside > 0) & (inside < 1)).all()
    sides, start = (known, known[:0]) if name == "poisson-5d" else known.split(30)
    space = sides if name == "poisson-5d" else sides[:, :4]
    assert (((space == 0) | (space == 1)).sum(dim=1) == 1).all()
    assert (start[:, 4:] == 0).all()
    # The loss is half of the mean squares of both.
    model, _ = small(name)
    jet = taylor(model, equation.points, equation.second)
    loss = equation.residuals(jet).square().sum() / 2
    parts = [c.residual(j) for c, j in zip(equation.conditions, jet.split([200, 60]), strict=True)]
    assert loss.item() == pytest.approx(sum(part.square().mean().item() / 2 for part in parts), rel=1e-12)


@each
def test_jacobian_row_by_row(name: str) -> None:
    model, problem = small(name)
    equation = problem.draw(6, 4, generator())
    residuals = equation.residuals(autograd(model, equation.points, equation.second))
    expected = [
        torch.cat([
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(
                torch.autograd.grad(r, list(model.parameters()), retain_graph=True, allow_unused=True),
                model.parameters(), strict=True,
            )
        ])
        for r in residuals
    ]  # fmt: skip
    rows = torch.full((10, sum(p.numel() for p in model.parameters())), float("nan"), dtype=F64)
    found = linearized(model, equation, rows)
    torch.testing.assert_close(found, residuals.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_phi_is_the_damped_step_that_is_pulled_towards_the_last(momentum: float) -> None:
    """The least of ``|J φ + r|² + λ |φ - μ φ₀|²``, whose normal equations have the size of the parameters."""
    draw = generator()
    rows, r, phi = (torch.randn(*shape, dtype=F64, generator=draw) for shape in ((5, 8), (5,), (8,)))
    normal = rows.T @ rows + 0.3 * torch.eye(8, dtype=F64)
    expected = torch.linalg.solve(normal, -rows.T @ r + 0.3 * momentum * phi)
    torch.testing.assert_close(pulled(rows, r, phi, 0.3, momentum), expected, rtol=1e-11, atol=1e-12)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("settings", [Rival(1e-2, 0.5, 0.01, (30, 10)), Rival(1e-2, 0.0, 0.1, (30, 10))])
def test_steps_of_constant_length(settings: Rival) -> None:
    model, problem = small("poisson-5d")
    spring = Spring(model, problem, settings, seed=3)
    draw, phi = torch.Generator().manual_seed(3), torch.zeros_like(flat(model))
    for k in (1, 2, 3):
        equation, before = problem.draw(30, 10, draw), flat(model)
        rows = torch.zeros(40, len(phi), dtype=F64)
        r = linearized(model, equation, rows)
        phi = pulled(rows, r, phi, settings.damping, settings.momentum)
        spring.step()
        length = 0.1 if not settings.momentum else min(0.01, 1e-3**0.5 / phi.norm().item())
        direction = phi / (1 - settings.momentum ** (2 * k)) ** 0.5
        torch.testing.assert_close(flat(model) - before, length * direction, rtol=1e-9, atol=1e-12)


def test_the_grid_has_the_lowest_loss() -> None:
    model, problem = small("heat-4d")
    spring = Spring(model, problem, Rival(1e-6, 0.0, None, (30, 10)), seed=1)
    equation = problem.draw(30, 10, torch.Generator().manual_seed(1))

    def loss() -> float:
        return equation.residuals(taylor(model, equation.points, equation.second)).square().sum().item()

    before, start = loss(), flat(model)
    spring.step()
    found, step = loss(), flat(model) - start
    length = (step.norm() / spring.phi.norm()).item()
    assert found < before
    assert min(abs(length / 2.0**-k - 1) for k in range(31)) < 1e-9
    for factor in (0.5, 2.0):
        if factor * length <= 1:
            published.write(start + factor * step, list(model.parameters()))
            assert loss() >= found


def test_ours_has_the_rows_of_points_that_stay() -> None:
    model, problem = small("poisson-5d")
    ours = Ours(model, problem, seed=0)
    equation = problem.draw(3000, 500, generator())
    assert torch.equal(ours.points, equation.points)
    whole = equation.residuals(taylor(model, equation.points, equation.second))
    rows = torch.tensor([0, 2999, 3000, 3499])
    torch.testing.assert_close(ours._closure(rows).residuals, whole[rows], rtol=1e-10, atol=1e-13)


def test_the_script_runs_and_says_why_a_method_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    settings = {"good": Rival(1e-3, 0.9, 0.01, (20, 10)), "singular": Rival(0.0, points=(20, 10))}
    tiny = Published(PROBLEMS["heat-4d"].draw, PROBLEMS["heat-4d"].solution, (5, 2, 1), settings)
    monkeypatch.setattr(published, "PROBLEMS", {"tiny": tiny})
    monkeypatch.setattr(sys, "argv", ["published_pinns", "--seconds", "0.05"])
    try:
        published.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines]
    assert names == ["tiny", "---", "BandedNewton, random rows", "good", "singular"]
    assert "| 1, J Jᵀ + λ I is not positive definite" in lines[-1]
    good = [float(cell) for cell in itertools.islice(lines[-2].split(" | "), 1, 5)]
    assert all(0 < error < 10 for error in good)
