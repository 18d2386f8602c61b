"""Poisson's equation on the unit square by a physics-informed network: which bandwidth gets to which error, and when.

``-Δu = 2π² sin πx sin πy`` with ``u = 0`` on the boundary, 900 points inside and 120 on the boundary, float64. Prints,
for each network and bandwidth, iterations and seconds (of the process, one thread) to a relative L2 error, as measured
on a grid of 101 × 101 points.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import hessopt

NETWORKS = {"2-32-1": (2, 32, 1), "5 layers": (2, 50, 50, 50, 50, 1)}
BANDWIDTHS: tuple[Any, ...] = (0, 1, 2, "full", "auto")
RULES: dict[str, dict[str, Any]] = {
    "adapted damping": {},
    "line search": {"search": hessopt.LineSearch()},
}
LEVELS = (1e-2, 1e-4, 1e-6)


def solution(x: Tensor) -> Tensor:
    """sin πx sin πy."""
    return torch.sin(math.pi * x).prod(dim=1)


def network(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """A tanh network."""
    torch.manual_seed(seed)
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b, dtype=torch.float64), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def residuals(net: nn.Module) -> Callable[[], hessopt.LeastSquares]:
    """The closure: mean squares of the residuals inside and on the boundary, halved."""
    inner, edge = ((torch.arange(30.0, dtype=torch.float64) + 0.5) / 30 for _ in range(2))
    inside = torch.cartesian_prod(inner, inner)
    zero, one = torch.zeros_like(edge), torch.ones_like(edge)
    sides = ((edge, zero), (edge, one), (zero, edge), (one, edge))
    boundary = torch.cat([torch.stack(side, dim=1) for side in sides])
    source = 2 * math.pi**2 * solution(inside)

    def closure() -> hessopt.LeastSquares:
        x = inside.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        seconds = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        interior = (seconds[0] + seconds[1] + source) / len(x) ** 0.5
        return hessopt.LeastSquares(torch.cat([interior, net(boundary).squeeze(1) / len(boundary) ** 0.5]))

    return closure


def error_of(net: nn.Module) -> float:
    """Relative L2 error."""
    line = torch.linspace(0, 1, 101, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    with torch.no_grad():
        return float((net(x).squeeze(1) - solution(x)).norm() / solution(x).norm())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each run")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | rule | bandwidth | " + " | ".join(f"to {level:g}" for level in LEVELS) + " | at the end |")
    print("| --- " * (len(LEVELS) + 4) + "|")
    for name in options.networks:
        for rule in options.rules:
            for bandwidth in BANDWIDTHS:
                if bandwidth == 2 and len(NETWORKS[name]) == 3:
                    continue  # two layers: 1 is the full matrix
                net = network(NETWORKS[name], options.seed)
                optimizer = hessopt.BandedNewton(net, bandwidth=bandwidth, **RULES[rule])
                closure, reached, seconds, count = residuals(net), dict[float, str](), 0.0, 0
                while seconds < options.seconds and LEVELS[-1] not in reached:
                    start = time.process_time()
                    optimizer.step(closure)
                    seconds += time.process_time() - start
                    count += 1
                    error = error_of(net)
                    reached |= {k: f"{count} / {seconds:.1f} s" for k in LEVELS if error <= k and k not in reached}
                cells = [reached.get(level, "–") for level in LEVELS]
                end = f"{error:.1e} after {count} / {seconds:.0f} s"
                print(f"| {name} | {rule} | {bandwidth} | " + " | ".join(cells) + f" | {end} |", flush=True)


if __name__ == "__main__":
    main()
