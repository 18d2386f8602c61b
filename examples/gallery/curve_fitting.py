"""Fitting curves: BandedNewton beside scipy.optimize.least_squares, from the same starts.

Two models of noisy data, float64. *Peaks*: three Gaussians on a straight line, 300 points, 11 parameters, where the
parameters have names and units. *Network*: tanh 1-16-16-1, 600 points, 321 parameters. BandedNewton is told nothing
but the residuals. scipy's trust-region method is given the exact Jacobian, by ``torch.func``, and without it takes
finite differences.

Prints for each method and start the lowest loss, ½ the sum of squares, and the milliseconds of the process (one thread)
until it is that of the noise, i.e. of the curve that the data were made from; "–" where it never is.

    python -m examples.gallery.curve_fitting [--seconds 5] [--seeds 3] [--out curve_fitting.png]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import hessopt
from examples.shared.plots import draw_curves

Array = NDArray[np.float64]
NOISE = 0.05


class Peaks(nn.Module):
    """``a + b x + Σ h_k exp(-((x - c_k) r_k)² / 2)``.

    Every parameter meets the data at once: there is no function of parameters alone, such as the exponential of a
    logarithm, whose rows BandedNewton would have to back-propagate one by one.

    Args:
        centers: c, ``(K,)``.
        heights: h.
        rates: r, one over the widths.
        line: a and b.
    """

    def __init__(
        self, centers: Sequence[float], heights: Sequence[float], rates: Sequence[float], line: Sequence[float]
    ) -> None:
        super().__init__()
        self.centers, self.heights, self.rates, self.offset, self.slope = (
            nn.Parameter(torch.tensor(part, dtype=torch.float64))
            for part in (centers, heights, rates, line[:1], line[1:])
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 1)`` to ``(N, 1)``."""
        peaks = self.heights * torch.exp(-((x - self.centers) * self.rates).square() / 2)
        return peaks.sum(dim=1, keepdim=True) + (x * self.slope + self.offset)


@dataclass(frozen=True)
class Fit:
    """Data ``(N, 1)``, a model of it from a seed, and the loss of the curve without noise."""

    x: Tensor
    y: Tensor
    model: Callable[[int], nn.Module]
    noise: float


def noisy(x: Tensor, curve: Tensor, model: Callable[[int], nn.Module]) -> Fit:
    noise = NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Fit(x, curve + noise, model, float(noise.square().sum()) / 2)


def peaks() -> Fit:
    x = torch.linspace(0, 10, 300, dtype=torch.float64).unsqueeze(1)
    true = Peaks((2.5, 4.8, 6.1), (1.0, 2.0, 1.4), (2.0, 1.3, 2.5), (0.4, 0.05))

    def guess(seed: int) -> nn.Module:
        """Peaks about where one would put them by eye."""
        noise = torch.randn(3, generator=torch.Generator().manual_seed(seed)).tolist()
        centers = [about + 0.3 * off for about, off in zip((2.0, 4.5, 6.5), noise, strict=True)]
        return Peaks(centers, (1.0,) * 3, (1.0,) * 3, (0.0, 0.0))

    return noisy(x, true(x).detach(), guess)


