"""Sequences of tasks for ``continual.py``: permuted digits, permuted MNIST, split CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.shared.problems.data import cifar10
from examples.shared.problems.data import mnist as mnist_images


@dataclass(frozen=True)
class Task:
    """One task: its data, and the classes whose outputs count."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: Tensor

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.masked(z), y)

    def masked(self, z: Tensor) -> Tensor:
        if len(self.classes) == z.shape[1]:
            return z
        return z.index_fill(1, torch.tensor([i for i in range(z.shape[1]) if i not in self.classes]), -1e9)

    def accuracy(self, net: nn.Module) -> float:
        with torch.no_grad():
            pieces = zip(self.x_test.split(1000), self.y_test.split(1000), strict=True)
            correct = sum(int((self.masked(net(x)).argmax(1) == y).sum()) for x, y in pieces)
        return correct / len(self.y_test)


@dataclass(frozen=True)
class Benchmark:
    """Tasks of a seed, a network, and how it is trained."""

    name: str
    tasks: Callable[[int], list[Task]]
    network: Callable[[], nn.Module]
    hidden: tuple[str, ...]  # parameters that partial freeze holds
    count: int  # of tasks
    images: int  # to train on, a task
    lr: float
    batch: int
    epochs: int
    remembered: int  # vectors a task of subspace memories
    samples: int  # of a task for a basis
    thresholds: tuple[float, ...]

    @property
    def protocol(self) -> str:
        return (
            f"{self.name}, {self.count} tasks of {self.images} images, {self.epochs} epochs, batch {self.batch}, "
            f"SGD {self.lr:g}, {self.remembered} directions a task from {self.samples} images"
        )


def digits(tasks: int) -> Benchmark:
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x, test = x.float() / 16, torch.arange(len(x)) % 5 == 4
    parts = x[~test], y[~test], x[test], y[test]
    return Benchmark(
        "permuted digits", lambda seed: permuted(*parts, tasks, seed), lambda: mlp(64), ("0.weight", "2.weight"),
        count=tasks, images=int((~test).sum()), lr=0.05, batch=32, epochs=10, remembered=60, samples=200,
        thresholds=(0.95, 0.99, 0.99),
    )  # fmt: skip


def mnist(folder: Path, tasks: int, images: int, epochs: int) -> Benchmark:
    x, y, x_test, y_test = mnist_images(folder, images, 10000)
    parts = (x - 0.1307) / 0.3081, y, (x_test - 0.1307) / 0.3081, y_test
    return Benchmark(
        "permuted MNIST", lambda seed: permuted(*parts, tasks, seed), lambda: mlp(784), ("0.weight", "2.weight"),
        count=tasks, images=images, lr=0.01, batch=10, epochs=epochs, remembered=30, samples=300,
        thresholds=(0.95, 0.99, 0.99),
    )  # fmt: skip


def cifar(folder: Path, images: int, epochs: int) -> Benchmark:
    x, y, x_test, y_test = cifar10(folder, min(50000, 6 * images), 10000)

    def tasks(seed: int) -> list[Task]:
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        found = []
        for classes in order.split(2):
            train, test = torch.isin(y, classes).nonzero()[:images, 0], torch.isin(y_test, classes)
            found.append(Task(x[train], y[train], x_test[test], y_test[test], classes))
        return found

    return Benchmark(
        "split CIFAR-10", tasks, convolutional, ("0.weight", "2.weight", "5.weight"),
        count=5, images=images, lr=0.05, batch=32, epochs=epochs, remembered=60, samples=100, thresholds=(0.95,),
    )  # fmt: skip


def permuted(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, count: int, seed: int) -> list[Task]:
    """The first task is the data as they are."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(x.shape[1]), *(torch.randperm(x.shape[1], generator=generator) for _ in range(count - 1))]
    return [Task(x[:, order], y, x_test[:, order], y_test, torch.arange(10)) for order in orders]


def mlp(inputs: int) -> nn.Module:
    layers = [nn.Linear(a, b, bias=False) for a, b in ((inputs, 100), (100, 100), (100, 10))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(576, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
