"""What the objectives of a study at equal steps are at equal seconds: each contender's steps timed, side by side.

    python -m examples.benchmarks.equal_seconds --data DIR [--table TABLE] [--problems mnist-tanh …]

Seconds inside of a study's runs are those of a machine that may have been busy. Here every contender of the table, with
the settings that it has there, takes all steps of the study's runs, on the same batches in rounds of ten steps,
alternately; seconds are of the process, which has one thread. Rows: milliseconds a step, the same in forward-backwards,
the median of the final objectives, and seconds in which ours reaches that objective, in units of the peer's seconds for
all its steps: median, and range over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.benchmarks.kronecker import Step, contender, forward_backward
from examples.shared.problems import PROBLEMS
from examples.studies.ablation.optimizers import CONTENDERS
from examples.studies.ablation.results import STEPS, Entry, entries
from examples.studies.ablation.runner import fresh_task
from examples.studies.ablation.table import Table

TABLE = Path(__file__).resolve().parents[1] / "studies" / "ablation" / "results" / "flagship.jsonl"
ROUND = 10
"""Steps in turn."""
SEED = 1


@dataclass(frozen=True)
class Cost:
    """Seconds after each round of a run, and before it."""

    seconds: list[float]

    def __call__(self, steps: float) -> float:
        if math.isinf(steps):  # never
            return steps
        return float(np.interp(steps, np.arange(len(self.seconds)) * ROUND, self.seconds))

    @property
    def rate(self) -> float:
        """Seconds a step, in the mean of the run."""
        return self.seconds[-1] / (ROUND * (len(self.seconds) - 1))


def costs(problem: str, contenders: Sequence[Entry], data: Path | None, steps: int) -> tuple[list[Cost], float]:
    """Of each contender, and seconds of a forward-backward."""
    makers = [*(contender(entry.contender, **entry.settings) for entry in contenders), forward_backward]
    takers: list[Step] = []
    batches: list[Iterator[Any]] = []
    for make in makers:
        task = fresh_task(PROBLEMS[problem], SEED, torch.device("cpu"), data)
        torch.manual_seed(SEED)
        batches.append(task.batches)
        takers.append(make(task))
    taken = [[0.0] for _ in makers]
    for _ in range(math.ceil(steps / ROUND)):
        for seconds, take, own in zip(taken, takers, batches, strict=True):
            seconds.append(seconds[-1] + _timed(take, own, ROUND))
    found = list(map(Cost, taken))
    return found[:-1], found[-1].rate


def _timed(step: Step, batches: Iterator[Any], count: int) -> float:
    given = list(itertools.islice(batches, count))
    before = time.process_time()
    for batch in given:
        step(batch)
    return time.process_time() - before


def last_step(entry: Entry) -> float:
    return statistics.median(curve[-1][STEPS] for curve in entry.curves)


def report(problem: str, contenders: Sequence[Entry], found: Sequence[Cost], plain: float) -> list[str]:
    """Lines of a table; ours is the first contender."""
    ours, cost = contenders[0], found[0]
    lines = [f"| {problem} | ms a step | forward-backwards | objective | ours: its seconds to that, over theirs |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for entry, theirs in sorted(zip(contenders, found, strict=True), key=lambda pair: pair[0].final):
        ratio = "" if entry is ours else _over(ours, cost, entry.final, theirs(last_step(entry)))
        title = CONTENDERS[entry.contender].title
        row = f"| {title} | {1e3 * theirs.rate:.3g} | {theirs.rate / plain:.3g} | {entry.final:.3g} | {ratio} |"
        lines.append(row)
    return lines


def _over(ours: Entry, cost: Cost, target: float, seconds: float) -> str:
    ratios = sorted(cost(n) / seconds for n in ours.to_target(target, STEPS))
    shown = [f"{r:.2f}" if math.isfinite(r) else "never" for r in (statistics.median(ratios), ratios[0], ratios[-1])]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--problems", nargs="+", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = [
        e for e in entries(Table(options.table).rows, CONTENDERS) if e.role != "variant" and math.isfinite(e.final)
    ]
    for problem in options.problems or list(dict.fromkeys(e.problem for e in known)):
        here = sorted((e for e in known if e.problem == problem), key=lambda e: not e.ours)
        if not here or not here[0].ours:
            raise SystemExit(f"{problem}: no row of ours in {options.table}.")
        steps = round(max(map(last_step, here)))
        print("\n".join(report(problem, here, *costs(problem, here, options.data, steps))), flush=True)


if __name__ == "__main__":
    main()
