"""The deep MNIST autoencoder (Hinton and Salakhutdinov 2006): training error against seconds and gradient-equivalents.

Encoder 784-1000-500-250-30, decoder the reverse, tanh with a linear code, Bernoulli loss; a quarter of the widths with
``--scale 0.25``. All methods start from the same weights and get the same seconds; the learning rates of Adam and NAG
are the best of a grid. A gradient-equivalent is the work of one gradient of the whole training set.

    python -m examples.gallery.mnist_autoencoder --data DIR [--scale 0.25] [--images 10000] [--seconds 60]

DIR holds ``mnist.npz`` (``x_train``, uint8) or torchvision's ``MNIST/raw/train-images-idx3-ubyte``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import hessopt

METHODS = {"trust-region": hessopt.TrustRadius(), "levenberg-marquardt": hessopt.LevenbergMarquardt()}


def images(folder: Path, count: int) -> Tensor:
    """The first training images, ``(count, 784)`` in [0, 1]."""
    packed, raw = folder / "mnist.npz", folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    if packed.exists():
        pixels = np.load(packed)["x_train"]
    elif raw.exists():
        pixels = np.frombuffer(raw.read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28)
    else:
        raise SystemExit(f"neither {packed} nor {raw} exists: pass the folder of MNIST as --data.")
    return torch.from_numpy(pixels[:count].reshape(-1, 784).astype(np.float32) / 255)


def autoencoder(scale: float) -> nn.Sequential:
    sizes = [784, *(max(2, round(scale * width)) for width in (1000, 500, 250)), 30]
    layers: list[nn.Module] = []
    for a, b in pairwise([*sizes, *sizes[-2::-1]]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    del layers[2 * len(sizes) - 3]  # the code is linear
    return nn.Sequential(*layers[:-1])


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """Cross entropy of the pixels, summed over an image, mean over images."""
    return F.binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x)


@torch.no_grad()
def errors(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """The loss and the squared reconstruction error of an image, means over all images."""
    parts = x.split(5000)
    loss = sum(loss_of(net, part).item() * len(part) for part in parts) / len(x)
    squared = sum((torch.sigmoid(net(part)) - part).square().sum().item() for part in parts) / len(x)
    return loss, squared


@dataclass
class Run:
    name: str
    steps: int
    work: float
    loss: float
    squared: float
    half_seconds: float


def batches(x: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            if len(rows) == size:
                yield x[rows.to(x.device)]


def train(
    name: str,
    start: nn.Module,
    x: Tensor,
    batch: int,
    seconds: float,
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> Run:
    net = copy.deepcopy(start)
    optimizer = make(net)
    work, steps, curve = 0.0, 0, [(0.0, errors(net, x)[0])]
    spent, begin = 0.0, time.perf_counter()
    evaluations = 0
    for part in batches(x, batch, 0):

        def closure(part: Tensor = part) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = loss_of(net, part)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        steps += 1
        gradients: float = evaluations
        if isinstance(optimizer, hessopt.NewtonCG) and optimizer.last_step is not None:
            gradients = optimizer.last_step.gradient_equivalents
        work += gradients * batch / len(x)
        evaluations = 0
        if x.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if spent + now - begin > len(curve) * seconds / 20:  # the time of evaluating it does not count
            spent += now - begin
            curve.append((spent, errors(net, x)[0]))
            if spent >= seconds:
                break
            begin = time.perf_counter()
    loss, squared = errors(net, x)
    half = next(t for t, value in curve if value <= (curve[0][1] + loss) / 2)
    return Run(name, steps, work, loss, squared, half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = images(options.data, options.images).to(options.device)
    torch.manual_seed(0)
    start = autoencoder(options.scale).to(options.device)
    curvature_batch = min(len(x), 2000)
    methods: list[tuple[str, int, Callable[[nn.Module], torch.optim.Optimizer]]] = [
        *(
            (f"Adam, lr {lr:g}", 200, lambda net, lr=lr: torch.optim.Adam(net.parameters(), lr=lr))
            for lr in (3e-4, 1e-3, 3e-3)
        ),
        *(
            (
                f"NAG, lr {lr:g}", 200,
                lambda net, lr=lr: torch.optim.SGD(net.parameters(), lr=lr, momentum=0.95, nesterov=True),
            )
            for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
        ),
        ("LBFGS", len(x), lambda net: torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe")),
        *(
            (
                f"NewtonCG, ggn, {name}", curvature_batch,
                lambda net, method=method: hessopt.NewtonCG(
                    net, curvature="ggn", method=method, max_products=30, warm_start=True
                ),
            )
            for name, method in METHODS.items()
        ),
        ("NewtonCG, auto", curvature_batch, lambda net: hessopt.NewtonCG(net, max_products=30)),
    ]  # fmt: skip
    widths = "-".join(str(m.out_features) for m in start if isinstance(m, nn.Linear))
    print(f"784-{widths}, {len(x)} images, {options.seconds:g} s each, {options.device}, {options.threads} threads")
    print(f"start: loss {errors(start, x)[0]:.2f}\n")
    print(f"{'method':34}{'batch':>7}{'steps':>8}{'gradients':>11}{'loss':>9}{'squared error':>15}{'half way at':>13}")
    for name, batch, make in tqdm(methods, disable=None):
        found = train(name, start, x, batch, options.seconds, make)
        print(
            f"{name:34}{batch:7}{found.steps:8}{found.work:11.1f}{found.loss:9.2f}{found.squared:15.2f}"
            f"{found.half_seconds:11.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
