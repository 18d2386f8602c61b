"""Blocks of the parametric Hessian between linear layers on ``(B, d)``, written straight into the result."""

from __future__ import annotations

from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import TypeIs

from diagnostics.parametric.maps import ParameterMap
from diagnostics.parametric.patch_map import PatchMap


class Target(Protocol):
    """Where blocks are added."""

    def __call__(self, v: str, w: str, value: Tensor, rows: slice | None = None, /) -> None:
        """Add ``value``, ``(P_v, P_w)`` or ``(P_v, C, m)``, to (some rows of) the block of two parameters."""


class Workspace:
    """Memory for intermediate results: fresh memory for each costs more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape; the one taken before under this name is void."""
        size = torch.Size(shape).numel()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = like.new_empty(size)
        return self._buffers[name][:size].view(shape)


def is_dense(layer: ParameterMap) -> TypeIs[PatchMap]:
    """Whether this is the map of a linear layer with one position a sample and a trained weight."""
    return isinstance(layer, PatchMap) and layer.patches.shape[1] == 1 and layer.weight is not None


def add_dense_pair(
    left: PatchMap, right: PatchMap, block: Tensor, moved: Tensor | None, factor: float, target: Target, work: Workspace
) -> None:
    """Add ``factor · Σ_b (x_j H[i,k] + δ_i J[x_j←k]) x'_m`` for weights ``[i,j]`` and ``[k,m]``, likewise for biases.

    Args:
        left: Layer u with input x and signal δ.
        right: Layer w, not after u, with input x'.
        block: H[u,w], ``(S, d_u, d_w)``.
        moved: J[x←w], ``(S, m, d_w)``; None if zero.
        factor: 1, or 1/2 for a pair that is its own mirror image.
        target: Where to add.
        work: Scratch memory.
    """
    inputs = (left.patches.shape[2] - (left.bias is not None), right.patches.shape[2] - (right.bias is not None))
    x, received = left.patches[:, 0, : inputs[0]], right.patches[:, 0, : inputs[1]] * factor
    curvature = rearrange(block, "s i k -> i k s").contiguous()
    outputs, columns, samples = curvature.shape
    rows = work.take("rows", curvature, outputs, inputs[0], columns, samples)
    torch.mul(rearrange(x, "s j -> j 1 s").contiguous(), curvature.unsqueeze(1), out=rows)
    if moved is not None and left.signal is not None:
        signal = rearrange(left.signal[:, 0], "s i -> i 1 1 s").contiguous()
        rows.addcmul_(signal, rearrange(moved, "s j k -> j k s").contiguous())
    assert left.weight is not None
    assert right.weight is not None
    for name, part in ((left.weight, rows.flatten(0, 1)), (left.bias, curvature)):
        if name is None:
            continue
        product = work.take("product", part, part.shape[0] * columns, inputs[1])
        torch.mm(part.flatten(0, 1), received, out=product)
        target(name, right.weight, product.view(-1, columns, inputs[1]))
        if right.bias is not None:
            target(name, right.bias, part.sum(2).mul_(factor))
