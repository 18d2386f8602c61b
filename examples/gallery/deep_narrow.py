"""A deep narrow network, full batch: curvature between layers against curvature inside of them.

Is the digit odd? 600 of scikit-learn's 8×8 digits, eight tanh layers of width 12, float32, cross entropy. Prints the
training loss when the seconds (of the process, one thread) are over, and iterations and seconds to 1e-3, for each of
three starts; AdamW at each of its rates.

    python -m examples.gallery.deep_narrow [--seconds 4] [--seeds 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hessopt

BANDWIDTHS: tuple[Any, ...] = (0, 1, 2, 4, "full", "auto")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TARGET = 1e-3


def data(count: int = 600) -> tuple[Tensor, Tensor]:
    """Centred images ``(count, 64)`` and whether the digit is odd."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels % 2).float()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return (x - x.mean(0))[chosen], y[chosen]


def network(seed: int, depth: int = 8, width: int = 12) -> nn.Sequential:
    """PyTorch's default initialisation."""
    torch.manual_seed(seed)
    widths = [64, *[width] * depth]
    hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def banded(net: nn.Module, bandwidth: Any) -> torch.optim.Optimizer:
    return hessopt.BandedNewton(net, bandwidth=bandwidth)


def adamw(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)


def run(make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, seconds: float) -> str:
    """``loss (iterations / seconds to the target)``, and the bandwidth that was chosen."""
    x, y = data()
    net = network(seed)
    optimizer = make(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(net(x)[:, 0], y)
        loss.backward()
        return loss

    spent, iterations, loss, reached = 0.0, 0, float("inf"), ""
    while spent < seconds:
        begin = time.process_time()
        value: Any = optimizer.step(closure)  # type: ignore[arg-type]
        loss = value.item()
        spent += time.process_time() - begin
        iterations += 1
        if loss < TARGET and not reached:
            reached = f" ({iterations} / {spent:.2f} s)"
    chosen = optimizer.state[next(net.parameters())].get("bandwidth")
    return f"{loss:.1e}{reached}" + ("" if chosen is None else f", k = {chosen}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        f"bandwidth {k}": partial(banded, bandwidth=k) for k in BANDWIDTHS
    }
    methods |= {f"AdamW {rate:g}": partial(adamw, lr=rate) for rate in RATES}
    print("| | " + " | ".join(f"start {seed}" for seed in range(options.seeds)) + " |")
    print("| --- " * (options.seeds + 1) + "|")
    for name, make in methods.items():
        print(f"| {name} | " + " | ".join(run(make, seed, options.seconds) for seed in range(options.seeds)) + " |")


if __name__ == "__main__":
    main()
