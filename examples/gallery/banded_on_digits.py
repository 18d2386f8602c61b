"""Train on handwritten digits with BandedNewton and with tuned AdamW, for the same seconds from the same weights.

Two tasks on scikit-learn's 8×8 digits (1437 to train on, 360 to test): is the digit odd (one output), and which digit
is it (ten outputs)? BandedNewton solves in the space of batch × outputs, so the first suits it and the second does not.
AdamW gets the best of its learning rates. Work is counted in gradients (a forward and a backward pass).

    python -m examples.gallery.banded_on_digits [--seconds 0.8] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import hessopt
from examples.shared.digit_tasks import DigitTask, digit_tasks, network
from examples.shared.problems.common import minibatches
from examples.shared.timing import costs_in_gradients, train_for


def adamw(rate: float, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def banded(bandwidth: Any, model: nn.Module) -> torch.optim.Optimizer:
    return hessopt.BandedNewton(model, bandwidth=bandwidth)


METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    **{f"AdamW, lr {rate:g}": partial(adamw, rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)},
    **{f"BandedNewton, bandwidth {k}": partial(banded, k) for k in (0, 1, "full")},
}


@dataclass(frozen=True)
class Run:
    model: nn.Module
    curve: list[tuple[float, float]]
    figures: dict[str, float]


def train(task: DigitTask, seed: int, seconds: float, method: str, extra: tuple[float, float]) -> Run:
    model, (x, y, x_test, y_test) = network(task, seed), task.data
    forward, back = extra if method.startswith("Banded") else (0.0, 0.0)
    found = train_for(
        seconds, METHODS[method](model), minibatches(x, y, task.batch, seed),
        lambda pair: task.loss(model(pair[0]), pair[1]), torch.no_grad()(lambda: task.loss(model(x), y).item()),
        lambda runs: 1 + back + (runs - 1) * forward,
    )  # fmt: skip
    z = model(x_test).detach()
    figures = {
        "train loss": found.curve[-1][1],
        "test loss": task.loss(z, y_test).item(),
        "accuracy": task.hits(z, y_test).float().mean().item(),
        "steps": found.steps,
        "gradients": found.work,
    }
    return Run(model, found.curve, figures)


def median(runs: list[Run], figure: str) -> float:
    return statistics.median(run.figures[figure] for run in runs)


def compare(task: DigitTask, seconds: float, seeds: int, bar: tqdm[Any]) -> dict[str, list[Run]]:
    """The runs of AdamW at its best rate, by the training loss, and of each bandwidth."""
    x, y = next(minibatches(*task.data[:2], task.batch, 0))
    extra = costs_in_gradients(network(task, 0), x, lambda z: task.loss(z, y))
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    for name in METHODS:
        for seed in range(seeds):
            bar.set_description(f"{task.name}: {name}")
            runs[name].append(train(task, seed, seconds, name, extra))
            bar.update()
    tuned = min((name for name in runs if name.startswith("AdamW")), key=lambda name: median(runs[name], "train loss"))
    return {name: results for name, results in runs.items() if name == tuned or name.startswith("Banded")}


def report(task: DigitTask, runs: dict[str, list[Run]], seconds: float) -> str:
    seeds = len(next(iter(runs.values())))
    outputs = f"{task.outputs} output{'s' if task.outputs > 1 else ''}"
    lines = [
        f"Task: {task.name} ({outputs}), {seconds:g} s a run, batch {task.batch}, medians of {seeds} starts",
        f"{'':28}{'train loss':>11}{'test loss':>11}{'accuracy':>10}{'steps':>8}{'gradients':>11}",
    ]
    for name, results in runs.items():
        values = [median(results, figure) for figure in results[0].figures]
        lines.append("{:28}{:11.2e}{:11.3f}{:10.4f}{:8.0f}{:11.0f}".format(name, *values))
    best = min(runs, key=lambda name: median(runs[name], "train loss"))
    most_accurate = max(runs, key=lambda name: median(runs[name], "accuracy"))
    lines.append(f"lowest training loss: {best}; highest test accuracy: {most_accurate}")
    return "\n".join(lines)


def compare_all(seconds: float, seeds: int) -> list[tuple[DigitTask, dict[str, list[Run]]]]:
    """The runs of both tasks; prints their tables."""
    with tqdm(total=2 * len(METHODS) * seeds, disable=None) as bar:
        results = [(task, compare(task, seconds, seeds, bar)) for task in digit_tasks()]
    for task, runs in results:
        print(report(task, runs, seconds), end="\n\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.8, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3, help="starts of each method")
    compare_all(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
