"""Multi-layer perceptrons, and deep autoencoders after Hinton and Salakhutdinov (2006)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(widths: list[int], activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Blocks ``[Linear, activation]`` and a linear head, with PyTorch's default initialisation."""
    blocks = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*blocks, nn.Linear(widths[-2], widths[-1]))


def autoencoder(widths: list[int]) -> nn.Sequential:
    """``widths`` and back again, tanh with a linear code and linear outputs (logits); PyTorch's initialisation."""
    layers: list[nn.Module] = []
    for a, b in pairwise([*widths, *widths[-2::-1]]):
        layers += [nn.Linear(a, b), nn.Tanh()]
    del layers[2 * len(widths) - 3]  # the code is linear
    return nn.Sequential(*layers[:-1])
