"""Digits by fully connected networks: scikit-learn's 8×8 images, and MNIST by deep ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from examples.shared.problems import data as datasets
from examples.shared.problems.common import accuracy, folder_of, seeded, supervised
from examples.shared.task import Problem, Task

TRAIN, TEST = 20_000, 5_000


def perceptron(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with activations in between; He's initialisation for ReLU, PyTorch's default for others."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        linear = nn.Linear(a, b)
        if activation is nn.ReLU:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    """``x + W₂ tanh(W₁ x + b₁) + b₂``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(torch.tanh(self.first(x)))
        return y


def residual(width: int, depth: int) -> nn.Sequential:
    """784 inputs, ``depth`` residual blocks, 10 outputs."""
    return nn.Sequential(
        nn.Linear(784, width), *(ResidualBlock(width) for _ in range(depth)), nn.Tanh(), nn.Linear(width, 10)
    )


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of 1437 and 360 images, ``(N, 64)`` in [0, 1], and their digits: x, y, x_test, y_test."""
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    inputs, test_inputs = (torch.tensor(part, dtype=torch.float32) for part in (x, x_test))
    return inputs, torch.tensor(y), test_inputs, torch.tensor(y_test)


def _task(
    make: Callable[[], nn.Module],
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    seed: int,
    device: torch.device,
    batch: int = 128,
) -> Task:
    with seeded(seed):
        model = make().to(device)
    x, y, x_test, y_test = (part.to(device) for part in found)
    mean = x.mean(dim=0)
    train, test = (x - mean, y), (x_test - mean, y_test)
    return supervised(model, nn.CrossEntropyLoss(), train, test, seed=seed, batch=batch, figures=accuracy)


def _digits(seed: int, device: torch.device, data: Path | None) -> Task:
    return _task(lambda: perceptron([64, 64, 64, 10], nn.Tanh), digits(), seed, device)


def _mnist(name: str, title: str, make: Callable[[], nn.Module], batch: int = 128) -> Problem:
    def build(seed: int, device: torch.device, data: Path | None) -> Task:
        return _task(make, datasets.mnist(folder_of(data, name), TRAIN, TEST), seed, device, batch)

    return Problem(name, "classification", title, "training cross entropy", build, seconds=10, needs_data=True)


DEEP = [784, 64, 64, 64, 64, 64, 10]
PROBLEMS = [
    Problem(
        "digits-tanh", "classification", "digits, tanh 64-64-64-10", "training cross entropy", _digits,
        seconds=2, size="small",
    ),
    _mnist("mnist-tanh", "MNIST, tanh 784-64×5-10, 20,000 images", lambda: perceptron(DEEP, nn.Tanh)),
    *(
        _mnist(
            f"mnist-tanh-{batch}", f"MNIST, tanh 784-64×5-10, batches of {batch}",
            lambda: perceptron(DEEP, nn.Tanh), batch,
        )
        for batch in (16, 512, 2048)
    ),
    _mnist("mnist-relu", "MNIST, ReLU 784-64×5-10, 20,000 images", lambda: perceptron(DEEP, nn.ReLU)),
    _mnist("mnist-residual", "MNIST, 8 residual tanh blocks of width 64, 20,000 images", lambda: residual(64, 8)),
]  # fmt: skip
