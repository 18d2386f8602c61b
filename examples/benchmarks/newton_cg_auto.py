"""What ``NewtonCG(curvature="auto")`` costs beside the better of the full Hessian and the Gauss-Newton matrix.

Every problem is solved to ``‖g‖ ≤ 1e-8`` from starts far from a minimum and from one near it (a minimum, moved by 3 %),
with each curvature and the other options at their defaults; float64. Cost is counted in products with a curvature
matrix and in gradient-equivalents of everything; a run that does not get there within 250 steps counts as never. Where
a problem has several minima, runs may end in different ones.

    python -m examples.benchmarks.newton_cg_auto [--starts 3] [--only "tanh, small residual"]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import hessopt
from hessopt.newton_cg.optimizer import NewtonCG

TOLERANCE, STEPS = 1e-8, 250
CURVATURES = ("hessian", "ggn", "auto")
Problem = tuple[nn.Module, Callable[[], Any], float]
"""Network, closure, weight decay."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*widths: int, activation: type[nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
        return nn.Sequential(*layers[:-1]).double()


class Point(nn.Module):
    """Parameters that are themselves the output."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.x


class Factors(nn.Module):
    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(0.3 * normal(rows, rank, seed=20))
        self.v = nn.Parameter(0.3 * normal(columns, rank, seed=21))

    def forward(self) -> Tensor:
        return self.u @ self.v.mT


def tanh_regression(widths: list[int], noise: float, samples: int, decay: float, seed: int = 0) -> Problem:
    net = network(*widths, seed=seed)
    x = normal(samples, widths[0], seed=3)
    y = torch.sin(2 * x[:, :1]) + noise * normal(samples, widths[-1], seed=4)
    return net, lambda: F.mse_loss(net(x), y), decay


def teacher_student() -> Problem:
    net, teacher, x = network(2, 4, 1, seed=5), network(2, 4, 1, seed=6), normal(50, 2, seed=3)
    y = teacher(x).detach()
    return net, lambda: F.mse_loss(net(x), y), 1e-4


def classification() -> Problem:
    net, x = network(2, 8, 3, seed=1), normal(90, 2, seed=7)
    labels = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 0] > 1).long()
    return net, lambda: F.cross_entropy(net(x), labels), 1e-3


def random_labels() -> Problem:
    net, x = network(4, 6, 6, 3, seed=1), normal(60, 4, seed=7)
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(8))
    return net, lambda: F.cross_entropy(net(x), labels), 1e-2


def autoencoder() -> Problem:
    net, x = network(8, 5, 2, 5, 8, seed=2), torch.tanh(normal(60, 2, seed=9) @ normal(2, 8, seed=10))
    return net, lambda: F.mse_loss(net(x), x), 1e-4


def factorisation(rank: int, exact: bool) -> Problem:
    net = Factors(12, 10, rank)
    target = normal(12, rank, seed=22) @ normal(rank, 10, seed=23) if exact else normal(12, 10, seed=22)
    return net, lambda: F.mse_loss(net(), target), 0.0 if exact else 1e-2


def logistic() -> Problem:
    net, x = network(5, 1), normal(100, 5, seed=3)
    y = (x[:, :1] + normal(100, 1, seed=5) > 0).double()
    return net, lambda: F.binary_cross_entropy_with_logits(net(x), y), 1e-4


def rosenbrock(size: int) -> Problem:
    net = Point([-1.2, 1.0] * (size // 2))

    def closure() -> hessopt.LeastSquares:
        x = net()
        return hessopt.LeastSquares(2**0.5 * torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]]))

    return net, closure, 0.0


def brown_dennis() -> Problem:
    net, t = Point([25.0, 5.0, -5.0, -1.0]), torch.arange(1, 21, dtype=torch.float64) / 5

    def closure() -> hessopt.LeastSquares:
        x = net()
        return hessopt.LeastSquares((x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2)

    return net, closure, 0.0


def robust_regression() -> Problem:
    net, x = network(3, 8, 1, activation=nn.SiLU, seed=3), normal(80, 3, seed=11)
    y = x.prod(1, keepdim=True) + 0.5 * normal(80, 1, seed=12)
    return net, lambda: F.smooth_l1_loss(net(x), y, beta=0.5), 1e-3


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tanh, small residual": lambda: tanh_regression([2, 8, 1], 0.0, 60, 1e-4),
    "tanh, large residual": lambda: tanh_regression([2, 5, 1], 3.0, 40, 1e-3),
    "tanh, medium residual": lambda: tanh_regression([2, 3, 1], 1.0, 40, 1e-3, seed=2),
    "deep tanh, large residual": lambda: tanh_regression([3, 6, 6, 2], 2.0, 50, 1e-2),
    "teacher and student": teacher_student,
    "classification": classification,
    "random labels": random_labels,
    "autoencoder": autoencoder,
    "factorisation, exact": lambda: factorisation(3, exact=True),
    "factorisation, truncated": lambda: factorisation(2, exact=False),
    "logistic regression": logistic,
    "Rosenbrock, 2": lambda: rosenbrock(2),
    "Rosenbrock, 10": lambda: rosenbrock(10),
    "Brown and Dennis": brown_dennis,
    "SiLU, Huber loss": robust_regression,
}


@dataclass(frozen=True)
class Run:
    solved: bool
    steps: int
    products: float
    work: float
    loss: float

    @property
    def cost(self) -> tuple[float, float]:
        return (self.products, self.work) if self.solved else (math.inf, math.inf)


def minimize(problem: Problem, curvature: Any, tolerance: float = TOLERANCE, steps: int = STEPS) -> Run:
    net, closure, decay = problem
    optimizer = NewtonCG(net, curvature=curvature, weight_decay=decay)
    products = work = loss = 0.0
    for step in range(steps):
        optimizer.step(closure)
        last = optimizer.last_step
        assert last is not None
        loss = last.loss
        if last.gradient_norm <= tolerance:
            return Run(True, step, products, work, loss)
        products += sum(last.products.values())
        work += last.gradient_equivalents
    return Run(False, steps, products, work, loss)


def moved(problem: Problem, relative: float, absolute: float, seed: int) -> Problem:
    """The same from a start that is off by so much of every tensor's root mean square, and by so much at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in problem[0].parameters():
            size = relative * p.norm() / p.numel() ** 0.5 + absolute
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return problem


