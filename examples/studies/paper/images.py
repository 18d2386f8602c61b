"""CIFAR-10 and CIFAR-100 with the paper's normalisation, the toy regression, and generated images that need no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from examples.shared.problems.data import cifar10_pixels, cifar100_pixels

FIRST_TEST_LABELS = "3880661631095798578670495240966545924195465609397698038877467363"
"""Of CIFAR-10."""

CHANNELS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Mean and deviation of CIFAR-10's training images by channel."""


@dataclass(frozen=True)
class Data:
    """Inputs and targets of both splits, in the official order, and where they come from."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    origin: str


def cifar10(folder: Path) -> Data:
    """All of CIFAR-10, scaled to [-1, 1]."""
    x, y, x_test, y_test = cifar10_pixels(folder)
    return Data(scaled(x), y, scaled(x_test), y_test, f"CIFAR-10, {len(x)} training images")


def standardised_cifar10(folder: Path) -> Data:
    """All of CIFAR-10, each channel less its mean and divided by its deviation, as published: Experiment 6."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in CHANNELS)
    x, y, x_test, y_test = cifar10_pixels(folder)
    x, x_test = (((scaled(part) + 1) / 2 - mean) / deviation for part in (x, x_test))
    return Data(x, y, x_test, y_test, f"CIFAR-10, {len(x)} training images, standardised")


def cifar100(folder: Path) -> Data:
    """CIFAR-100 or the subset of it that the folder has, scaled to [-1, 1]."""
    (x, y, x_test, y_test), origin = cifar100_pixels(folder)
    return Data(scaled(x), y, scaled(x_test), y_test, origin)


def scaled(pixels: Tensor) -> Tensor:
    """Bytes ``(N, 32, 32, 3)`` as numbers in [-1, 1], channels first."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def generated(train: int = 2000, test: int = 500, classes: int = 10) -> Data:
    """Smooth random images: enough for what is measured at initialisation.

    There the tensor part is proportional to the mean error signal, so to how uneven the labels of the measured batch
    are. With ten classes, the test labels begin with those of CIFAR-10.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(train + test, 3, 4, 4, generator=generator)
    smooth = interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=True)
    x = (0.5 * smooth / smooth.std()).clamp(-1, 1)
    y = torch.randint(classes, (train + test,), generator=generator)
    if classes == 10:
        known = [int(digit) for digit in FIRST_TEST_LABELS[:test]]
        y[train : train + len(known)] = torch.tensor(known)
    return Data(x[:train], y[:train], x[train:], y[train:], "generated images")


def toy_regression(seed: int) -> Data:
    """Sequences of 8 vectors of width 16; a fixed teacher ``mean_t tanh(x_t W) · w`` with noise 0.1, standardised."""
    generator, teacher = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    x, x_test = (torch.randn(n, 8, 16, generator=generator) for n in (2048, 512))
    inner, outer = torch.randn(16, 16, generator=teacher) / 4, torch.randn(16, 1, generator=teacher) / 4
    y, y_test = (
        (z @ inner).tanh().mean(dim=1) @ outer + 0.1 * torch.randn(len(z), 1, generator=generator) for z in (x, x_test)
    )
    mean, deviation = y.mean(), y.std()
    return Data(x, (y - mean) / deviation, x_test, (y_test - mean) / deviation, "generated sequences")
