"""Mini-batch training with banded Kronecker curvature beside AdamW: an MLP, a small CNN, and the deep autoencoder.

    python -m examples.gallery.kronecker_mnist --data DIR --task mlp|cnn|autoencoder [--epochs 3] [--images 20000]
    python -m examples.gallery.kronecker_mnist --data DIR --task mlp --timing

DIR holds ``mnist.npz`` (``x_train``, ``y_train``, uint8). All methods start from the same weights and see the same
batches, alternately, a step at a time, so that a busy machine treats them alike. Seconds are of the process, which has
one thread.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessopt import KroneckerNewton, NamedLoss
from hessopt.closure.loss_curvature import LossName, Reduction


def data(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    with np.load(folder / "mnist.npz") as arrays:
        x, y = arrays["x_train"][:count], arrays["y_train"][:count]
    return torch.from_numpy(x.reshape(-1, 784).astype(np.float32) / 255), torch.from_numpy(y.astype(np.int64))


def mlp() -> nn.Sequential:
    widths = [784, 64, 64, 64, 64, 64]
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def autoencoder() -> nn.Sequential:
    widths = [784, 400, 200, 100, 25, 100, 200, 400, 784]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        linear = nn.Linear(a, b)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear] if b in (25, 784) else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def pixel_loss(z: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, x, reduction="sum") / len(x)


class Contestant:
    """One method: its network, optimizer, losses and seconds."""

    def __init__(self, name: str, start: nn.Module, make: Callable[[nn.Module], Any]) -> None:
        self.name, self.net = name, copy.deepcopy(start)
        self.optimizer = make(self.net)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.clock = 0.0

    def step(self, x: Tensor, y: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        begin = time.process_time()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        else:
            self.net.zero_grad()
        loss = loss_of(self.net(x), y)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.clock += time.process_time() - begin
        self.losses.append(loss.item())
        self.seconds.append(self.clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=["mlp", "cnn", "autoencoder"], default="mlp")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--bandwidths", default="0,1,2,full,auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timing", action="store_true", help="80 steps only, and the time of forward and backward")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = data(options.data, options.images)
    torch.manual_seed(options.seed)
    auto = options.task == "autoencoder"
    start = {"mlp": mlp, "cnn": cnn, "autoencoder": autoencoder}[options.task]()
    loss_of = pixel_loss if auto else F.cross_entropy
    batch = 500 if auto else 128
    loss: LossName = "bce_with_logits" if auto else "cross_entropy"
    reduction: Reduction = "batchmean" if auto else "mean"

    def adamw(lr: float) -> Callable[[nn.Module], Any]:
        return lambda net: torch.optim.AdamW(net.parameters(), lr=lr)

    def kronecker(bandwidth: Any) -> Callable[[nn.Module], Any]:
        return lambda net: KroneckerNewton(net, bandwidth=bandwidth, loss=NamedLoss(loss, reduction))

    methods = [(f"AdamW {lr:g}", adamw(lr)) for lr in (1e-3, 3e-3)]
    bandwidths = [k if k in ("full", "auto") else int(k) for k in options.bandwidths.split(",")]
    methods += [(f"bandwidth {k}", kronecker(k)) for k in bandwidths]
    if options.timing:
        methods.insert(0, ("forward and backward", lambda net: None))
    contestants = [Contestant(name, start, make) for name, make in methods]
    generator = torch.Generator().manual_seed(options.seed)
    done = 0
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            if len(rows) < batch or (options.timing and done >= 80):
                continue
            done += 1
            for contestant in contestants:
                contestant.step(x[rows], x[rows] if auto else y[rows], loss_of)
    epoch = len(x) // batch
    target = min(np.mean(c.losses[-epoch // 4 :]) for c in contestants[:2])
    for c in contestants:
        if options.timing:
            # Whole periods of refreshes; the first steps refresh more often.
            print(f"{c.name:22}{1e3 * (c.seconds[79] - c.seconds[39]) / 40:8.2f} ms a step")
            continue
        epochs = [f"{np.mean(c.losses[i : i + epoch]):.4f}" for i in range(0, len(c.losses) - epoch + 1, epoch)]
        smooth = np.convolve(c.losses, np.ones(epoch // 4) / (epoch // 4), "valid")
        reached = np.flatnonzero(smooth <= target)
        when = f"{c.seconds[reached[0] + epoch // 4 - 1]:.1f} s" if len(reached) else "never"
        milliseconds = 1e3 * c.clock / len(c.losses)
        print(
            f"{c.name:14}{milliseconds:8.2f} ms a step, {c.clock:6.1f} s; AdamW's final loss at "
            f"{when}; {' '.join(epochs)}"
        )


if __name__ == "__main__":
    main()
