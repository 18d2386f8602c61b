"""The physics-informed problems: derivatives, equations and reference solutions, all against something independent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.interpolate import CubicSpline
from torch import Tensor, nn
from torch.autograd.functional import hessian

from examples.gallery import burgers as gallery
from examples.shared.problems import pinn
from examples.shared.problems import pinn_equations as equations
from examples.shared.problems import pinn_references as references
from examples.shared.problems.pinn_derivatives import autograd, taylor

CPU = torch.device("cpu")
NAMES = [problem.name for problem in pinn.PROBLEMS]
BUILDERS = {
    "nonlinear-poisson-1d": equations.nonlinear_poisson_1d,
    "pendulum": equations.pendulum,
    "poisson-2d": equations.poisson_2d,
    "poisson-5d": equations.poisson_5d,
    "heat-2d": equations.heat_2d,
    "burgers": equations.burgers,
    "allen-cahn": equations.allen_cahn,
}
each = pytest.mark.parametrize("name", BUILDERS)


def net(inputs: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return pinn.network([inputs, 6, 5, 1], scale=0.8)


@pytest.mark.parametrize("second", [(1.0, 0.0, 2.5), (0.3, -1.0, 1.0)])
def test_derivatives_against_finite_differences(second: tuple[float, ...]) -> None:
    model, x = net(3), torch.randn(7, 3, dtype=torch.float64)
    jet = taylor(model, x, second)
    assert torch.equal(jet.value, model(x).squeeze(1))
    h = 1e-4
    expected = torch.zeros(7, dtype=torch.float64)
    for k, c in enumerate(second):
        step = h * torch.eye(3, dtype=torch.float64)[k]
        ahead, behind = (model(x + s * step).squeeze(1) for s in (1, -1))
        assert torch.allclose(jet.gradient[:, k], (ahead - behind) / (2 * h), atol=1e-7)
        expected = expected + c * (ahead - 2 * jet.value + behind) / h**2
    assert torch.allclose(jet.second, expected, atol=1e-6)  # h²/12 of a fourth derivative, ε/h² of rounding


@pytest.mark.parametrize("second", [(1.0, 0.0, 2.5), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0)])
def test_both_ways_of_differentiating_agree(second: tuple[float, ...], device: torch.device) -> None:
    model, x = net(3).to(device), torch.randn(7, 3, dtype=torch.float64).to(device)
    gradients = []
    for differentiate in (taylor, autograd):
        jet = differentiate(model, x, second)
        mixed = (jet.value.sin() + jet.gradient.square().sum(1) + jet.second**2).sum()
        gradients.append([mixed, *torch.autograd.grad(mixed, list(model.parameters()))])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_taylor_refuses_other_layers() -> None:
    with pytest.raises(TypeError, match="not Sigmoid"):
        taylor(nn.Sequential(nn.Linear(1, 2), nn.Sigmoid(), nn.Linear(2, 1)), torch.zeros(3, 1), (1.0,))


def test_autograd_works_where_gradients_are_disabled() -> None:
    model, x = net(2), torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        jet = autograd(model, x, (1.0, 1.0))
    assert torch.allclose(jet.second, taylor(model, x, (1.0, 1.0)).second, rtol=1e-12)
    assert not x.requires_grad


@pytest.mark.parametrize("derivatives", ["taylor", "autograd"])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_called_once_and_residual_b_belongs_to_point_b(name: str, derivatives: str) -> None:
    (problem,) = (p for p in pinn.problems(derivatives) if p.name == name)
    task = problem.build(0, CPU, None)
    calls: list[torch.Size] = []
    for module in task.model:
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    points = next(task.batches)
    residuals = task.evaluate_loss(points).residuals
    linears = [module for module in task.model if isinstance(module, nn.Linear)]
    assert calls == [(len(points), linear.in_features) for linear in linears]
    assert residuals.shape == (len(points),)
    moved = points.clone()
    moved[::7] *= 0.9  # where 0 stays 0 the residual does as well
    changed = task.evaluate_loss(moved).residuals != residuals
    different = (moved != points).any(dim=1)
    # A residual that vanishes or rounds to the same number is possible, but for few.
    assert not changed[~different].any()
    assert changed[different].sum() > 0.9 * different.sum()


@each
def test_exact_solutions_satisfy_everything(name: str) -> None:
    equation = BUILDERS[name]()
    if equation.exact is None:
        pytest.skip("its solution cannot be differentiated; see the tests of the references")
    residuals = equation.residuals(autograd(equation.exact, equation.points, equation.second))
    # Burgers: terms of 1e4 about the shock cancel, by quadrature to 1e-13 of u.
    tolerance = 1e-8 if name == "burgers" else 1e-12
    assert residuals.abs().max() < tolerance
    # And what is no solution does not: every condition sees the scaled one, apart from those that vanish there.
    exact = equation.exact
    wrong = equation.residuals(autograd(lambda p: 1.1 * exact(p) + 0.1, equation.points, equation.second))
    sizes = [len(condition.points) for condition in equation.conditions]
    assert all(part.abs().max() > 1e-3 for part in wrong.split(sizes)[1:])
    bent = equation.residuals(autograd(lambda p: exact(p) + 0.1 * p[:, :1] ** 2, equation.points, equation.second))
    assert bent.split(sizes)[0].abs().max() > 1e-4


def laplacian(model: nn.Module, p: Tensor) -> Tensor:
    """One point after the other, by the Hessian."""
    return torch.stack([hessian(lambda x: model(x).squeeze(), point).trace() for point in p])


def test_loss_of_poisson_by_hand() -> None:
    equation = equations.poisson_2d()
    inside, boundary = (condition.points for condition in equation.conditions)
    assert (inside.shape, boundary.shape) == ((900, 2), (120, 2))
    assert ((inside > 0) & (inside < 1)).all()
    on_side = ((boundary == 0) | (boundary == 1)).sum(dim=1)
    assert (on_side == 1).all()
    assert [int((boundary[:, k] == side).sum()) for k in (0, 1) for side in (0, 1)] == [30, 30, 30, 30]
    torch.manual_seed(0)
    model = pinn.network([2, 32, 1], scale=0.5)
    task = pinn.physics_informed(equation, model, "taylor")
    source = 2 * math.pi**2 * torch.sin(math.pi * inside[:, 0]) * torch.sin(math.pi * inside[:, 1])
    expected = (laplacian(model, inside) + source).square().mean() + 4 * model(boundary).square().mean()
    assert task.evaluate_loss(next(task.batches)).loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert task.measure()["loss"] == pytest.approx(expected.item(), rel=1e-12)


@each
def test_grids_reach_everywhere_and_conditions_lie_where_they_should(name: str) -> None:
    equation = BUILDERS[name]()
    low, high = equation.grid.min(dim=0).values, equation.grid.max(dim=0).values
    for condition in equation.conditions:
        assert (condition.points >= low - 0.06).all()
        assert (condition.points <= high + 0.06).all()
    inside, *others = (condition.points for condition in equation.conditions)
    assert len(inside.unique(dim=0)) == len(inside)
    for k in range(inside.shape[1]):
        assert inside[:, k].min() < low[k] + 0.1
        assert inside[:, k].max() > high[k] - 0.1
    edges = {round(v.item(), 9) for points in others for column in points.T for v in (column.min(), column.max())}
    assert 0.0 in edges or -1.0 in edges
    assert equation.solution.shape == (len(equation.grid),)


def test_faces_of_the_5d_cube_get_the_same_number_of_points() -> None:
    boundary = equations.poisson_5d().conditions[1].points
    assert [int((boundary[:, k] == side).sum()) for k in range(5) for side in (0, 1)] == [50] * 10
    sides = equations.heat_2d().conditions[2].points
    assert [int((sides[:, k] == side).sum()) for k in range(3) for side in (0, 1)] == [64] * 4 + [0, 0]
    assert (equations.heat_2d().conditions[1].points[:, 2] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_objective_is_the_relative_error(name: str) -> None:
    (problem,) = (p for p in pinn.PROBLEMS if p.name == name)
    task = problem.build(0, CPU, None)
    with torch.no_grad():
        for p in task.model.parameters():
            p.zero_()
    assert task.measure()["objective"] == pytest.approx(1, rel=1e-12)  # |0 - u| / |u|
    last = task.model[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.fill_(0.5)
    solution = BUILDERS[name.removesuffix("-deep")]().solution
    expected = (0.5 - solution).norm() / solution.norm()
    assert task.measure()["objective"] == pytest.approx(expected.item(), rel=1e-12)


def test_pendulum() -> None:
    t = np.linspace(0, 8, 801)
    u = references.pendulum(t, 2.0)
    solved = solve_ivp(lambda _, s: [s[1], -np.sin(s[0])], (0, 8), [2.0, 0.0], "DOP853", t, rtol=1e-12, atol=1e-12)
    assert np.abs(u - solved.y[0]).max() < 1e-9
    equation = equations.pendulum()
    assert np.allclose(equation.solution, references.pendulum(equation.grid[:, 0].numpy(), 2.0))
    # The conditions, with the derivatives of the integrator.
    moments = equation.conditions[0].points[:, 0].numpy()
    found = solve_ivp(
        lambda _, s: [s[1], -np.sin(s[0])], (0, 8), [2.0, 0.0], "DOP853", moments, rtol=1e-12, atol=1e-12
    ).y
    value = torch.from_numpy(np.concatenate([found[0], [2.0, 2.0]]))
    gradient = torch.from_numpy(np.concatenate([found[1], [0.0, 0.0]])).unsqueeze(1)
    second = torch.from_numpy(-np.sin(np.concatenate([found[0], [2.0, 2.0]])))
    jet = equations.Jet(equation.points, value, gradient, second)
    assert equation.residuals(jet).abs().max() < 1e-12
    assert equation.residuals(equations.Jet(equation.points, value + 0.1, gradient + 0.2, second))[-2:].tolist() == (
        pytest.approx([0.1 * 20**0.5, 0.2 * 20**0.5])
    )


def test_burgers_against_adaptive_quadrature() -> None:
    """The same integrals, in the variable of the initial position, by QUADPACK."""
    nu = 0.01 / math.pi
    for x, t in [(0.3, 0.2), (-0.05, 0.5), (0.01, 0.9), (0.7, 1.0), (0.002, 0.4)]:

        def exponent(y: float, x: float = x, t: float = t) -> float:
            return -math.cos(math.pi * y) / (2 * math.pi * nu) - (x - y) ** 2 / (4 * nu * t)

        ys = np.linspace(x - 2, x + 2, 4001)
        peak = max(exponent(y) for y in ys)
        peaks = [y for y in ys[1:-1] if exponent(y) > max(exponent(y - 1e-3), exponent(y + 1e-3))]
        options = {"points": peaks, "limit": 500, "epsabs": 1e-14, "epsrel": 1e-12}
        top, _ = quad(lambda y, e=exponent, p=peak, x=x, t=t: (x - y) / t * math.exp(e(y) - p), x - 2, x + 2, **options)
        bottom, _ = quad(lambda y, e=exponent, p=peak: math.exp(e(y) - p), x - 2, x + 2, **options)
        found = references.burgers(torch.tensor([[x, t]], dtype=torch.float64)).item()
        assert found == pytest.approx(top / bottom, abs=1e-9)


def test_burgers_shock_has_the_published_slope() -> None:
    """Basdevant et al. 1986: max -u_x at x = 0 is 152.00516, at t = 1.6037 / π."""
    t = torch.linspace(1.55, 1.65, 1001, dtype=torch.float64) / math.pi
    points = torch.stack([torch.zeros_like(t), t], dim=1)
    slope = -autograd(references.burgers, points, (0.0, 0.0)).gradient[:, 0]
    assert slope.max().item() == pytest.approx(152.00516, abs=1e-5)
    assert t[slope.argmax()].item() * math.pi == pytest.approx(1.6037, abs=2e-4)


def test_burgers_symmetry_ends_and_start() -> None:
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    for t in (0.0, 0.1, 0.6, 1.0):
        u = references.burgers(torch.stack([x, torch.full_like(x, t)], dim=1)).squeeze(1)
        assert torch.allclose(u, -u.flip(0), atol=1e-12)
        assert abs(u[0]) < 1e-12
        if t == 0:
            assert torch.allclose(u, -torch.sin(math.pi * x), atol=1e-14)
    few, many = (references.burgers(equations.burgers().grid, nodes) for nodes in (120, 200))
    assert (few - many).abs().max() < 1e-10


def test_burgers_of_another_viscosity_satisfies_the_conditions_of_the_gallery() -> None:
    """And what is no solution does not."""
    viscosity = 0.03 / math.pi

    class Exact(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return self.factor * references.burgers(points, viscosity=viscosity)

        factor = 1.0

    net = Exact()
    inside, start, ends = gallery.conditions(viscosity)
    # By quadrature to 1e-13 of u, whose terms are of size 1e3 about the front.
    for part, tolerance in ((inside, 1e-8), (start, 1e-12), (ends, 1e-12)):
        assert part.residual(net, part.points).abs().max() < tolerance
    net.factor = 1.1
    assert all(part.residual(net, part.points).abs().max() > 1e-2 for part in (inside, start))
    assert (start.points[:, 1] == 0).all()
    assert ((ends.points[:, 0] == -1).sum() + (ends.points[:, 0] == 1).sum()) == 100


def test_closure_of_the_gallery_has_the_rows_that_are_asked_for() -> None:
    parts = gallery.conditions(0.01)
    net = gallery.network(0)
    closure = gallery.closure_of(net, parts)
    whole = closure(torch.arange(2200))
    expected = sum(part.residual(net, part.points).square().mean().item() for part in parts)
    assert whole.loss.item() == pytest.approx(expected, rel=1e-12)
    rows = torch.tensor([0, 3, 1999, 2000, 2050, 2100, 2199])
    assert torch.allclose(closure(rows).residuals, whole.residuals[rows], rtol=1e-10, atol=1e-13)


def test_allen_cahn_against_finite_differences_in_space() -> None:
    """The right half with zero slope at both ends, by second-order differences and an explicit integrator."""
    count = 1600
    x = (np.arange(count) + 0.5) / count

    def change(_: float, u: np.ndarray) -> np.ndarray:
        padded = np.concatenate([u[:1], u, u[-1:]])  # mirrored at the ends
        return 1e-4 * np.diff(padded, 2) * count**2 + 5 * (u - u**3)

    times = np.array([0.2, 0.6, 1.0])
    # Diffusion 1e-4·1600² = 256: not stiff for an explicit method of high order.
    found = solve_ivp(change, (0, 1), x**2 * np.cos(np.pi * x), "DOP853", times, rtol=1e-8, atol=1e-9).y
    grid, t, u = references.allen_cahn()
    for k, moment in enumerate(times):
        row = u[int(np.argmin(abs(t - moment)))]
        assert t[int(np.argmin(abs(t - moment)))] == pytest.approx(moment)
        assert np.abs(CubicSpline(grid, row)(x[:-1]) - found[:-1, k]).max() < 2e-4


def test_allen_cahn_symmetry_equation_and_refinement() -> None:
    x, t, u = references.allen_cahn()
    assert (x[0], t[0], t[-1], u.shape) == (-1.0, 0.0, 1.0, (51, 2048))
    assert np.allclose(u[0], x**2 * np.cos(np.pi * x), atol=1e-13)
    assert np.abs(u[:, 1:] - u[:, :0:-1]).max() < 1e-9  # x → -x; rounding grows as e^(5t)
    assert u[1:].min() > -1.0 - 1e-9
    assert u.max() < 1.0
    _, _, finer = references.allen_cahn(modes=4096, steps=2000)
    assert np.abs(finer[:, ::2] - u).max() < 5e-7
    # The equation at later times, with derivatives by modes in x and a stencil of fourth order in t.
    step = t[1] - t[0]
    wave = np.fft.rfftfreq(2048, 1 / 2048) * np.pi
    bend = np.fft.irfft(-(wave**2) * np.fft.rfft(u[25:48]), 2048)
    slope = (u[23:46] - 8 * u[24:47] + 8 * u[26:49] - u[27:50]) / (12 * step)
    assert np.abs(slope - 1e-4 * bend - 5 * (u[25:48] - u[25:48] ** 3)).max() < 2e-3
    with pytest.raises(ValueError, match="not a multiple of 50"):
        references.allen_cahn(steps=1001)


def test_allen_cahn_conditions_vanish_on_the_solution() -> None:
    equation = equations.allen_cahn()
    x, t, u = references.allen_cahn()
    points = equation.points.numpy()
    row = u[25]  # t = 0.5; u_t from the equation itself, solved for by the integrator above
    wave = np.fft.rfftfreq(2048, 1 / 2048) * np.pi
    spectrum = np.fft.rfft(row)
    bend = np.fft.irfft(-(wave**2) * spectrum, 2048)
    slope = np.fft.irfft(1j * wave * spectrum, 2048)
    inside = equation.conditions[0]
    change = (u[23] - 8 * u[24] + 8 * u[26] - u[27]) / (12 * (t[1] - t[0]))
    jet = equations.Jet(
        torch.stack([torch.from_numpy(x), torch.full((2048,), 0.5, dtype=torch.float64)], dim=1),
        *(torch.from_numpy(part) for part in (row, np.stack([slope, change], axis=1), 1e-4 * bend)),
    )
    assert inside.residual(jet).abs().max() < 2e-3
    assert jet.gradient[0, 0].abs() < 1e-9  # so that zero slope at the ends is what being periodic means
    assert equation.second == (1e-4, 0)
    start, ends = equation.conditions[1:]
    assert (start.points[:, 1] == 0).all()
    assert (ends.points[:, 0].abs() == 1).all()
    assert start.weight == 100
    assert len(points) == 2228
    solution = equation.solution.reshape(51, 256)
    grid = equation.grid.reshape(51, 256, 2)
    assert np.allclose(grid[7, :, 0], x[::8])
    assert np.allclose(grid[7, :, 1], t[7])
    assert np.array_equal(solution[7], u[7, ::8])
