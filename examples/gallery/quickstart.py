"""Train on handwritten digits with BandedNewton and with tuned AdamW, then ask where the curvature of the network is.

The training is that of ``banded_on_digits``: two tasks, is the digit odd (one output), and which digit is it (ten
outputs)? BandedNewton solves in the space of batch × outputs, so the first suits it and the second does not. Every
method starts from the same weights and has the same seconds; AdamW gets the best of its learning rates.

    python -m examples.gallery.quickstart [--seconds 0.8] [--seeds 3] [--out quickstart.png]
"""

from __future__ import annotations

import argparse
import time

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import diagnostics
from examples.gallery.banded_on_digits import Run, compare_all
from examples.shared.digit_tasks import DigitTask
from examples.shared.plots import draw_curves, draw_pairs


def draw(results: list[tuple[DigitTask, dict[str, list[Run]]]], table: diagnostics.MetricTable, path: str) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for ax, (task, runs) in zip(axes[:, 0], results, strict=True):
        draw_curves(ax, {name: [run.curve for run in found] for name, found in runs.items()}, black="AdamW")
        ax.set(title=f"Task: {task.name}", xlabel="seconds", ylabel="training loss", yscale="log")
    draw_pairs(figure, axes[:, 1:].flat, table)
    figure.suptitle(
        "Left: BandedNewton and tuned AdamW on digits. Right: curvature between the layers of a trained network"
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.8, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3, help="starts of each method")
    parser.add_argument("--out", default="quickstart.png", help="where to save the figure")
    options = parser.parse_args()
    begin = time.perf_counter()
    results = compare_all(options.seconds, options.seeds)

    task, runs = results[-1]
    x, y = task.data[:2]
    graph = diagnostics.capture(runs["BandedNewton, bandwidth full"][0].model, x, lambda z: task.loss(z, y))
    table = diagnostics.metrics(diagnostics.hessian_blocks(graph))
    print(f"Exact curvature between layers of the network that bandwidth full trained ({task.name}):\n{table}\n")
    print(table.by_distance())
    draw(results, table, options.out)
    print(f"\nfigure: {options.out}; {time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
