"""The examples' test functions against the paper: formulas, derivatives and published minima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, least_squares
from torch.autograd.functional import hessian, jacobian

from examples.shared.test_functions import PROBLEMS, Minimum, Problem
from tests.examples import more_garbow_hillstrom as reference

BY_NAME = {problem.name: problem for problem in PROBLEMS}
START = {
    "Rosenbrock": 24.2, "Freudenstein-Roth": 400.5, "Beale": 14.203125, "helical valley": 2500, "Powell singular": 215,
    "Wood": 19192, "Brown-Dennis": 7926693.336997432, "Watson, n = 6": 30, "Brown badly scaled": 999998000003.0,
    "variably dimensioned": sum((j / 10) ** 2 for j in range(1, 11)) + 38.5**2 + 38.5**4,
}  # fmt: skip
"""f(x₀) as others print it, or by hand."""

parametrize = pytest.mark.parametrize("name", BY_NAME)


def points(problem: Problem) -> list[np.ndarray]:
    """The start, and three points at random about it."""
    start = np.array(problem.start)
    noise = np.random.default_rng(0).uniform(-1, 1, (3, problem.dimension))
    return [start, *(start + 0.1 * noise * np.maximum(abs(start), 0.1))]


def test_names_and_numbers() -> None:
    assert len(BY_NAME) == len(PROBLEMS) >= 30
    assert {problem.number for problem in PROBLEMS} == set(range(1, 36))


@parametrize
def test_residuals_are_the_papers(name: str) -> None:
    problem = BY_NAME[name]
    for x in points(problem):
        r = problem.residuals(torch.from_numpy(x)).numpy()
        expected = reference.reference(problem.number, x)
        # 1e-12 of the terms that cancel in a residual: the data and x itself
        assert np.allclose(r, expected, rtol=1e-11, atol=1e-12 * max(1, abs(expected).max()))
        assert problem(torch.from_numpy(x)).item() == pytest.approx(float(expected @ expected), rel=1e-11)


@parametrize
def test_start_is_the_papers(name: str) -> None:
    problem = BY_NAME[name]
    assert problem.start == pytest.approx(reference.start(problem.number, problem.dimension), rel=1e-15)


@pytest.mark.parametrize("name", START)
def test_values_at_the_start(name: str) -> None:
    assert BY_NAME[name](BY_NAME[name].x0()).item() == pytest.approx(START[name], rel=1e-12)


@parametrize
def test_derivatives(name: str) -> None:
    """Jacobian and gradient to rounding; columns of the Hessian to the error of a central difference."""
    problem = BY_NAME[name]
    x = points(problem)[1]
    point = torch.from_numpy(x)
    dr, g = reference.jacobian_of(problem.number, x), reference.gradient(problem.number, x)
    assert np.allclose(jacobian(problem.residuals, point).numpy(), dr, rtol=1e-9, atol=1e-12 * abs(dr).max())
    assert np.allclose(jacobian(problem, point).numpy(), g, rtol=1e-8, atol=1e-11 * abs(g).max())
    h = hessian(problem, point).numpy()
    scales = np.sqrt(abs(h).max(axis=1))
    for j in range(0, problem.dimension, 1 + problem.dimension // 12):
        column, rounding = reference.hessian_column(problem.number, x, j)
        assert (abs(h[:, j] - column) <= 1e-6 * scales * scales[j] + rounding).all()


EXACT = [(p.name, i) for p in PROBLEMS for i, minimum in enumerate(p.minima) if minimum.point is not None]


@pytest.mark.parametrize(("name", "index"), EXACT)
def test_published_minimizers(name: str, index: int) -> None:
    problem, minimum = BY_NAME[name], BY_NAME[name].minima[index]
    assert minimum.point is not None
    x = torch.tensor(minimum.point, dtype=torch.float64, requires_grad=True)
    f = problem(x)
    (g,) = torch.autograd.grad(f, x)
    sizes = jacobian(problem.residuals, x.detach()).abs().sum().item()
    assert f.item() == pytest.approx(minimum.value, rel=1e-12, abs=1e-15)
    assert g.norm().item() <= 1e-13 * max(1, sizes) ** 2
    # flat directions at worst: within rounding there is no way down
    assert torch.linalg.eigvalsh(hessian(problem, x.detach()))[0] >= -1e-8 * max(1, sizes)


def minimize(problem: Problem, start: np.ndarray) -> np.ndarray:
    """Levenberg-Marquardt of MINPACK on the residuals written down here."""
    found = least_squares(
        lambda x: reference.reference(problem.number, x).real,
        start,
        lambda x: reference.jacobian_of(problem.number, x),
        method="lm",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=5000,
    )
    return np.asarray(found.x)


ELSEWHERE = {
    ("Freudenstein-Roth", 0): (4.0, 3.0),
    ("Bard", 1): None,
    ("Kowalik-Osborne", 1): None,
    ("Biggs EXP6", 0): (1.1, 9.0, 1.1, 4.5, 3.5, 2.5),
}
"""Where the start leads to another minimum: a start for this one; None where it lies at infinity."""
VALUES = [(p.name, i) for p in PROBLEMS for i, m in enumerate(p.minima) if m.point is None and not m.saddle]


@pytest.mark.parametrize(("name", "index"), VALUES)
def test_published_values(name: str, index: int) -> None:
    """Where the paper gives digits only: to those, and stationary."""
    problem, minimum = BY_NAME[name], BY_NAME[name].minima[index]
    start = ELSEWHERE.get((name, index), problem.start)
    if start is None:
        pytest.skip("at infinity")
    x = torch.from_numpy(minimize(problem, np.array(start))).requires_grad_()
    f = problem(x)
    (g,) = torch.autograd.grad(f, x)
    (g0,) = torch.autograd.grad(problem(x0 := problem.x0().requires_grad_()), x0)
    assert f.item() == pytest.approx(minimum.value, rel=6e-6, abs=1e-20)
    assert g.norm() <= 1e-8 * max(1, g0.norm())


def test_minimum_of_powell_badly_scaled() -> None:
    """``10⁴ ab = 1`` and ``e⁻ᵃ + e⁻ᵇ = 1.0001``: the paper prints (1.098e-5, 9.106)."""
    b = brentq(lambda b: math.expm1(-1e-4 / b) + math.exp(-b) - 1e-4, 9, 10, xtol=1e-15)
    assert (float(f"{1e-4 / b:.3e}"), float(f"{b:.3f}")) == (1.098e-5, 9.106)
    assert BY_NAME["Powell badly scaled"](torch.tensor([1e-4 / b, b], dtype=torch.float64)).item() < 1e-25


def test_a_published_minimum_that_is_a_saddle() -> None:
    """Biggs EXP6: the minimum over the subspace x₁ = x₅, x₃ = x₆ that the start lies in, with λ < 0 across it."""
    problem = BY_NAME["Biggs EXP6"]
    embedding = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]])
    found = least_squares(
        lambda y: reference.reference(18, embedding @ y).real,
        np.array(problem.start)[:4],
        lambda y: reference.jacobian_of(18, embedding @ y) @ embedding,
        method="lm",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    x = torch.from_numpy(embedding @ found.x)
    assert problem(x).item() == pytest.approx(problem.minima[1].value, rel=6e-6)
    assert problem.minima[1].saddle
    assert jacobian(problem, x).norm() < 1e-9
    values, vectors = torch.linalg.eigh(hessian(problem, x))
    assert values[0] < -1e-3
    across = torch.tensor([1, 0, 0, 0, -1, 0], dtype=torch.float64) / math.sqrt(2)
    assert abs(vectors[:, 0] @ across) > 0.99


def test_the_whole_set_of_minimizers_of_the_singular_ones() -> None:
    """Box: every (a, a, 0). Rank 1: every x of the same ``Σ j x_j``."""
    for a in (0.5, 4.0):
        assert BY_NAME["Box"](torch.tensor([a, a, 0.0], dtype=torch.float64)).item() == 0
    for name, weights in (
        ("linear, rank 1", torch.arange(1.0, 11)),
        ("linear, rank 1, zeros", torch.cat([torch.zeros(1), torch.arange(2.0, 10), torch.zeros(1)])),
    ):
        problem: Problem = BY_NAME[name]
        minimum: Minimum = problem.minima[0]
        x = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        w = weights.double()
        x += w * (w @ (torch.tensor(minimum.point, dtype=torch.float64) - x)) / (w @ w)
        assert problem(x).item() == pytest.approx(minimum.value, rel=1e-12)
