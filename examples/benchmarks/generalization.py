"""Held-out loss beside training loss: at equal steps, at equal training loss, and at each method's best step.

    python -m examples.benchmarks.generalization --data DIR [--table TABLE] [--problems mnist-tanh …] [--contenders …]

The contenders of a table with the settings they have there, ours as it is and its variants with weight decay, run the
table's steps once more on its seeds, and both losses are taken at :data:`POINTS` points of the way. A column each,
medians over the seeds: the training objective and the held-out loss and accuracy at the end; held-out loss and accuracy
where the training objective first is at :data:`FIT` of what it is at the start; the least held-out loss, and after
which share of the steps that is.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.equal_seconds import TABLE, last_step
from examples.shared.problems import PROBLEMS
from examples.studies.ablation.optimizers import CONTENDERS
from examples.studies.ablation.results import Entry, entries
from examples.studies.ablation.runner import fresh_task
from examples.studies.ablation.table import Table

POINTS = 30
FIT = 0.02
"""Share of the first training objective: what all but the slowest reach on problems that can be fitted."""


@dataclass(frozen=True)
class Point:
    """A point of a run: share of the steps, training objective, held-out loss, held-out accuracy (NaN if none)."""

    share: float
    objective: float
    loss: float
    accuracy: float


def trajectory(problem: str, entry: Entry, steps: int, seed: int, data: Path | None) -> list[Point]:
    """One run, measured at about :data:`POINTS` points beside its start."""
    task = fresh_task(PROBLEMS[problem], seed, torch.device("cpu"), data)
    torch.manual_seed(seed)
    stepper: Any = CONTENDERS[entry.contender].build(task, **entry.settings)

    def measured(share: float) -> Point:
        with getattr(stepper, "shown", nullcontext)():
            found = task.measure()
        return Point(share, found["objective"], found["test_loss"], found.get("test_accuracy", math.nan))

    points = [measured(0.0)]
    every = max(1, steps // POINTS)
    for done in range(1, steps + 1):
        stepper.share = (done - 1) / steps
        stepper.step(next(task.batches))
        if done % every == 0 or done == steps:
            points.append(measured(done / steps))
    return points


def figures(points: Sequence[Point]) -> dict[str, float]:
    """What the table says of one run; infinite or NaN where the training objective does not get so low."""
    last, best = points[-1], min(points, key=lambda p: p.loss)
    fitted = next((p for p in points if p.objective <= FIT * points[0].objective), None)
    return {
        "objective": last.objective,
        "held out": last.loss,
        "accuracy": last.accuracy,
        "fitted: held out": math.inf if fitted is None else fitted.loss,
        "fitted: accuracy": math.nan if fitted is None else fitted.accuracy,
        "fitted: share of the steps": math.inf if fitted is None else fitted.share,
        "least held out": best.loss,
        "its share of the steps": best.share,
    }


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """By figure; of NaN where any is."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def row(title: str, found: dict[str, float]) -> str:
    """A line of the table."""
    cells = ("" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.3g}" for value in found.values())
    return " | ".join([f"| {title}", *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--problems", nargs="+", default=["digits-tanh", "digits-cnn", "mnist-tanh", "mnist-residual"])
    parser.add_argument("--contenders", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = [e for e in entries(Table(options.table).rows, CONTENDERS) if math.isfinite(e.final)]
    for problem in options.problems:
        here = [
            e
            for e in known
            if e.problem == problem
            and (e.role != "variant" or "weight_decay" in e.settings)
            and (not options.contenders or e.contender in options.contenders)
        ]
        if not here:
            raise SystemExit(f"{problem}: no such rows in {options.table}.")
        for i, entry in enumerate(here):
            steps = int(last_step(entry))
            runs = [figures(trajectory(problem, entry, steps, seed, options.data)) for seed in options.seeds]
            if i == 0:
                print(f"| {problem}, {steps} | " + " | ".join(runs[0]) + " |")
                print("| --- " * (1 + len(runs[0])) + "|")
            print(row(entry.label or CONTENDERS[entry.contender].title, medians(runs)), flush=True)


if __name__ == "__main__":
    main()
