"""ENGD-W and SPRING with their published settings beside BandedNewton with its defaults, on their authors' problems.

*Poisson in 5-D*: ``-Δu = π² u``, ``u = Σ cos πx_k`` on the unit cube, tanh 5-64-64-48-48-1. *Heat in 4+1-D*:
``u_t = ¼ Δu``, ``u = e^(-t) Σ sin 2x_k``, tanh 5-256-256-128-128-1. PyTorch's initialisation, float64, uniform points.
The rivals get points drawn anew for every step, as published: 3,000 inside and 500 on the boundary, half of them at
t = 0 for the heat equation, or a tenth of that. Ours has 3,000 and 500 that stay, and draws rows of them. The error is
the root mean square of u's at 30,000 points.

Steps are written from the formulas. With residuals r, of which ½ |r|² is the loss, and their Jacobian J:

    φ ← μ φ + Jᵀ (J Jᵀ + λ I)⁻¹ (-r - μ J φ)

ENGD-W has μ = 0 and SPRING a momentum. ``θ ← θ + η φ / √(1 - μ^{2k})`` in step k, where η is the one of 2⁻³⁰, …, 1
with the lowest loss; or it is constant, and at most ``√10⁻³ / |φ|`` where μ is not 0. λ, μ and η are the best that the
authors found on a GPU in an hour or two. The heat equation has their runs with a tenth of the points: with all of them
a Jacobian takes 3.3 GB.

All methods take steps in turns, whichever has used the fewest seconds of the process (one thread). Prints the errors at
an eighth, a quarter, a half and all of the seconds.

    python -m examples.benchmarks.published_pinns [--seconds 60] [--problems poisson-5d heat-4d] [--seed 0]

Source:
    Guzmán-Cordero, Dangel, Goldshlager and Zeinhofer 2025, "Improving Energy Natural Gradient Descent through Woodbury,
    Momentum, and Randomization", and the settings of their published runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hessopt
from examples.shared.problems.pinn import network
from examples.shared.problems.pinn_derivatives import Jet, taylor
from examples.shared.problems.pinn_equations import Condition, Equation
from examples.studies.ablation.contender import write

CONSTRAINT = 1e-3
"""SPRING's bound of the squared length of a step."""
GRID = [2.0**-k for k in range(30, -1, -1)]
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


# Problems


def _value(exact: Callable[[Tensor], Tensor]) -> Callable[[Jet], Tensor]:
    return lambda jet: jet.value - exact(jet.points)


