"""What the objectives of a study at equal steps are at equal seconds: each contender's steps timed, side by side.

    python -m examples.benchmarks.equal_seconds --data DIR [--table TABLE] [--problems mnist-tanh …] [--rounds 8]

Seconds inside of a study's runs are those of a machine that may have been busy. Here every contender of the table, with
the settings that it has there, takes the same batches in rounds of ten steps, alternately; seconds are of the process,
which has one thread. A run of n steps takes ``n · rate`` and what its first forty took beyond that. Rows: milliseconds
a step, the same in forward-backwards, the median of the final objectives, and seconds in which ours reaches that
objective, in units of the peer's seconds for all its steps: median, and range over the seeds.
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

import torch

from examples.benchmarks.kronecker import Step, contender, forward_backward
from examples.shared.problems import PROBLEMS
from examples.studies.ablation.optimizers import CONTENDERS
from examples.studies.ablation.results import STEPS, Entry, entries
from examples.studies.ablation.runner import fresh_task
from examples.studies.ablation.table import Table

TABLE = Path(__file__).resolve().parents[1] / "studies" / "ablation" / "results" / "flagship.jsonl"
FIRST, ROUND = 40, 10
"""Steps before rates are taken, and of a round."""
SEED = 1


@dataclass(frozen=True)
class Cost:
    """Seconds a step, and of the first steps beyond that."""

    rate: float
    start: float

    def __call__(self, steps: float) -> float:
        return steps * self.rate + self.start * min(1.0, steps / FIRST)


def costs(problem: str, contenders: Sequence[Entry], data: Path | None, rounds: int) -> tuple[list[Cost], float]:
    """Of each contender, and seconds of a forward-backward."""
    makers = [*(contender(entry.contender, **entry.settings) for entry in contenders), forward_backward]
    steps: list[Step] = []
    batches: list[Iterator[Any]] = []
    for make in makers:
        task = fresh_task(PROBLEMS[problem], SEED, torch.device("cpu"), data)
        torch.manual_seed(SEED)
        batches.append(task.batches)
        steps.append(make(task))
    taken = [[_timed(step, own, FIRST)] for step, own in zip(steps, batches, strict=True)]
    for _ in range(rounds):
        for seconds, step, own in zip(taken, steps, batches, strict=True):
            seconds.append(_timed(step, own, ROUND))
    rates = [statistics.mean(seconds[1:]) / ROUND for seconds in taken]
    found = [Cost(rate, max(0.0, seconds[0] - FIRST * rate)) for rate, seconds in zip(rates, taken, strict=True)]
    return found[:-1], rates[-1]


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
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = [
        e for e in entries(Table(options.table).rows, CONTENDERS) if e.role != "variant" and math.isfinite(e.final)
    ]
    for problem in options.problems or list(dict.fromkeys(e.problem for e in known)):
        here = sorted((e for e in known if e.problem == problem), key=lambda e: not e.ours)
        if not here or not here[0].ours:
            raise SystemExit(f"{problem}: no row of ours in {options.table}.")
        print("\n".join(report(problem, here, *costs(problem, here, options.data, options.rounds))), flush=True)


if __name__ == "__main__":
    main()
