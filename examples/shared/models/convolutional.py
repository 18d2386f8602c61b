"""A small convolutional network for handwritten digits."""

from __future__ import annotations

from torch import nn


def mnist_cnn() -> nn.Sequential:
    """Images ``(B, 784)``, two convolutions 3×3 with ReLU and pooling, one hidden layer, 10 outputs."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