def cosines(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum(dim=1)


def decaying_sines(x: Tensor) -> Tensor:
    """The last column is t."""
    return torch.exp(-x[:, -1]) * torch.sin(2 * x[:, :-1]).sum(dim=1)


def on_faces(count: int, draw: torch.Generator, axes: int, columns: int) -> Tensor:
    """Uniform points, one of the first ``axes`` coordinates of each at 0 or 1."""
    points = torch.rand(count, columns, dtype=torch.float64, generator=draw)
    rows = torch.arange(count)
    points[rows, torch.randint(axes, (count,), generator=draw)] = torch.randint(2, (count,), generator=draw).double()
    return points


def poisson(inside: int, boundary: int, draw: torch.Generator) -> Equation:
    conditions = (
        Condition(
            torch.rand(inside, 5, dtype=torch.float64, generator=draw),
            lambda jet: jet.second + math.pi**2 * cosines(jet.points),
            0.5,
        ),
        Condition(on_faces(boundary, draw, 5, 5), _value(cosines), 0.5),
    )
    grid = torch.rand(1, 5, dtype=torch.float64, generator=draw)
    return Equation((1.0,) * 5, conditions, grid, cosines(grid))


def heat(inside: int, boundary: int, draw: torch.Generator) -> Equation:
    known = on_faces(boundary, draw, 4, 5)
    known[boundary // 2 :] = torch.rand(boundary - boundary // 2, 5, dtype=torch.float64, generator=draw)
    known[boundary // 2 :, 4] = 0
    conditions = (
        Condition(
            torch.rand(inside, 5, dtype=torch.float64, generator=draw), lambda jet: jet.gradient[:, 4] - jet.second, 0.5
        ),
        Condition(known, _value(decaying_sines), 0.5),
    )
    grid = torch.rand(1, 5, dtype=torch.float64, generator=draw)
    return Equation((0.25,) * 4 + (0.0,), conditions, grid, decaying_sines(grid))


@dataclass(frozen=True)
class Rival:
    """Settings of a published run.

    Attributes:
        damping: λ.
        momentum: μ.
        lr: η; None: by the grid.
        points: Inside and on the boundary.
    """

    damping: float
    momentum: float = 0.0
    lr: float | None = None
    points: tuple[int, int] = (3000, 500)


@dataclass(frozen=True)
class Published:
    """A problem of theirs: ``draw(inside, boundary, generator)``, the solution, widths, and runs by name."""

    draw: Callable[[int, int, torch.Generator], Equation]
    solution: Callable[[Tensor], Tensor]
    widths: Sequence[int]
    rivals: Mapping[str, Rival]


PROBLEMS = {
    "poisson-5d": Published(
        poisson,
        cosines,
        (5, 64, 64, 48, 48, 1),
        {
            "ENGD-W, grid": Rival(3.1732e-12),
            "SPRING, grid": Rival(2.0863e-10, 0.063267),
            "ENGD-W, constant": Rival(6.8045e-8, 0.0, 0.052289),
            "SPRING, constant": Rival(6.8116e-10, 0.82697, 0.063502),
        },
    ),
    "heat-4d": Published(
        heat,
        decaying_sines,
        (5, 256, 256, 128, 128, 1),
        {
            "ENGD-W, grid, 350 points": Rival(1.5149e-7, points=(300, 50)),
            "SPRING, constant, 350 points": Rival(7.2511e-5, 0.97951, 0.051107, (300, 50)),
        },
    ),
}


# Steps


def linearized(model: nn.Sequential, equation: Equation, rows: Tensor) -> Tensor:
    """The equation's residuals, ``(N,)``; their Jacobian by the parameters is written into ``rows``, ``(N, P)``.

    Residual n depends on row n of every product with a weight alone, so that one back-propagation has the factors of
    all rows. The memory of ``rows`` is meant to be used again: where it is new, half of a step is the system's.
    """
    with torch.enable_grad(), _Products() as products:
        residuals = equation.residuals(taylor(model, equation.points, equation.second))
        pulls = torch.autograd.grad(residuals.sum(), [out for *_, out in products.calls], allow_unused=True)
    start = 0
    for p in model.parameters():
        found = [
            (x, g)
            for (x, weight, bias, _), g in zip(products.calls, pulls, strict=True)
            if g is not None and (p is weight or p is bias)
        ]
        own = rows[:, start : start + p.numel()].unflatten(1, p.shape)
        lefts = torch.stack([g for _, g in found], dim=2)
        if p.ndim == 2:
            own.baddbmm_(lefts, torch.stack([x.detach() for x, _ in found], dim=1), beta=0)
        else:
            own.copy_(lefts.sum(dim=2))
        start += p.numel()
    return residuals.detach()


class _Products(TorchFunctionMode):
    """Inputs, weight, bias and result of every ``F.linear`` inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            self.calls.append((x, weight, bias, out))
        return out


def pulled(rows: Tensor, r: Tensor, phi: Tensor, damping: float, momentum: float) -> Tensor:
    """The next φ, ``(P,)``, of J ``(N, P)`` and r ``(N,)``.

    Raises:
        ArithmeticError: the damping is too small for the precision.
    """
    gram = rows @ rows.T
    gram.diagonal().add_(damping)
    right = -r - momentum * (rows @ phi)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise ArithmeticError("J Jᵀ + λ I is not positive definite, to rounding")
    return momentum * phi + rows.T @ torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)


class Spring:
    """ENGD-W, or SPRING where there is momentum; ``step`` is one step on new points.

    Args:
        model: The network.
        problem: Where points come from.
        settings: Of the run.
        seed: Of the points.
    """

    def __init__(self, model: nn.Sequential, problem: Published, settings: Rival, seed: int) -> None:
        self.model, self.problem, self.settings = model, problem, settings
        self.parameters = list(model.parameters())
        self.draw = torch.Generator().manual_seed(seed)
        self.phi = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64)
        self.rows = torch.zeros(sum(settings.points), len(self.phi), dtype=torch.float64)
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        settings = self.settings
        equation = self.problem.draw(*settings.points, self.draw)
        r = linearized(self.model, equation, self.rows)
        self.phi = pulled(self.rows, r, self.phi, settings.damping, settings.momentum)
        self.steps += 1
        direction = self.phi / math.sqrt(1 - settings.momentum ** (2 * self.steps))
        start = torch.cat([p.flatten() for p in self.parameters])
        if settings.lr is None:
            losses = [float(r @ r)]
            for length in GRID:
                write(start + length * direction, self.parameters)
                losses.append(float(self._residuals(equation).square().sum()))
            length = [0.0, *GRID][min(range(len(losses)), key=losses.__getitem__)]
        elif settings.momentum:
            length = min(settings.lr, math.sqrt(CONSTRAINT) / float(self.phi.norm()))
        else:
            length = settings.lr
        write(start + length * direction, self.parameters)

    def _residuals(self, equation: Equation) -> Tensor:
        return equation.residuals(taylor(self.model, equation.points, equation.second))


class Ours:
    """BandedNewton, all defaults, on random rows of points that stay."""

    def __init__(self, model: nn.Sequential, problem: Published, seed: int) -> None:
        self.model = model
        self.equation = problem.draw(3000, 500, torch.Generator().manual_seed(seed))
        self.points = self.equation.points
        self.optimizer = hessopt.BandedNewton(model, rows=self.equation.strata)

    def step(self) -> None:
        self.optimizer.step(self._closure)

    def _closure(self, rows: Tensor) -> hessopt.LeastSquares:
        jet = taylor(self.model, self.points[rows], self.equation.second)
        return hessopt.LeastSquares(self.equation.residuals(jet, rows))


# Runs


@dataclass
class Run:
    """A method under way: its errors at the shares of the seconds, and what ended it early."""

    model: nn.Sequential
    method: Spring | Ours
    seconds: float = 0.0
    steps: int = 0
    errors: list[float] = field(default_factory=list)
    ended: str = ""


def runs(problem: Published, seed: int) -> Iterator[tuple[str, Run]]:
    """Ours and the rivals, from the same parameters."""
    for name, settings in [("BandedNewton, random rows", None), *problem.rivals.items()]:
        torch.manual_seed(seed)
        model = network(list(problem.widths))
        yield (
            name,
            Run(model, Ours(model, problem, seed) if settings is None else Spring(model, problem, settings, seed)),
        )


def compare(problem: Published, seconds: float, seed: int) -> dict[str, Run]:
    """All methods in turns, each until it has used the seconds."""
    found = dict(runs(problem, seed))
    points = torch.rand(30_000, problem.widths[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2**31))
    exact = problem.solution(points)
    while going := [run for run in found.values() if len(run.errors) < len(SHARES) and not run.ended]:
        run = min(going, key=lambda run: run.seconds)
        begin = time.process_time()
        try:
            run.method.step()
        except ArithmeticError as error:
            run.ended = str(error)
        run.seconds += time.process_time() - begin
        run.steps += 1
        while len(run.errors) < len(SHARES) and run.seconds >= SHARES[len(run.errors)] * seconds:
            with torch.no_grad():
                run.errors.append(float((run.model(points).squeeze(1) - exact).square().mean().sqrt()))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.problems:
        print(f"| {name} | " + " | ".join(f"{options.seconds * s:g} s" for s in SHARES) + " | steps |")
        print("| --- " * (len(SHARES) + 2) + "|")
        for method, run in compare(PROBLEMS[name], options.seconds, options.seed).items():
            cells = [f"{error:.1e}" for error in run.errors] + ["–"] * (len(SHARES) - len(run.errors))
            print(
                f"| {method} | " + " | ".join(cells) + f" | {run.steps}{', ' * bool(run.ended)}{run.ended} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
