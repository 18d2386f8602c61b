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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared.models import autoencoder, mnist_cnn
from examples.shared.problems.autoencoder import BernoulliLoss, glorot
from examples.shared.problems.classification import perceptron
from examples.shared.problems.common import minibatches
from examples.shared.problems.data import mnist_pixels
from hessopt import KroneckerNewton, NamedLoss

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: perceptron([784, 64, 64, 64, 64, 64, 10], nn.Tanh),
    "cnn": mnist_cnn,
    "autoencoder": lambda: glorot(autoencoder([784, 400, 200, 100, 25])),
}


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
        (self.net if self.optimizer is None else self.optimizer).zero_grad()
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
    parser.add_argument("--task", choices=NETWORKS, default="mlp")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--bandwidths", default="0,1,2,full,auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timing", action="store_true", help="80 steps only, and the time of forward and backward")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels, y = mnist_pixels(options.data, options.images)
    x = pixels.flatten(1) / 255
    torch.manual_seed(options.seed)
    auto = options.task == "autoencoder"
    start = NETWORKS[options.task]()
    loss_of = BernoulliLoss() if auto else F.cross_entropy
    loss = NamedLoss("bce_with_logits", "batchmean") if auto else NamedLoss("cross_entropy", "mean")
    batch = 500 if auto else 128

    def adamw(lr: float) -> Callable[[nn.Module], Any]:
        return lambda net: torch.optim.AdamW(net.parameters(), lr=lr)

    def kronecker(bandwidth: Any) -> Callable[[nn.Module], Any]:
        return lambda net: KroneckerNewton(net, bandwidth=bandwidth, loss=loss)

    methods = [(f"AdamW {lr:g}", adamw(lr)) for lr in (1e-3, 3e-3)]
    bandwidths = [k if k in ("full", "auto") else int(k) for k in options.bandwidths.split(",")]
    methods += [(f"bandwidth {k}", kronecker(k)) for k in bandwidths]
    if options.timing:
        methods.insert(0, ("forward and backward", lambda net: None))
    contestants = [Contestant(name, start, make) for name, make in methods]
    epoch = len(x) // batch
    steps = min(80, options.epochs * epoch) if options.timing else options.epochs * epoch
    for inputs, targets in islice(minibatches(x, x if auto else y, batch, options.seed), steps):
        for contestant in contestants:
            contestant.step(inputs, targets, loss_of)
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
        print(
            f"{c.name:14}{1e3 * c.clock / len(c.losses):8.2f} ms a step, {c.clock:6.1f} s; AdamW's final loss at "
            f"{when}; {' '.join(epochs)}"
        )


if __name__ == "__main__":
    main()
