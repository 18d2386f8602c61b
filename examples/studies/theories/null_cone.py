"""Neural null cones: published figure, ours, control, verdict.

    python -m examples.studies.theories null_cone [--data DIR] [--seeds 3] [--skip-continual]

1. The identities, on random matrices and on a network: ``vᵀHv = 0``, isotropy, parity, inertia.
2. Whether null directions are special: channel width and share of the gradient, beside random directions.
3. ``hessopt.NullBoost``: every mode at the best of its learning rates, on two problems.
4. Continual learning, in ``continual.py``: part of it needs ``--data DIR`` with MNIST and CIFAR-10, and half an hour.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import diagnostics
import hessopt
from diagnostics.estimators.null_vectors import null_vectors
from hessopt.errors import ClosureError

MODES = ("base alone", "null", "random", "random_krylov", "negative_curvature", "low_curvature")


def identities() -> None:
    print("1. Identities (100 symmetric Gaussian matrices of size 50)")
    generator = torch.Generator().manual_seed(0)
    isotropic, everything, ours, standard, parity = [], [], [], [], 0
    for _ in range(100):
        drawn = torch.randn(50, 50, dtype=torch.float64, generator=generator)
        matrix = (drawn + drawn.mT) / 2
        scale = torch.linalg.matrix_norm(matrix)

        def form(vectors: Tensor, matrix: Tensor = matrix, scale: Tensor = scale) -> float:
            q = torch.linalg.qr(vectors).Q
            return float(torch.linalg.matrix_norm(q.mT @ matrix @ q) / scale)

        one = null_vectors(matrix, "standard")
        standard.append(one.pairs)
        parity += one.parity is True
        spectral = null_vectors(matrix)
        ours.append(spectral.pairs / spectral.inertia.isotropic)
        if one.pairs:
            isotropic.append(form(one.vectors))
            everything.append(form(null_vectors(matrix, "standard", sign="both").vectors))
    print(f"  published basis, all real μ: ‖QᵀHQ‖/‖H‖ median {statistics.median(everything):.2f}: not isotropic")
    print(f"  μ > 0 alone:                 ‖QᵀHQ‖/‖H‖ at most {max(isotropic):.0e}")
    print(
        f"  standard J: {min(standard)} to {max(standard)} pairs; spectral J: min(n+, n-) in {ours.count(1.0)} of 100"
    )
    print(f"  parity of the pairs, n- mod 2: holds for {parity} of 100")


@dataclass(frozen=True)
class Problem:
    name: str
    network: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    rates: tuple[float, ...]


def problems() -> list[Problem]:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float()[:500] / 16, torch.from_numpy(labels)[:500]
    return [
        Problem(
            "digits, MLP 64-32-10", lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
            x, y, F.cross_entropy, (0.2, 0.4, 0.8, 1.6, 3.2),
        ),
        Problem(
            "digits, autoencoder 64-24-8-24-64",
            lambda: nn.Sequential(
                nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 8), nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 64)
            ),
            x, x, F.mse_loss, (0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
        ),
    ]  # fmt: skip


def train(problem: Problem, mode: str, lr: float, seed: int, steps: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    net = problem.network()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    if mode != "base alone":
        boosted = {"mode": mode, "beta": 3.0, "every": 20, "krylov": 20, "rank": 5, "seed": seed}
        optimizer = hessopt.NullBoost(optimizer, model=net, **boosted)  # type: ignore[arg-type]
    loss = torch.tensor(math.nan)
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = problem.loss(net(problem.x), problem.y)
            value.backward()
            return value

        try:
            loss = optimizer.step(closure)  # type: ignore[arg-type, assignment]
        except ClosureError:  # not finite: it diverged
            return net, math.inf
    return net, float(loss.detach())


def channels(problem: Problem) -> None:
    print(f"\n2. Are null directions special? ({problem.name}, k = 40)")
    for steps in (0, 100):
        net, _ = train(problem, "base alone", problem.rates[0], 0, steps)
        op = diagnostics.HessianOperator(net, (problem.x, problem.y), problem.loss)
        cone = diagnostics.null_cone(op, 40)
        print(f"  after {steps} steps: " + str(cone).replace("\n", "\n    "))
        if cone.basis.shape[1]:
            width = diagnostics.channel_width(op, cone, directions=6)
            print(f"    half-width of null over random directions of the Krylov space: {width.ratio:.2f}")


def boost(problem: Problem, seeds: int, steps: int) -> None:
    print(f"\n3. NullBoost on {problem.name}: SGD with momentum, {steps} steps, {seeds} seeds, β = 3, rank 5 of k = 20")
    print("   Published (ViT-Tiny, CIFAR-100): 65.8 % null, 60.1 % SGD, 57.3 % random; with its bug fixed, no gain.")
    print(f"   {'':20}{'loss at lr ' + format(problem.rates[0], 'g'):>18}{'at its best lr':>22}{'lr':>6}{'s a run':>9}")
    best: dict[str, float] = {}
    for mode in tqdm(MODES, leave=False, disable=None):
        start = time.process_time()
        found = {lr: [train(problem, mode, lr, seed, steps)[1] for seed in range(seeds)] for lr in problem.rates}
        seconds = (time.process_time() - start) / (seeds * len(problem.rates))
        means = {lr: statistics.mean(v) if all(map(math.isfinite, v)) else math.inf for lr, v in found.items()}
        lr = min(means, key=lambda rate: means[rate])
        best[mode] = means[lr]
        spread = statistics.stdev(found[lr]) if seeds > 1 else math.nan
        shown = f"{means[lr]:.5f} ± {spread:.5f}"
        print(f"   {mode:20}{means[problem.rates[0]]:18.5f}{shown:>22}{lr:6g}{seconds:9.2f}", flush=True)
    order = sorted(best, key=lambda mode: best[mode])
    above = [control for control in ("random_krylov", "base alone") if best["null"] >= best[control]]
    print(f"   Verdict, by loss: {' < '.join(order)}.")
    print(f"   Null vectors are {'no better than ' + ' and '.join(above) if above else 'ahead of both controls'}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.theories null_cone",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder with mnist.npz and cifar10.npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--skip-continual", action="store_true")
    options = parser.parse_args(arguments)
    identities()
    both = problems()
    channels(both[0])
    for problem in both:
        boost(problem, options.seeds, options.steps)
    if not options.skip_continual:
        print("\n4. Continual learning", flush=True)
        script = [sys.executable, "-m", "examples.studies.theories", "continual", "--seeds", str(options.seeds)]
        subprocess.run(script + (["--data", str(options.data)] if options.data else []), check=True)
