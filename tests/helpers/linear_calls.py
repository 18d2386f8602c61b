"""What goes into the linear layers of a chain of modules, and comes out of them."""

from __future__ import annotations

from torch import Tensor, nn


def linear_calls(net: nn.Sequential, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs, detached, and outputs of its linear layers, and the output of all."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for module in net:
        inputs += [x.detach()] if isinstance(module, nn.Linear) else []
        x = module(x)
        outputs += [x] if isinstance(module, nn.Linear) else []
    return inputs, outputs, x
