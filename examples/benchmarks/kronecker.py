"""What a mini-batch step costs, in milliseconds and in forward-backwards, beside SGD and curvlinops' K-FAC.

    python -m examples.benchmarks.kronecker --data DIR [--problems mnist-tanh …] [--steps 160] [--equal]

The problems are those of the ablation. All contenders see the same batches, alternately, a step at a time; seconds are
of the process, which has one thread. With ``--equal`` factors are updated and inverted every tenth step by all;
otherwise this package has its defaults. The last columns say how many of the forward-backwards are spent where.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from examples.shared.problems import PROBLEMS
from examples.shared.task import Task
from examples.studies.ablation.meter import loss_of
from examples.studies.ablation.optimizers import CONTENDERS, declared_loss
from hessopt import KroneckerAveraging, KroneckerNewton
from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.observer import PassObserver
from hessopt.kronecker.inverse import KroneckerInverse

Step = Callable[[Any], None]
BANDWIDTHS: tuple[Any, ...] = (0, 1, 2, "full", "auto")
PARTS = {
    "columns and their back-propagation": (PassObserver, "_arrive"),
    "averaging": (KroneckerAverages, "moments"),
    "inversion": (KroneckerInverse, "refresh"),
    "solve": (KroneckerInverse, "solve"),
}


def forward_backward(task: Task) -> Step:
    """No optimizer."""

    def step(batch: Any) -> None:
        task.model.zero_grad()
        loss_of(task.evaluate_loss(batch)).backward()

    return step


def contender(name: str, **settings: Any) -> Callable[[Task], Step]:
    """One of the ablation's."""
    return lambda task: CONTENDERS[name].build(task, **settings).step  # type: ignore[return-value]


def ours(bandwidth: Any, **options: Any) -> Callable[[Task], Step]:
    """Without a closure, the loss declared as the ablation's task has it."""

    def build(task: Task) -> Step:
        if task.declared is None:
            raise SystemExit("the problem's loss is not one that can be declared.")
        averages = KroneckerAveraging(**options)
        optimizer = KroneckerNewton(
            task.model, bandwidth=bandwidth, loss=declared_loss(task.declared), averages=averages
        )
        plain = forward_backward(task)

        def step(batch: Any) -> None:
            plain(batch)
            optimizer.step()

        return step

    return build


@contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds inside of the parts of a step; a part inside of another one counts there only."""
    originals = {name: getattr(owner, method) for name, (owner, method) in PARTS.items()}
    inner = [0.0]

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            outside, inner[0], begin = inner[0], 0.0, time.process_time()
            result = function(*args, **kwargs)
            taken = time.process_time() - begin
            spent[name] += taken - inner[0]
            inner[0] = outside + taken
            return result

        return run

    for name, (owner, method) in PARTS.items():
        setattr(owner, method, wrap(name, originals[name]))
    try:
        yield
    finally:
        for name, (owner, method) in PARTS.items():
            setattr(owner, method, originals[name])


def measure(problem: str, data: Path | None, steps: int, equal: bool, bandwidths: tuple[Any, ...]) -> None:
    """Print the table of a problem."""
    options = {"factor_every": 10, "inverse_every": 10} if equal else {}
    methods = {"forward and backward": forward_backward, "SGD": contender("sgd", lr=1e-3)}
    if importlib.util.find_spec("curvlinops") is not None and PROBLEMS[problem].family != "language":
        methods["K-FAC (curvlinops), every 10"] = contender("kfac", lr=1e-3, damping=1e-3, every=10)
    methods |= {f"bandwidth {k}": ours(k, **options) for k in bandwidths}
    runs = {}
    for name, make in methods.items():
        task = PROBLEMS[problem].build(0, torch.device("cpu"), data)
        runs[name] = (make(task), task.batches)
    seconds: dict[str, float] = defaultdict(float)
    parts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in methods}
    for i in range(40 + steps):  # in the first ones refreshes are more frequent
        for name, (step, batches) in runs.items():
            batch = next(batches)
            spent: dict[str, float] = defaultdict(float)
            begin = time.process_time()
            with watched(spent):
                step(batch)
            if i >= 40:
                seconds[name] += time.process_time() - begin
                for part, taken in spent.items():
                    parts[name][part] += taken
    unit = seconds["forward and backward"]
    print(f"\n{PROBLEMS[problem].title}{', all every tenth step' if equal else ''}\n")
    print("| | ms a step | forward-backwards | " + " | ".join(PARTS) + " |")
    print("| --- " * (3 + len(PARTS)) + "|")
    for name in methods:
        shares = " | ".join(f"{parts[name][part] / unit:.2f}" if parts[name] else "" for part in PARTS)
        print(f"| {name} | {1e3 * seconds[name] / steps:.2f} | {seconds[name] / unit:.2f} | {shares} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--problems", nargs="+", default=["digits-tanh", "digits-cnn"])
    parser.add_argument("--steps", type=int, default=160, help="that count; whole periods of 40")
    parser.add_argument("--equal", action="store_true", help="factors and inverses every tenth step")
    parser.add_argument("--bandwidths", nargs="+", default=["0", "1", "2", "full", "auto"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    bandwidths = tuple(k if k in ("full", "auto") else int(k) for k in options.bandwidths)
    for problem in options.problems:
        measure(problem, options.data, options.steps, options.equal, bandwidths)


if __name__ == "__main__":
    main()