def wave() -> Fit:
    x = torch.linspace(-1, 1, 600, dtype=torch.float64).unsqueeze(1)

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = (nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        return nn.Sequential(*layers).double()

    return noisy(x, torch.sin(12 * x * x.abs()), network)


FITS = {"peaks": peaks, "network": wave}


class Spent(Exception):
    """The seconds are used up."""


@dataclass
class Run:
    """Seconds of the process and losses, evaluation by evaluation, and the fitted curve of ours."""

    curve: list[tuple[float, float]]
    fitted: Tensor | None = None

    def milliseconds(self, target: float) -> str:
        reached = [seconds for seconds, loss in self.curve if loss <= target]
        return f"{1e3 * reached[0]:.0f} ms" if reached else "–"

    def lowest(self) -> list[tuple[float, float]]:
        """The least loss so far, from a millisecond on: seconds are on a logarithmic axis."""
        least = itertools.accumulate((loss for _, loss in self.curve), min)
        return [(max(seconds, 1e-3), loss) for (seconds, _), loss in zip(self.curve, least, strict=True)]


def banded(fit: Fit, seed: int, seconds: float, **settings: Any) -> Run:
    """Until the seconds are over, or five steps in a row change the loss by a millionth of a millionth."""
    model, curve, spent, same = fit.model(seed), list[tuple[float, float]](), 0.0, 0
    optimizer = hessopt.BandedNewton(model, **settings)
    while spent < seconds and same < 5:
        begin = time.process_time()
        loss = optimizer.step(lambda: hessopt.LeastSquares(model(fit.x) - fit.y)).item()
        same = same + 1 if curve and abs(curve[-1][1] - loss) <= 1e-12 * loss else 0
        curve.append((spent, loss))  # a step returns the loss before it
        spent += time.process_time() - begin
    return Run(curve, model(fit.x).detach())


def scipy_run(fit: Fit, seed: int, seconds: float, **settings: Any) -> Run:
    """The same residuals as a function of a flat vector."""
    model, curve = fit.model(seed), list[tuple[float, float]]()
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    def residuals_of(flat: Tensor) -> Tensor:
        parts = (part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))
        fitted: Tensor = functional_call(model, dict(zip(names, parts, strict=True)), (fit.x,))
        return (fitted - fit.y).squeeze(1)

    begin = time.process_time()

    @torch.no_grad()
    def residuals(flat: Array) -> Array:
        found = residuals_of(torch.from_numpy(flat)).numpy()
        spent = time.process_time() - begin
        curve.append((spent, float(found @ found) / 2))
        if spent > seconds:
            raise Spent
        return found

    def jacobian(flat: Array) -> Array:
        rows: Tensor = jacrev(residuals_of)(torch.from_numpy(flat))
        return rows.numpy()

    start = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    jac: Any = jacobian if settings.pop("exact") else "2-point"
    with contextlib.suppress(Spent):
        least_squares(residuals, start, jac, ftol=1e-14, xtol=1e-14, gtol=1e-14, **settings)
    return Run(curve)


METHODS: dict[str, Callable[[Fit, int, float], Run]] = {
    "BandedNewton": banded,
    "BandedNewton, line search": lambda *a: banded(*a, search=hessopt.LineSearch()),
    "scipy trf, exact Jacobian": lambda *a: scipy_run(*a, exact=True),
    "scipy trf, differences": lambda *a: scipy_run(*a, exact=False),
    "scipy lm, exact Jacobian": lambda *a: scipy_run(*a, exact=True, method="lm"),
}


def main() -> None:
    """Print the tables, and save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run, at most")
    parser.add_argument("--seeds", type=int, default=3, help="starts of each method")
    parser.add_argument("--out", default="curve_fitting.png", help="where to save the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for row, (name, make) in zip(axes, FITS.items(), strict=True):
        fit = make()
        runs = {m: [run(fit, seed, options.seconds) for seed in range(options.seeds)] for m, run in METHODS.items()}
        print(
            f"| {name}, noise {fit.noise:.4g} | " + " | ".join(f"start {seed}" for seed in range(options.seeds)) + " |"
        )
        print("| --- " * (options.seeds + 1) + "|")
        for method, found in runs.items():
            cells = (f"{min(loss for _, loss in run.curve):.4g}, {run.milliseconds(fit.noise)}" for run in found)
            print(f"| {method} | " + " | ".join(cells) + " |", flush=True)
        row[0].plot(fit.x, fit.y, ".", color="lightgrey")
        row[0].plot(fit.x, runs["BandedNewton"][0].fitted, color="C0")
        row[0].set(title=f"{name}: data, and the fit of BandedNewton", xlabel="x")
        draw_curves(row[1], {m: [run.lowest() for run in found] for m, found in runs.items()}, black="scipy trf, ex")
        row[1].set(title=f"{name}: lowest loss so far", xlabel="seconds", xscale="log", yscale="log")
    figure.savefig(options.out, dpi=120)
    print(f"figure: {options.out}")


if __name__ == "__main__":
    main()
