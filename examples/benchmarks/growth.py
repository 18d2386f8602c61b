"""How the time of exact blocks and of the parametric Hessian grows with depth, width and batch: a table and a plot.

python -m examples.benchmarks.growth --threads 1 [--out growth.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeAlias

import matplotlib

from examples.benchmarks import blocks as benchmark_blocks
from examples.benchmarks import parametric as benchmark_parametric

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from examples.shared.models import mlp
from examples.shared.timing import median_seconds

Runs = dict[str, Callable[[], Any]]
"""Method and run; the first is ours."""


def blocks(depth: int, width: int, batch: int) -> Runs:
    return benchmark_blocks.methods(*benchmark_blocks.problem(depth, width, batch))


def parametric(depth: int, width: int, batch: int) -> Runs:
    torch.manual_seed(0)
    return benchmark_parametric.methods(mlp([width, *[width] * depth, 10]), torch.randn(batch, width))


Study: TypeAlias = tuple[Callable[..., Runs], dict[str, int]]

STUDIES: dict[str, Study] = {
    "blocks of all pairs": (blocks, {"depth": 8, "width": 64, "batch": 32}),
    "parametric Hessian": (parametric, {"depth": 3, "width": 32, "batch": 32}),
}
RANGES: dict[str, dict[str, tuple[int, ...]]] = {
    "blocks of all pairs": {"depth": (2, 4, 8, 16), "width": (16, 32, 64, 128), "batch": (8, 16, 32, 64, 128)},
    "parametric Hessian": {"depth": (1, 2, 4, 6), "width": (12, 24, 36, 48), "batch": (8, 32, 128, 512)},
}
GROUPS = {"ours": ("block recursion", "parameter_hessian"), "by columns": ("columns",), "torch.func, best mode": ("",)}


def group(method: str) -> str:
    return next(name for name, prefixes in GROUPS.items() if method.startswith(prefixes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="growth.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for row, study in zip(axes, STUDIES, strict=True):
        make, base = STUDIES[study]
        for axis, (name, values) in zip(row, RANGES[study].items(), strict=True):
            seconds: dict[str, list[float]] = {}
            for value in tqdm(values, desc=f"{study}, {name}", disable=None):
                best: dict[str, float] = {}
                for method, run in make(**{**base, name: value}).items():
                    key = group(method)
                    best[key] = min(best.get(key, float("inf")), median_seconds(run, options.repeats)[0])
                for key, time in best.items():
                    seconds.setdefault(key, []).append(time)
            fixed = ", ".join(f"{k} {v}" for k, v in base.items() if k != name)
            print(f"\n{study}: {name} ({fixed})")
            print(f"{name:>24}" + "".join(f"{value:>10}" for value in values))
            for key, times in seconds.items():
                print(f"{key:>24}" + "".join(f"{time:10.4f}" for time in times))
                axis.loglog(values, times, marker="o", label=key)
            ratios = [t / o for t, o in zip(seconds["torch.func, best mode"], seconds["ours"], strict=True)]
            print(f"{'torch.func / ours':>24}" + "".join(f"{ratio:10.1f}" for ratio in ratios))
            axis.set(title=f"{study} ({fixed})", xlabel=name, ylabel="seconds")
            axis.set_xticks(values, [str(v) for v in values])
            axis.minorticks_off()
            axis.legend(fontsize="small")
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
