"""Small residual networks for images, with GroupNorm and with BatchNorm: CIFAR-10, and digits of 8×8 pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared.problems import data as datasets
from examples.shared.problems.classification import digits
from examples.shared.problems.common import Pair, accuracy, folder_of, seeded, supervised
from examples.shared.task import Problem, Task

TRAIN, TEST = 10_000, 1_000
MEASURED = 500
SHIFT = 4
"""Pixels, the custom for CIFAR-10."""


def group_norm(channels: int) -> nn.Module:
    """Groups of four channels."""
    return nn.GroupNorm(channels // 4, channels)


class Block(nn.Module):
    """Two convolutions 3×3 and a skip connection, which is a convolution 1×1 where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


def residual_cnn(channels: int, widths: list[int], stem: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """A convolution of stride ``stem``, one block a width (all but the first halve the image), mean, linear."""
    model = nn.Sequential(
        nn.Conv2d(channels, widths[0], 3, stem, 1, bias=False), norm(widths[0]), nn.ReLU(),
        *(Block(a, b, 1 if i == 0 else 2, norm) for i, (a, b) in enumerate(pairwise([widths[0], *widths]))),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _cifar(name: str, norm: Callable[[int], nn.Module]) -> Callable[[int, torch.device, Path | None], Task]:
    def build(seed: int, device: torch.device, data: Path | None) -> Task:
        found = datasets.cifar10(folder_of(data, name), TRAIN, TEST)
        x, y, x_test, y_test = (part.to(device) for part in found)
        with seeded(seed):
            model = residual_cnn(3, [16, 32, 64, 96], 2, norm).to(device)
        return supervised(
            model, nn.CrossEntropyLoss(), (x, y), (x_test, y_test), seed=seed, batch=128, figures=accuracy,
            measured=MEASURED,
        )  # fmt: skip

    return build


def cropped_and_flipped(batches: Iterator[Pair], seed: int) -> Iterator[Pair]:
    """Images ``(B, C, H, W)`` shifted by up to :data:`SHIFT` pixels, zero outside, and every other one mirrored."""
    generator = torch.Generator().manual_seed(seed)
    for x, y in batches:
        size, (height, width) = len(x), x.shape[2:]
        shifts = torch.randint(2 * SHIFT + 1, (2, size, 1), generator=generator)
        rows, columns = (shift + torch.arange(n) for shift, n in zip(shifts, (height, width), strict=True))
        mirrored = torch.rand(size, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(x, (SHIFT, SHIFT, SHIFT, SHIFT)).permute(0, 2, 3, 1)
        images = torch.arange(size)[:, None, None].to(x.device)
        cropped = padded[images, rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)]
        yield cropped.permute(0, 3, 1, 2).contiguous(), y


def _cifar_augmented(seed: int, device: torch.device, data: Path | None) -> Task:
    found = datasets.cifar10(folder_of(data, "cifar10-augmented"), 50_000, 10_000)
    x, y, x_test, y_test = (part.to(device) for part in found)
    with seeded(seed):
        model = residual_cnn(3, [16, 32, 64, 96], 2, nn.BatchNorm2d).to(device)
    task = supervised(
        model, nn.CrossEntropyLoss(), (x, y), (x_test, y_test), seed=seed, batch=128, figures=accuracy, measured=2000
    )
    return replace(task, batches=cropped_and_flipped(task.batches, seed))


def _digits(seed: int, device: torch.device, data: Path | None) -> Task:
    x, y, x_test, y_test = (part.to(device) for part in digits())
    with seeded(seed):
        model = residual_cnn(1, [8, 16], 1, nn.BatchNorm2d).to(device)
    train, test = ((part.unflatten(1, (1, 8, 8)) - 0.5, of) for part, of in ((x, y), (x_test, y_test)))
    return supervised(
        model, nn.CrossEntropyLoss(), train, test, seed=seed, batch=64, figures=accuracy, measured=MEASURED
    )


PROBLEMS = [
    Problem(
        "digits-cnn", "images", "digits, residual CNN with BatchNorm", "training cross entropy", _digits,
        seconds=3, size="small",
    ),
    *(
        Problem(
            name, "images", f"CIFAR-10, residual CNN with {title}, 10,000 images", "training cross entropy",
            _cifar(name, norm), seconds=20, needs_data=True,
        )
        for name, title, norm in (
            ("cifar10-groupnorm", "GroupNorm", group_norm),
            ("cifar10-batchnorm", "BatchNorm", nn.BatchNorm2d),
        )
    ),
    Problem(
        "cifar10-augmented", "images", "CIFAR-10, residual CNN with BatchNorm, all images, cropped and flipped",
        "training cross entropy", _cifar_augmented, seconds=20, needs_data=True,
    ),
]  # fmt: skip
