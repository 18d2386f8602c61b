"""Burgers' equation by a physics-informed network on random rows: points, conditions, strata and the closure.

``u_t + u u_x = ν u_xx`` for x in [-1, 1] and t in [0, 1], from ``-sin πx``, zero at both ends: a wave that steepens to
a front. Every condition has points of its own and a function of the network at them that vanishes for the solution;
the loss is the sum of their mean squares. The conditions are the strata of one least-squares problem, of whose 2,200
residuals a step of BandedNewton draws some. For another equation, write other functions and other points.

Beside it L-BFGS and AdamW, which have all rows, the same start and the same seconds; AdamW has the best of three rates
with a cosine schedule. The figure has the solution, the error and the relative L2 errors against seconds.

    python -m examples.gallery.burgers [--seconds 20] [--viscosity 0.03] [--seed 0] [--out burgers.png]

The viscosity is in units of 1/π. With 0.01, the usual benchmark, the front is three times as steep, and takes longer.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm, Normalize
from torch import Tensor, nn

import hessopt
from examples.shared.plots import draw_curves
from examples.shared.problems.pinn_references import burgers as solution

RATES = (1e-3, 3e-3, 1e-2)
"""Of AdamW."""


@dataclass(frozen=True)
class Condition:
    """Points ``(N, 2)``, columns x and t, and ``residual(network, points)``, ``(N,)``."""

    points: Tensor
    residual: Callable[[nn.Module, Tensor], Tensor]


def conditions(viscosity: float) -> list[Condition]:
    """The equation at 2,000 points, the start at 100 and the ends at 100."""
    draw = torch.Generator().manual_seed(0)
    inside, start, ends = (torch.rand(n, 2, dtype=torch.float64, generator=draw) for n in (2000, 100, 100))
    inside[:, 0], start[:, 0] = 2 * inside[:, 0] - 1, 2 * start[:, 0] - 1
    start[:, 1] = 0
    ends[:, 0] = (ends[:, 0] < 0.5).double() * 2 - 1

    def equation(net: nn.Module, points: Tensor) -> Tensor:
        x = points.clone().requires_grad_()
        u = net(x).squeeze(1)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
        change: Tensor = slope[:, 1] + u * slope[:, 0] - viscosity * bend[:, 0]
        return change

    return [
        Condition(inside, equation),
        Condition(start, lambda net, points: net(points).squeeze(1) + torch.sin(math.pi * points[:, 0])),
        Condition(ends, lambda net, points: net(points).squeeze(1)),
    ]


def closure_of(net: nn.Module, parts: Sequence[Condition]) -> Callable[[Tensor], hessopt.LeastSquares]:
    """The residuals of rows, numbered one condition after the other, so scaled that ``½ Σ r²`` is the loss."""

    def closure(rows: Tensor) -> hessopt.LeastSquares:
        residuals, first = [], 0
        for part in parts:
            count = len(part.points)
            own = rows[(rows >= first) & (rows < first + count)] - first
            residuals.append(part.residual(net, part.points[own]) * (2 / count) ** 0.5)
            first += count
        return hessopt.LeastSquares(torch.cat(residuals))

    return closure


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [module for width in (2, 20, 20) for module in (nn.Linear(width, 20), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(20, 1)).double()


Step = Callable[[float], object]
"""One step, of the share of the seconds that is used up."""


def banded(net: nn.Module, parts: Sequence[Condition]) -> Step:
    """Ours, with all defaults."""
    optimizer = hessopt.BandedNewton(net, rows=[len(part.points) for part in parts])
    closure = closure_of(net, parts)
    return lambda share: optimizer.step(closure)


def backward_of(net: nn.Module, parts: Sequence[Condition]) -> Callable[[], float]:
    """The loss of all rows, after its gradient."""
    closure, rows = closure_of(net, parts), torch.arange(sum(len(part.points) for part in parts))

    def backward() -> float:
        net.zero_grad()
        loss = closure(rows).loss
        loss.backward()
        return loss.item()

    return backward


def lbfgs(net: nn.Module, parts: Sequence[Condition]) -> Step:
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5, history_size=100, line_search_fn="strong_wolfe")
    backward = backward_of(net, parts)
    return lambda share: optimizer.step(backward)


def adamw(rate: float) -> Callable[[nn.Module, Sequence[Condition]], Step]:
    def make(net: nn.Module, parts: Sequence[Condition]) -> Step:
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.0)
        backward = backward_of(net, parts)

        def step(share: float) -> None:
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
            backward()
            optimizer.step()

        return step

    return make


METHODS: dict[str, Callable[[nn.Module, Sequence[Condition]], Step]] = {
    "BandedNewton, random rows": banded,
    "L-BFGS": lbfgs,
    **{f"AdamW {rate:g}": adamw(rate) for rate in RATES},
}


@dataclass(frozen=True)
class Run:
    """A trained network, and seconds and relative error along the way."""

    net: nn.Module
    curve: list[tuple[float, float]]
    steps: int


def train(name: str, viscosity: float, seconds: float, seed: int, points: Tensor, exact: Tensor) -> Run:
    """Seconds are those of the process inside of steps; errors are measured outside of them."""
    net = network(seed)
    step = METHODS[name](net, conditions(viscosity))
    spent, steps, curve = 0.0, 0, [(0.0, error_of(net, points, exact))]
    while spent < seconds:
        begin = time.process_time()
        step(spent / seconds)
        spent += time.process_time() - begin
        steps += 1
        if spent >= seconds or spent > curve[-1][0] + seconds / 60:
            curve.append((spent, error_of(net, points, exact)))
    return Run(net, curve, steps)


@torch.no_grad()
def error_of(net: nn.Module, points: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return float((net(points).squeeze(1) - exact).norm() / exact.norm())


def draw(runs: dict[str, Run], points: Tensor, exact: Tensor, shape: tuple[int, int], path: str) -> None:
    """The solution that random rows found, its error, and the errors of all against seconds."""
    with torch.no_grad():
        found = next(iter(runs.values())).net(points).squeeze(1)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    extent = (0.0, 1.0, -1.0, 1.0)
    panels = {
        "u, BandedNewton on random rows": (found, Normalize(-1, 1)),
        "|error|": ((found - exact).abs(), LogNorm(1e-6, 1e-1)),
    }
    for ax, (title, (values, norm)) in zip(axes, panels.items(), strict=False):
        image = ax.imshow(values.reshape(shape).numpy(), extent=extent, origin="lower", aspect="auto", norm=norm)
        ax.set(title=title, xlabel="t", ylabel="x")
        figure.colorbar(image, ax=ax)
    draw_curves(axes[2], {name: [run.curve] for name, run in runs.items()}, black="AdamW")
    axes[2].set(title="relative L2 error", xlabel="seconds", yscale="log")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print errors, and save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--viscosity", type=float, default=0.03, help="in units of 1/π")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="burgers.png", help="where to save the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    viscosity = options.viscosity / math.pi
    x, t = torch.linspace(-1, 1, 201, dtype=torch.float64), torch.linspace(0, 1, 101, dtype=torch.float64)
    points = torch.cartesian_prod(x, t)
    exact = solution(points, viscosity=viscosity).squeeze(1)
    runs = {}
    for name in METHODS:
        runs[name] = train(name, viscosity, options.seconds, options.seed, points, exact)
        spent, error = runs[name].curve[-1]
        print(f"{name:26} relative error {error:.1e} after {runs[name].steps} steps, {spent:.1f} s", flush=True)
    best = min((name for name in runs if name.startswith("AdamW")), key=lambda name: runs[name].curve[-1][1])
    shown = {name: run for name, run in runs.items() if not name.startswith("AdamW") or name == best}
    draw(shown, points, exact, (len(x), len(t)), options.out)
    print(f"figure: {options.out}")


if __name__ == "__main__":
    main()
