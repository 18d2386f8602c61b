"""How long optimizers stay at saddle points: steps and seconds until the loss is below the saddle's by a margin.

Every method starts from the same point next to (or at) a saddle and has the same number of steps; baselines get the
best of a grid of learning rates, ours that of its base. The margin is 10 % of the way from the saddle's loss to the
least loss.

    python -m examples.gallery.saddles [--seeds 3] [--steps 2000]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import hessopt

RATES = {"SGD": (1e-3, 1e-2, 1e-1), "noisy SGD": (1e-3, 1e-2, 1e-1), "AdamW": (1e-4, 1e-3, 1e-2)}
NOISE = 1e-3  # standard deviation of what noisy SGD adds to every entry, times the learning rate's root


@dataclass(frozen=True)
class Problem:
    """A start next to a saddle.

    Attributes:
        name: What it is.
        make: The network of a seed.
        output: What it computes.
        loss_of_output: The loss, a function of that.
        saddle: The loss at the saddle; NaN: that at the start.
        least: The least loss.
    """

    name: str
    make: Callable[[int], nn.Module]
    output: Callable[[nn.Module], Tensor]
    loss_of_output: Callable[[Tensor], Tensor]
    saddle: float
    least: float

    def loss(self, net: nn.Module) -> Tensor:
        return self.loss_of_output(self.output(net))


@dataclass(frozen=True)
class Run:
    steps: float
    seconds: float
    end: float


class Point(nn.Module):
    """A point in the plane."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([x, y]))

    def forward(self) -> Tensor:
        return self.at


class Factorisation(nn.Module):
    """U Vᵀ of rank 3, next to zero."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(scale * torch.randn(20, 3)), nn.Parameter(scale * torch.randn(15, 3))

    def forward(self) -> Tensor:
        return self.u @ self.v.mT


def small(net: nn.Module, seed: int, scale: float) -> nn.Module:
    """Parameters of size ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return net


def twins(seed: int) -> nn.Module:
    """An MLP that was trained with all hidden units alike, now 1e-6 apart: the saddle of permutation symmetry."""
    torch.manual_seed(seed)
    first, last = nn.Linear(2, 8), nn.Linear(8, 1)
    net = nn.Sequential(first, nn.Tanh(), last)
    with torch.no_grad():
        first.weight.copy_(first.weight[:1].expand(8, 2))
        first.bias.fill_(0.1)
        last.weight.fill_(0.1)
    x, y = _teacher()
    one = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        one.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        for p in (first.weight, first.bias, last.weight):  # stay in the symmetric subspace
            assert p.grad is not None
            p.grad.copy_(p.grad.mean(1 if p is last.weight else 0, keepdim=True).expand_as(p.grad))
        return loss

    one.step(closure)
    with torch.no_grad():
        first.weight.add_(1e-6 * torch.randn(8, 2))
    return net


