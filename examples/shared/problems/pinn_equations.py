"""Differential equations with boundary and initial conditions, collocation points and solutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from examples.shared.problems import pinn_references as references
from examples.shared.problems.pinn_derivatives import Jet

PI = math.pi


@dataclass(frozen=True)
class Condition:
    """One condition, at points of its own.

    Attributes:
        points: ``(N, d)``, float64.
        residual: ``(N,)`` of the jet at the points; zero for the solution. Row b depends on row b of the jet alone.
        weight: What its mean square counts in the loss.
    """

    points: Tensor
    residual: Callable[[Jet], Tensor]
    weight: float = 1.0


@dataclass(frozen=True)
class Equation:
    """The loss is ``Σ weight · mean(residual²)`` over the conditions.

    Attributes:
        second: Coefficients of the second derivatives that conditions know as ``jet.second``.
        conditions: The equation inside, then boundary and initial conditions.
        grid: ``(M, d)``, where the relative L2 error is taken.
        solution: The solution there, ``(M,)``.
        exact: The solution as a function of points, ``(N, d)`` to ``(N, 1)``, where it can be differentiated.
    """

    second: tuple[float, ...]
    conditions: tuple[Condition, ...]
    grid: Tensor
    solution: Tensor
    exact: Callable[[Tensor], Tensor] | None = None

    @property
    def points(self) -> Tensor:
        """The points of all conditions, in their order: row b of the residuals is that of point b."""
        return torch.cat([condition.points for condition in self.conditions])

    @property
    def strata(self) -> tuple[int, ...]:
        """Numbers of points of the conditions."""
        return tuple(len(condition.points) for condition in self.conditions)

    def residuals(self, jet: Jet, rows: Tensor | None = None) -> Tensor:
        """r ``(N,)``, so scaled that the loss is ``½ Σ r²``, of the jet at :attr:`points`.

        Args:
            jet: At all of the points, or at ``points[rows]``.
            rows: Ascending; r is that of these rows, ``(n,)``, scaled as before.
        """
        counts: Sequence[int] = self.strata
        if rows is not None:
            ends = torch.tensor(self.strata, device=rows.device).cumsum(0)
            counts = torch.bucketize(rows, ends, right=True).bincount(minlength=len(ends)).tolist()
        parts = jet.split(counts)
        return torch.cat(
            [
                condition.residual(part) * (2 * condition.weight / len(condition.points)) ** 0.5
                for condition, part in zip(self.conditions, parts, strict=True)
            ]
        )


def box(bounds: list[tuple[float, float]], counts: list[int], ends: bool = False) -> Tensor:
    """A grid, ``(N, d)``: midpoints of equal cells, or with both ends."""
    axes = []
    for (low, high), count in zip(bounds, counts, strict=True):
        unit = torch.linspace(0, 1, count, dtype=torch.float64)
        if not ends:
            unit = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        axes.append(low + (high - low) * unit)
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def spread(bounds: list[tuple[float, float]], count: int, seed: int = 0) -> Tensor:
    """The first points of a scrambled Sobol sequence, ``(count, d)``."""
    low, high = torch.tensor(bounds, dtype=torch.float64).unbind(dim=1)
    unit = SobolEngine(len(bounds), scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return low + (high - low) * unit


def faces(points: Tensor, bounds: list[tuple[float, float]], axes: list[int]) -> Tensor:
    """Points moved in turn onto the two faces of each of the axes."""
    moved = points.clone()
    sides = [(axis, value) for axis in axes for value in bounds[axis]]
    for i, (axis, value) in enumerate(sides):
        moved[i :: len(sides), axis] = value
    return moved


def _of(exact: Callable[[Tensor], Tensor]) -> Callable[[Jet], Tensor]:
    """The residual of a value that is known."""
    return lambda jet: jet.value - exact(jet.points).squeeze(1)


def _known(
    second: tuple[float, ...], conditions: tuple[Condition, ...], grid: Tensor, exact: Callable[[Tensor], Tensor]
) -> Equation:
    return Equation(second, conditions, grid, exact(grid).squeeze(1), exact)


@lru_cache(maxsize=1)
def poisson_2d() -> Equation:
    """``-Δu = 2π² u*`` on the unit square, zero on its boundary; ``u* = sin πx sin πy``.

    900 and 120 midpoints; the weights are the area and the length, as in the code of Müller and Zeinhofer (ICML 2023).
    """
    unit = [(0.0, 1.0)] * 2

    def exact(p: Tensor) -> Tensor:
        return torch.sin(PI * p).prod(dim=1, keepdim=True)

    side = box([(0.0, 1.0)], [30])
    boundary = torch.cat(
        [torch.cat(pair, dim=1) for end in (0 * side, 0 * side + 1) for pair in ((side, end), (end, side))]
    )
    inside = Condition(box(unit, [30, 30]), lambda jet: jet.second + 2 * PI**2 * exact(jet.points).squeeze(1))
    return _known((1, 1), (inside, Condition(boundary, _of(exact), 4.0)), box(unit, [100, 100]), exact)


@lru_cache(maxsize=1)
def poisson_5d() -> Equation:
    """``-Δu = π² u*`` on the unit cube of dimension 5, ``u* = Σ sin πx_k`` on its boundary.

    1500 points inside and 500 on the boundary, whose weight is its area, as in the code of Müller and Zeinhofer.
    """
    unit = [(0.0, 1.0)] * 5

    def exact(p: Tensor) -> Tensor:
        return torch.sin(PI * p).sum(dim=1, keepdim=True)

    inside = Condition(spread(unit, 1500), lambda jet: jet.second + PI**2 * exact(jet.points).squeeze(1))
    boundary = Condition(faces(spread(unit, 500, seed=1), unit, [0, 1, 2, 3, 4]), _of(exact), 10.0)
    return _known((1,) * 5, (inside, boundary), spread(unit, 5000, seed=2), exact)


@lru_cache(maxsize=1)
def nonlinear_poisson_1d() -> Equation:
    """``-u'' + u³ = f`` on [-1, 1], with f from ``u* = sin πx + ½ sin 3πx``, zero at both ends; 128 points."""
    interval = [(-1.0, 1.0)]

    def exact(p: Tensor) -> Tensor:
        return torch.sin(PI * p) + torch.sin(3 * PI * p) / 2

    def inside(jet: Jet) -> Tensor:
        x = jet.points
        source = PI**2 * torch.sin(PI * x) + 4.5 * PI**2 * torch.sin(3 * PI * x) + exact(x) ** 3
        return -jet.second + jet.value**3 - source.squeeze(1)

    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    conditions = Condition(box(interval, [128]), inside), Condition(ends, _of(exact), 100.0)
    return _known((1,), conditions, box(interval, [1000], ends=True), exact)


@lru_cache(maxsize=1)
def pendulum() -> Equation:
    """``u'' + sin u = 0`` for t in [0, 8], almost a period, from rest at 2 rad; 200 points, initial weights 10."""
    start = torch.zeros(1, 1, dtype=torch.float64)
    grid = box([(0.0, 8.0)], [1000], ends=True)
    conditions = (
        Condition(box([(0.0, 8.0)], [200]), lambda jet: jet.second + torch.sin(jet.value)),
        Condition(start, lambda jet: jet.value - 2, 10.0),
        Condition(start, lambda jet: jet.gradient[:, 0], 10.0),
    )
    return Equation((1,), conditions, grid, torch.from_numpy(references.pendulum(grid[:, 0].numpy(), 2.0)))


@lru_cache(maxsize=1)
def heat_2d() -> Equation:
    """``u_t = ¼ (u_xx + u_yy)`` on the unit cube (x, y, t), zero on the sides; ``u* = e^(-π²t/2) sin πx sin πy``.

    1500 points inside, 256 at t = 0, 256 on the sides; weight 1, 1 and 4 (volume and areas).
    """
    unit = [(0.0, 1.0)] * 3

    def exact(p: Tensor) -> Tensor:
        return torch.exp(-(PI**2) / 2 * p[:, 2:]) * torch.sin(PI * p[:, :2]).prod(dim=1, keepdim=True)

    start = box([(0.0, 1.0), (0.0, 1.0), (0.0, 0.0)], [16, 16, 1])
    conditions = (
        Condition(spread(unit, 1500), lambda jet: jet.gradient[:, 2] - jet.second),
        Condition(start, _of(exact)),
        Condition(faces(spread(unit, 256, seed=1), unit, [0, 1]), _of(exact), 4.0),
    )
    return _known((0.25, 0.25, 0), conditions, box(unit, [20, 20, 20]), exact)


@lru_cache(maxsize=1)
def burgers() -> Equation:
    """``u_t + u u_x = ν u_xx``, ν = 0.01/π, on [-1, 1] × [0, 1] (x, t), from ``-sin πx``, zero at both ends.

    2000 points inside, 100 at t = 0, 100 at the ends, all of weight 1 (Raissi et al. 2019).
    """
    bounds = [(-1.0, 1.0), (0.0, 1.0)]

    def inside(jet: Jet) -> Tensor:
        return jet.gradient[:, 1] + jet.value * jet.gradient[:, 0] - jet.second

    conditions = (
        Condition(spread(bounds, 2000), inside),
        Condition(box([(-1.0, 1.0), (0.0, 0.0)], [100, 1]), lambda jet: jet.value + torch.sin(PI * jet.points[:, 0])),
        Condition(faces(box([(-1.0, 1.0), (0.0, 1.0)], [1, 100]), bounds, [0]), lambda jet: jet.value),
    )
    grid = box(bounds, [201, 51], ends=True)
    return _known((references.VISCOSITY, 0), conditions, grid, references.burgers)


@lru_cache(maxsize=1)
def allen_cahn() -> Equation:
    """``u_t = 1e-4 u_xx + 5 (u - u³)`` on [-1, 1] × [0, 1] (x, t), 2-periodic, from ``x² cos πx``.

    The solution is even, so that being periodic is ``u_x = 0`` at both ends, which needs no pairs of points.
    2000 points inside, 128 at t = 0 of weight 100, 100 at the ends.
    """
    bounds = [(-1.0, 1.0), (0.0, 1.0)]

    def inside(jet: Jet) -> Tensor:
        return jet.gradient[:, 1] - jet.second - 5 * (jet.value - jet.value**3)

    def start(jet: Jet) -> Tensor:
        x = jet.points[:, 0]
        return jet.value - x**2 * torch.cos(PI * x)

    conditions = (
        Condition(spread(bounds, 2000), inside),
        Condition(box([(-1.0, 1.0), (0.0, 0.0)], [128, 1]), start, 100.0),
        Condition(faces(box([(-1.0, 1.0), (0.0, 1.0)], [1, 100]), bounds, [0]), lambda jet: jet.gradient[:, 0]),
    )
    x, t, u = references.allen_cahn()
    every = len(x) // 256
    grid = torch.cartesian_prod(torch.from_numpy(t), torch.from_numpy(x[::every])).flip(1)
    return Equation((references.DIFFUSIVITY, 0), conditions, grid, torch.from_numpy(u[:, ::every]).flatten())
