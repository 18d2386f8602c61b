"""Multi-layer perceptrons."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(widths: list[int], activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Blocks ``[Linear, activation]`` and a linear head, with PyTorch's default initialisation."""
    blocks = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*blocks, nn.Linear(widths[-2], widths[-1]))
