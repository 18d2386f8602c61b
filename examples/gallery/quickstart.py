"""Train on handwritten digits with BandedNewton and with tuned AdamW, then ask where the curvature of the network is.

Two tasks on scikit-learn's 8×8 digits (1437 to train on, 360 to test): is the digit odd (one output), and which digit
is it (ten outputs)? BandedNewton solves in the space of batch × outputs, so the first suits it and the second does not.
Every method starts from the same weights and has the same seconds; AdamW gets the best of its learning rates.

    python -m examples.gallery.quickstart [--seconds 0.8] [--seeds 3] [--out quickstart.png]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import diagnostics
import hessopt
from examples.shared.models import mlp
from hessopt.network.cliques import Bandwidth

ADAMW_GRID = (1e-3, 3e-3, 1e-2, 3e-2)
BANDWIDTHS: tuple[Bandwidth, ...] = (0, 1, "full")


@dataclass(frozen=True)
class Task:
    name: str
    outputs: int
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]
    accuracy: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x, y = self.train
        while True:
            for rows in torch.randperm(len(x), generator=generator).split(self.batch)[: len(x) // self.batch]:
                yield x[rows], y[rows]


@dataclass
class Run:
    """One training run; ``curve`` holds (seconds, training loss) without the time of evaluating it."""

    model: nn.Module
    steps: int
    gradients: float
    curve: list[tuple[float, float]]
    train_loss: float
    test_loss: float
    accuracy: float


def tasks() -> list[Task]:
    images, digits = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16, digits, test_size=0.2, stratify=digits, random_state=0)
    center = x.mean(0)
    inputs, test_inputs = (torch.tensor(part - center, dtype=torch.float32) for part in (x, x_test))
    labels, test_labels = torch.tensor(y), torch.tensor(y_test)
    odd, test_odd = (labels % 2).float().unsqueeze(1), (test_labels % 2).float().unsqueeze(1)
    return [
        Task(
            "odd or even",
            1,
            256,
            F.binary_cross_entropy_with_logits,
            lambda z, t: ((z > 0) == (t > 0)).float().mean(),
            (inputs, odd),
            (test_inputs, test_odd),
        ),
        Task(
            "which digit",
            10,
            64,
            F.cross_entropy,
            lambda z, t: (z.argmax(1) == t).float().mean(),
            (inputs, labels),
            (test_inputs, test_labels),
        ),
    ]


def network(task: Task, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp([64, 20, 20, 20, 20, 20, 20, task.outputs], nn.Tanh)


def train(
    task: Task,
    start: nn.Module,
    seed: int,
    seconds: float,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    extra: tuple[float, float],
) -> Run:
    model = copy.deepcopy(start)
    optimizer = make(model)
    curve: list[tuple[float, float]] = []
    spent, steps, evaluations = 0.0, 0, 0
    for x, y in task.batches(seed):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            loss.backward()
            return loss

        begin = time.perf_counter()
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub knows closures that return floats only
        spent += time.perf_counter() - begin
        steps += 1
        if isinstance(optimizer, hessopt.BandedNewton) and optimizer.last_step is not None:
            evaluations += optimizer.last_step.closure_runs - 1
        if spent > len(curve) / 20 * seconds:
            with torch.no_grad():
                curve.append((spent, task.loss(model(task.train[0]), task.train[1]).item()))
        if spent > seconds:
            break
    forward, columns = extra if isinstance(optimizer, hessopt.BandedNewton) else (0.0, 0.0)
    with torch.no_grad():
        z, z_test = model(task.train[0]), model(task.test[0])
    return Run(
        model=model,
        steps=steps,
        gradients=steps * (1 + columns) + evaluations * forward,
        curve=curve,
        train_loss=task.loss(z, task.train[1]).item(),
        test_loss=task.loss(z_test, task.test[1]).item(),
        accuracy=task.accuracy(z_test, task.test[1]).item(),
    )


def extra_work(task: Task, model: nn.Sequential) -> tuple[float, float]:
    """What BandedNewton needs besides the gradient, measured in gradients (a forward and a backward pass).

    Returns the cost of a forward pass, which evaluates a trial step, and of carrying one vector an output back.
    """
    x, y = next(task.batches(0))
    activations: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda *a: activations.append(a[2])) for m in model if isinstance(m, nn.Sequential)
    ]
    z = model(x)
    for hook in hooks:
        hook.remove()
    vectors = torch.eye(task.outputs).unsqueeze(1).expand(-1, len(x), -1)

    def seconds_of(work: Callable[[], object]) -> float:
        durations = []
        for _ in range(20):
            begin = time.perf_counter()
            work()
            durations.append(time.perf_counter() - begin)
        return statistics.median(durations)

    parameters = list(model.parameters())
    gradient = seconds_of(lambda: torch.autograd.grad(task.loss(model(x), y), parameters))
    with torch.no_grad():
        forward = seconds_of(lambda: task.loss(model(x), y))
    back = seconds_of(lambda: torch.autograd.grad(z, activations, vectors, retain_graph=True, is_grads_batched=True))
    return forward / gradient, back / gradient


def compare(task: Task, seconds: float, seeds: int, bar: tqdm[Any]) -> dict[str, list[Run]]:
    def adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda model: torch.optim.AdamW(model.parameters(), lr=rate)

    def banded(bandwidth: Bandwidth) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda model: hessopt.BandedNewton(model, bandwidth=bandwidth)

    methods = {f"AdamW, lr {rate:g}": adamw(rate) for rate in ADAMW_GRID}
    methods |= {f"BandedNewton, bandwidth {k}": banded(k) for k in BANDWIDTHS}
    extra = extra_work(task, network(task, 0))
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for name, make in methods.items():
        for seed in range(seeds):
            bar.set_description(f"{task.name}: {name}")
            runs[name].append(train(task, network(task, seed), seed, seconds, make, extra))
            bar.update()
    tuned = min((name for name in runs if name.startswith("AdamW")), key=lambda name: median(runs[name], "train_loss"))
    return {name: results for name, results in runs.items() if name == tuned or name.startswith("Banded")}


def median(runs: list[Run], field: str) -> float:
    values: list[float] = [getattr(run, field) for run in runs]
    return statistics.median(values)


def report(task: Task, runs: dict[str, list[Run]], seconds: float) -> str:
    seeds = len(next(iter(runs.values())))
    outputs = f"{task.outputs} output{'s' if task.outputs > 1 else ''}"
    lines = [
        f"Task: {task.name} ({outputs}), {seconds:g} s a run, batch {task.batch}, medians of {seeds} starts",
        f"{'':28}{'train loss':>11}{'test loss':>11}{'accuracy':>10}{'steps':>8}{'gradients':>11}",
    ]
    for name, results in runs.items():
        values = [median(results, f) for f in ("train_loss", "test_loss", "accuracy", "steps", "gradients")]
        lines.append("{:28}{:11.2e}{:11.3f}{:10.4f}{:8.0f}{:11.0f}".format(name, *values))
    best = min(runs, key=lambda name: median(runs[name], "train_loss"))
    most_accurate = max(runs, key=lambda name: median(runs[name], "accuracy"))
    lines.append(f"lowest training loss: {best}; highest test accuracy: {most_accurate}")
    return "\n".join(lines)


def diagnose(task: Task, model: nn.Module) -> diagnostics.MetricTable:
    x, y = task.train
    graph = diagnostics.capture(model, x, lambda z: task.loss(z, y))
    return diagnostics.metrics(diagnostics.hessian_blocks(graph))


def draw(results: list[tuple[Task, dict[str, list[Run]]]], table: diagnostics.MetricTable) -> Figure:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for ax, (task, runs) in zip(axes[:, 0], results, strict=True):
        for name, seeds in runs.items():
            color = "black" if name.startswith("AdamW") else None
            (line,) = ax.plot(*zip(*seeds[0].curve, strict=True), label=name, color=color)
            for run in seeds[1:]:
                ax.plot(*zip(*run.curve, strict=True), color=line.get_color(), alpha=0.4)
        ax.set(title=f"Task: {task.name}", xlabel="seconds", ylabel="training loss", yscale="log")
        ax.legend(fontsize=8)
    panels = {
        "Resonance R = |H|": (table.resonance, LogNorm()),
        "Coupling C": (table.coupling, Normalize(0, 1)),
        "Stable rank D": (table.stable_rank, Normalize(1)),
        "GN-Gap = |H^T| / |H^GN| (grey: 0)": (table.gn_gap.where(table.gn_gap > 0, torch.nan), LogNorm()),
    }
    for ax, (title, (values, norm)) in zip(axes[:, 1:].flat, panels.items(), strict=True):
        image = ax.imshow(values.numpy(), norm=norm)
        ax.set_facecolor("lightgrey")
        ax.set(title=title, xticks=range(len(table.nodes)), yticks=range(len(table.nodes)))
        ax.set_xticklabels(table.nodes)
        ax.set_yticklabels([f"layer {name}" for name in table.nodes])
        figure.colorbar(image, ax=ax, shrink=0.8)
    figure.suptitle(
        "Left: BandedNewton and tuned AdamW on digits. Right: curvature between the layers of a trained network"
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.8, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3, help="starts of each method")
    parser.add_argument("--out", default="quickstart.png", help="where to save the figure")
    options = parser.parse_args()

    begin = time.perf_counter()
    total = 2 * (len(ADAMW_GRID) + len(BANDWIDTHS)) * options.seeds
    with tqdm(total=total, disable=None) as bar:
        results = [(task, compare(task, options.seconds, options.seeds, bar)) for task in tasks()]
    for task, runs in results:
        print(report(task, runs, options.seconds), end="\n\n")

    task, runs = results[-1]
    table = diagnose(task, runs["BandedNewton, bandwidth full"][0].model)
    print(f"Exact curvature between layers of the network that bandwidth full trained ({task.name}):\n{table}\n")
    print(table.by_distance())
    draw(results, table).savefig(options.out, dpi=120)
    print(f"\nfigure: {options.out}; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