def _teacher() -> tuple[Tensor, Tensor]:
    """What three hidden units with different weights compute."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 2, generator=generator)
    return x, torch.tanh(x @ torch.tensor([[2.0, 0.0, -1.0], [0.0, 2.0, 1.5]])) @ torch.tensor([[1.0], [-1.0], [0.8]])


def problems(device: torch.device | str = "cpu") -> list[Problem]:
    """All problems; ``make`` makes networks on the CPU, the losses are those of networks on ``device``."""
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(8).to(device)
    target = torch.diag(torch.linspace(2, 0.5, 8)).to(device)
    matrix = (torch.randn(20, 3, generator=generator) @ torch.randn(3, 15, generator=generator) / 3).to(device)
    images = (torch.randn(64, 4, generator=generator) @ torch.randn(4, 16, generator=generator) / 2).to(device)
    x, y = (part.to(device) for part in _teacher())

    def call(net: nn.Module, *inputs: Tensor) -> Tensor:
        output: Tensor = net(*inputs)
        return output

    def plane(at: Tensor) -> Tensor:
        a, b = at.unbind()
        loss: Tensor = a**2 / 2 - b**2 / 2 + b**4 / 4
        return loss

    def distance(goal: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda output: F.mse_loss(output, goal)

    def deep(_: int, width: int, depth: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))

    def coder() -> nn.Module:
        widths = [16, 12, 8, 4, 8, 12, 16]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
        return nn.Sequential(*layers[:-1])

    zero = torch.zeros((), device=device)
    return [
        Problem("x²/2 − y²/2 + y⁴/4 from (1, 1e-8)", lambda _: Point(1.0, 1e-8), call, plane, 0.0, -0.25),
        Problem(
            "deep linear, depth 2", lambda s: small(deep(s, 8, 2), s, 1e-4), lambda net: call(net, eye),
            distance(target), F.mse_loss(zero.expand(8, 8), target).item(), 0.0,
        ),
        Problem(
            "deep linear, depth 4", lambda s: small(deep(s, 8, 4), s, 3e-2), lambda net: call(net, eye),
            distance(target), F.mse_loss(zero.expand(8, 8), target).item(), 0.0,
        ),
        Problem(
            "deep tanh autoencoder 16-12-8-4-8-12-16", lambda s: small(coder(), s, 3e-2), lambda net: call(net, images),
            distance(images), F.mse_loss(images.mean(0).expand_as(images), images).item(), 0.0,
        ),
        Problem(
            "matrix factorisation 20×15, rank 3", lambda s: small(Factorisation(1.0), s, 1e-5), call,
            distance(matrix), matrix.square().mean().item(), 0.0,
        ),
        Problem(
            "MLP 2-8-1 with equal hidden units", twins, lambda net: call(net, x), distance(y), math.nan, 0.0
        ),
    ]  # fmt: skip


def methods() -> dict[str, tuple[Callable[..., torch.optim.Optimizer], str]]:
    """By name: the optimizer of a model and a learning rate, and whose rates it tries."""

    def sgd(net: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)

    def adamw(net: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)

    return {
        "SGD": (sgd, "SGD"),
        "noisy SGD": (sgd, "noisy SGD"),
        "AdamW": (adamw, "AdamW"),
        "SaddleEscape(SGD)": (lambda net, lr: hessopt.SaddleEscape(sgd(net, lr), model=net), "SGD"),
        "SaddleEscape(AdamW)": (lambda net, lr: hessopt.SaddleEscape(adamw(net, lr), model=net), "AdamW"),
    }


def run(problem: Problem, start: nn.Module, method: str, lr: float, steps: int, goal: float, seed: int) -> Run:
    net = copy.deepcopy(start)
    optimizer = methods()[method][0](net, lr)
    generator = torch.Generator().manual_seed(seed)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(net)
        loss.backward()
        return loss

    left = math.inf
    begin, spent = time.perf_counter(), math.inf
    for step in range(steps):
        loss = optimizer.step(closure).item()  # type: ignore[arg-type, attr-defined]
        if not math.isfinite(loss):
            break
        if method == "noisy SGD":
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(torch.randn(p.shape, generator=generator), alpha=NOISE * lr**0.5)
        if loss < goal:  # the loss before this step: what the steps before it have reached
            left, spent = step, time.perf_counter() - begin
            break
    return Run(left, spent, problem.loss(net).item())


def _rank(runs: list[Run]) -> tuple[int, float]:
    return sum(math.isinf(r.steps) for r in runs), statistics.median(r.steps for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"steps (and milliseconds) to leave; at most {options.steps} steps, medians of {options.seeds} seeds\n")
    for problem in problems():
        starts = [problem.make(seed) for seed in range(options.seeds)]
        losses = [problem.loss(start).item() for start in starts]
        saddles = losses if math.isnan(problem.saddle) else [problem.saddle] * len(starts)
        goals = [saddle - 0.1 * (saddle - problem.least) for saddle in saddles]
        print(f"{problem.name}: from {losses[0]:.4g}, saddle {saddles[0]:.4g}, goal {goals[0]:.4g}")
        for method, (_, rates) in tqdm(methods().items(), leave=False, disable=None):
            results = {
                lr: [
                    run(problem, start, method, lr, options.steps, goal, seed)
                    for seed, (start, goal) in enumerate(zip(starts, goals, strict=True))
                ]
                for lr in RATES[rates]
            }
            lr, best = min(results.items(), key=lambda item: _rank(item[1]))
            steps = statistics.median(r.steps for r in best)
            seconds = statistics.median(r.seconds for r in best)
            stays = sum(math.isinf(r.steps) for r in best)
            shown = f"{steps:6.0f}  {1e3 * seconds:8.1f} ms" if math.isfinite(steps) else "stays"
            print(f"  {method:22} lr {lr:<6g} {shown:20}" + (f"  ({stays} of {len(best)} stay)" if stays else ""))
        print()


if __name__ == "__main__":
    main()
