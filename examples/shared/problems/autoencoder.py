"""Deep tanh autoencoders with a linear code and the Bernoulli loss, after Hinton and Salakhutdinov (2006)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared.models import autoencoder
from examples.shared.problems import data as datasets
from examples.shared.problems.classification import digits
from examples.shared.problems.common import folder_of, seeded, supervised
from examples.shared.task import Problem, Task

OBJECTIVE = "training Bernoulli loss of an image"


class BernoulliLoss(nn.Module):
    """Cross entropy of the pixels, summed over an image, mean over images; pixels in [0, 1]."""

    def forward(self, logits: Tensor, pixels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)


def squared_error(logits: Tensor, pixels: Tensor) -> Mapping[str, Tensor]:
    """The squared reconstruction error of an image."""
    return {"squared_error": (torch.sigmoid(logits) - pixels).square().sum() / len(pixels)}


def glorot(model: nn.Sequential) -> nn.Sequential:
    """Glorot's initialisation: with PyTorch's bound, a third of the variance, signals die out over the depth."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def _task(
    widths: list[int], x: Tensor, x_test: Tensor, batch: int, measured: int, seed: int, device: torch.device
) -> Task:
    with seeded(seed):
        model = glorot(autoencoder(widths)).to(device)
    x, x_test = x.to(device), x_test.to(device)
    return supervised(
        model, BernoulliLoss(), (x, x), (x_test, x_test), seed=seed, batch=batch, figures=squared_error,
        measured=measured, kfac=False, declared=("bce_with_logits", "batchmean"),
    )  # fmt: skip


def _digits(seed: int, device: torch.device, data: Path | None) -> Task:
    x, _, x_test, _ = digits()
    return _task([64, 32, 16, 6], x, x_test, 256, 1437, seed, device)


def _mnist(seed: int, device: torch.device, data: Path | None) -> Task:
    x, _, x_test, _ = datasets.mnist(folder_of(data, "mnist-autoencoder"), 20_000, 1_000)
    return _task([784, 400, 200, 100, 25], x, x_test, 500, 2000, seed, device)


PROBLEMS = [
    Problem(
        "digits-autoencoder", "autoencoder", "digits, autoencoder 64-32-16-6-…-64", OBJECTIVE, _digits,
        seconds=3, size="small",
    ),
    Problem(
        "mnist-autoencoder", "autoencoder", "MNIST, autoencoder 784-400-200-100-25-…-784, 20,000 images", OBJECTIVE,
        _mnist, seconds=20, needs_data=True,
    ),
]  # fmt: skip
