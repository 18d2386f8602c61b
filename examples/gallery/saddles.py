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

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hessopt
from examples.shared.saddle_starts import SaddleStart, saddle_starts

RATES = {"SGD": (1e-3, 1e-2, 1e-1), "noisy SGD": (1e-3, 1e-2, 1e-1), "AdamW": (1e-4, 1e-3, 1e-2)}
NOISE = 1e-3  # standard deviation of what noisy SGD adds to every entry, times the learning rate's root


@dataclass(frozen=True)
class Run:
    steps: float
    seconds: float


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


def run(problem: SaddleStart, start: nn.Module, method: str, lr: float, steps: int, goal: float, seed: int) -> Run:
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
    return Run(left, spent)


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
    for problem in saddle_starts():
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