def near(make: Callable[[], Problem], seed: int = 100) -> Problem:
    """From near the minimum that the full Hessian finds."""
    problem = make()
    minimize(problem, "hessian", 1e-11, 400)
    return moved(problem, 0.03, 0.0, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="far from a minimum, of each problem")
    parser.add_argument("--only", choices=PROBLEMS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are tiny
    ratios: dict[str, list[tuple[float, float]]] = {"far": [], "near": []}
    header = "".join(f"{name:>12}: steps products   work" for name in CURVATURES)
    print(f"{'':26}{'start':>6}{header}   auto / better: products, work")
    for name in tqdm([options.only] if options.only else list(PROBLEMS), disable=None):
        make = PROBLEMS[name]
        for start in [*range(options.starts), "near"]:
            runs = {}
            for curvature in CURVATURES:
                problem = near(make) if start == "near" else moved(make(), 0.0, 0.2 if start else 0.0, int(start))
                runs[curvature] = minimize(problem, curvature)
            better = [min(pair) for pair in zip(runs["hessian"].cost, runs["ggn"].cost, strict=True)]
            cells = "".join(
                f"{'' if run.solved else 'over':>13}{run.steps:6}{run.products:9.0f}{run.work:7.0f}"
                for run in runs.values()
            )
            if math.isinf(better[0]):
                print(f"{name:26}{start:>6}{cells}   solved by neither")
                continue
            products, work = (c / b for c, b in zip(runs["auto"].cost, better, strict=True))
            ratios["near" if start == "near" else "far"].append((products, work))
            print(f"{name:26}{start:>6}{cells}   {products:.2f} {work:.2f}")
    ratios["all"] = ratios["far"] + ratios["near"]
    for where, pairs in ratios.items():
        for kind, values in zip(("products", "gradient-equivalents"), zip(*pairs, strict=True), strict=False):
            print(
                f"{where}, {len(values)} runs, {kind}: median {statistics.median(values):.2f}, "
                f"worst {max(values):.2f}, above 1.5: {sum(v > 1.5 for v in values)}"
            )


if __name__ == "__main__":
    main()
