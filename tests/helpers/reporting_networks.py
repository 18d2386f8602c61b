"""Networks that trigger the rules of verdicts, and one that triggers none."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics


def chain(widths: list[int], activation: type[nn.Module] = nn.Tanh, gain: float = 1.0, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in pairwise(widths[:-1])]
    model = nn.Sequential(*layers, nn.Linear(*widths[-2:])).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= gain
    return model


def labelled(inputs: int, classes: int, batch: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, inputs, dtype=torch.float64), torch.randint(classes, (batch,))


def small_report(**options: object) -> diagnostics.Report:
    model = chain([6, 7, 5, 3])
    return diagnostics.diagnose(model, labelled(6, 3), F.cross_entropy, **options)  # type: ignore[arg-type]


def bottleneck_verdict(name: str = "1") -> dict[str, object]:
    """A verdict as reports hold it."""
    text = f"bottleneck at {name}: D ≤ 2 with any node"
    head = {"rule": "bottleneck", "wording": "bottleneck", "level": "note"}
    return head | {"nodes": [name], "text": text, "figures": {"width": 2}, "significant": True}
