"""SpectralNewton with nothing tuned beside AdamW with its best of four learning rates and a cosine schedule.

    python -m examples.gallery.spectral_digits [--steps 300] [--seeds 3] [--out spectral_digits.png]

A small residual CNN with BatchNorm on scikit-learn's handwritten digits: the loss of the batches against steps and
against seconds, and after the last step the loss and the accuracy on images that were not trained on. Both see the same
batches from the same start. AdamW's rate is the one with the lowest training loss on a seed that is not shown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from examples.shared.plots import draw_curves
from examples.shared.problems import PROBLEMS
from examples.shared.task import Task
from hessopt import SpectralNewton

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
NAMES = ("SpectralNewton", "AdamW, cosine")
SMOOTHED = 10
"""Steps that a point of a curve is the mean of."""

Loop = Callable[[Task, int], "list[tuple[float, float]]"]


def spectral(task: Task, steps: int) -> list[tuple[float, float]]:
    """All that a user writes; the network then holds the average of the iterates, with statistics of its own."""
    criterion = nn.CrossEntropyLoss()
    optimizer = SpectralNewton(task.model, loss=criterion)
    points = train(task, criterion, optimizer, steps)
    optimizer.eval()
    update_bn((x for x, _ in islice(task.batches, 20)), task.model)
    return points


def adamw(task: Task, steps: int, rate: float) -> list[tuple[float, float]]:
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return train(task, nn.CrossEntropyLoss(), optimizer, steps, schedule)


def train(
    task: Task, criterion: nn.Module, optimizer: Any, steps: int, schedule: Any = None
) -> list[tuple[float, float]]:
    """Seconds since the start and loss of every step."""
    points, begin = [], time.perf_counter()
    for x, y in islice(task.batches, steps):
        optimizer.zero_grad()
        loss = criterion(task.model(x), y)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        points.append((time.perf_counter() - begin, loss.item()))
    return points


def run(loop: Loop, seed: int, steps: int) -> tuple[list[tuple[float, float]], dict[str, float]]:
    task = PROBLEMS["digits-cnn"].build(seed, torch.device("cpu"), None)
    points = loop(task, steps)
    return points, task.measure()


def smooth(points: list[tuple[float, float]], against: str) -> list[tuple[float, float]]:
    chunks = [points[i : i + SMOOTHED] for i in range(0, len(points), SMOOTHED)]
    ends = [chunk[-1][0] if against == "seconds" else float(SMOOTHED * (i + 1)) for i, chunk in enumerate(chunks)]
    return [(end, sum(loss for _, loss in chunk) / len(chunk)) for end, chunk in zip(ends, chunks, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("spectral_digits.png"))
    options = parser.parse_args()
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    torch.set_num_threads(options.threads)
    tuning = {rate: run(partial(adamw, rate=rate), 0, options.steps)[1]["objective"] for rate in RATES}
    best = min(tuning, key=tuning.__getitem__)
    print("AdamW, training loss by learning rate:", ", ".join(f"{rate:g}: {loss:.1e}" for rate, loss in tuning.items()))
    loops: dict[str, Loop] = dict(zip(NAMES, (spectral, partial(adamw, rate=best)), strict=True))
    runs = {
        name: [run(loop, seed, options.steps) for seed in range(1, options.seeds + 1)] for name, loop in loops.items()
    }
    print(f"{'':16} {'training loss':>14} {'test loss':>10} {'test accuracy':>14} {'seconds':>8}   medians")
    for name, found in runs.items():
        figures = [
            torch.tensor([measured[key] for _, measured in found]).median().item()
            for key in ("objective", "test_loss", "test_accuracy")
        ]
        seconds = torch.tensor([points[-1][0] for points, _ in found]).median().item()
        print(f"{name:16} {figures[0]:14.1e} {figures[1]:10.3f} {figures[2]:14.3f} {seconds:8.1f}")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for ax, against in zip(axes, ("steps", "seconds"), strict=True):
        draw_curves(ax, {name: [smooth(p, against) for p, _ in found] for name, found in runs.items()}, NAMES[0])
        ax.set(xlabel=against, ylabel="loss of the batches", yscale="log")
    figure.savefig(options.out, dpi=150)
    print(f"curves: {options.out}")


if __name__ == "__main__":
    main()
