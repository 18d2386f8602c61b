"""The deep MNIST autoencoder (Hinton and Salakhutdinov 2006): training error against seconds and gradient-equivalents.

Encoder 784-1000-500-250-30, decoder the reverse, tanh with a linear code, Bernoulli loss; a quarter of the widths with
``--scale 0.25``. All methods start from the same weights and get the same seconds; the learning rates of Adam and NAG
are the best of a grid. A gradient-equivalent is the work of one gradient of the whole training set.

    python -m examples.gallery.mnist_autoencoder --data DIR [--scale 0.25] [--images 10000] [--seconds 60]

DIR holds ``mnist.npz`` (``x_train``, ``y_train``, uint8) or torchvision's ``MNIST/raw/train-*-ubyte``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hessopt
from examples.shared.models import autoencoder
from examples.shared.problems.autoencoder import BernoulliLoss, squared_error
from examples.shared.problems.common import means, minibatches
from examples.shared.problems.data import mnist_pixels
from examples.shared.timing import Training, train_for

METHODS = {"trust-region": hessopt.TrustRadius(), "levenberg-marquardt": hessopt.LevenbergMarquardt()}
loss = BernoulliLoss()


@torch.no_grad()
def errors(net: nn.Module, x: Tensor) -> dict[str, float]:
    """``loss`` and ``squared_error`` of an image, means over all images."""
    return means(net, x, x, lambda z, t: {"loss": loss(z, t), **squared_error(z, t)}, chunk=5000)


def train(
    net: nn.Module, x: Tensor, batch: int, seconds: float, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> Training:
    optimizer = make(net)

    def gradients(runs: int) -> float:
        if isinstance(optimizer, hessopt.NewtonCG) and optimizer.last_step is not None:
            return optimizer.last_step.gradient_equivalents * batch / len(x)
        return runs * batch / len(x)

    return train_for(
        seconds, optimizer, minibatches(x, x, batch, 0), lambda pair: loss(net(pair[0]), pair[1]),
        lambda: errors(net, x)["loss"], gradients,
    )  # fmt: skip


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
    try:
        pixels, _ = mnist_pixels(options.data, options.images)
    except FileNotFoundError as error:
        parser.error(str(error))
    x = pixels.flatten(1).to(options.device) / 255
    torch.manual_seed(0)
    widths = [784, *(max(2, round(options.scale * width)) for width in (1000, 500, 250)), 30]
    start = autoencoder(widths).to(options.device)
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
    shown = "-".join(str(m.out_features) for m in start if isinstance(m, nn.Linear))
    first = errors(start, x)["loss"]
    print(f"784-{shown}, {len(x)} images, {options.seconds:g} s each, {options.device}, {options.threads} threads")
    print(f"start: loss {first:.2f}\n")
    print(f"{'method':34}{'batch':>7}{'steps':>8}{'gradients':>11}{'loss':>9}{'squared error':>15}{'half way at':>13}")
    for name, batch, make in tqdm(methods, disable=None):
        net = copy.deepcopy(start)
        found = train(net, x, batch, options.seconds, make)
        end = errors(net, x)
        half = next(t for t, value in [(0.0, first), *found.curve] if value <= (first + end["loss"]) / 2)
        print(
            f"{name:34}{batch:7}{found.steps:8}{found.work:11.1f}{end['loss']:9.2f}{end['squared_error']:15.2f}"
            f"{half:11.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
