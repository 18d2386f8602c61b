"""Blocks of the parametric Hessian of a convolution and another layer, a few output channels at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import TypeIs

from diagnostics.parametric.dense_pairs import Target, Workspace
from diagnostics.parametric.maps import ParameterMap
from diagnostics.parametric.patch_map import PatchMap


def is_patched(layer: ParameterMap) -> TypeIs[PatchMap]:
    """Whether this is the map of a linear or convolutional layer whose weight is trained."""
    return isinstance(layer, PatchMap) and layer.weight is not None


def add_patch_pair(
    left: PatchMap, right: PatchMap, block: Tensor, moved: Tensor | None, factor: float, target: Target, work: Workspace
) -> None:
    """Add ``factor · Σ_{b,l,l'} (X_lj H[li,l'k] + δ_li U[lj,l'k]) X'_l'm`` for weights ``[i,j]`` and ``[k,m]``.

    X and X' are the patches of the two layers, U the patches of J[x←w], the Jacobian of the first layer's input. The
    sums over positions of one layer come first, and those over samples and positions of the other are one matrix
    product for each group of channels i: in the order that takes fewer multiplications.

    Args:
        left: Layer u with input patches X and signal δ.
        right: Layer w, not after u, with input patches X'.
        block: H[u,w], ``(S, d_u, d_w)``.
        moved: J[x←w], ``(S, d_x, d_w)``; None if zero.
        factor: 1, or 1/2 for a pair that is its own mirror image.
        target: Where to add.
        work: Scratch memory.
    """
    moved = None if left.signal is None else moved
    add = _left_first if _left_products(left, right) <= _right_products(left, right) else _right_first
    add(left, right, block, moved, factor, target, work)


def _left_products(left: PatchMap, right: PatchMap) -> int:
    """Multiplications a sample of :func:`_left_first`."""
    first, second = left.patches.shape[1], right.patches.shape[1]
    return left.size * second * (2 * first * right.channels + right.size)


def _right_products(left: PatchMap, right: PatchMap) -> int:
    """Multiplications a sample of :func:`_right_first`."""
    first, second = left.patches.shape[1], right.patches.shape[1]
    return right.size * (first * (left.channels + left.patches.shape[2]) * second + 2 * left.size * first)


def _left_first(
    left: PatchMap, right: PatchMap, block: Tensor, moved: Tensor | None, factor: float, target: Target, work: Workspace
) -> None:
    samples, positions, inputs = left.patches.shape
    columns, entries = right.channels, block.shape[2]
    curvature = _by_position(left, _columns_last(right, block).flatten(2))  # (S, l, i, k l')
    received = rearrange(right.patches, "s l m -> (s l) m") * factor
    bends = None
    if moved is not None:  # (S, l, j k l')
        bends = left.unfold(_columns_last(right, moved).flatten(2)).reshape(samples, positions, -1)
    weights = inputs - (left.bias is not None)
    for channels in _groups(left.channels, samples * inputs * entries):
        count = channels.stop - channels.start
        pushed = work.take("pushed", block, samples, inputs, count * entries)
        torch.bmm(left.patches.mT, curvature[:, :, channels].reshape(samples, positions, -1), out=pushed)
        rows = work.take("rows", block, count, inputs, columns, samples, entries // columns)
        rows.copy_(rearrange(pushed, "s j (i k l) -> i j k s l", i=count, k=columns))
        if bends is not None:  # the constant input does not move
            assert left.signal is not None
            bent = work.take("bent", block, samples, count, weights * entries)
            torch.bmm(left.signal[:, :, channels].mT, bends, out=bent)
            rows[:, :weights] += rearrange(bent, "s i (j k l) -> i j k s l", j=weights, k=columns)
        product = work.take("product", block, count * inputs * columns, right.patches.shape[2])
        torch.mm(rows.view(len(product), -1), received, out=product)
        _put(left, right, product.view(count, inputs, columns, -1), channels, target)


def _right_first(
    left: PatchMap, right: PatchMap, block: Tensor, moved: Tensor | None, factor: float, target: Target, work: Workspace
) -> None:
    patches = rearrange(left.patches, "s l j -> j (s l)")
    received = right.patches * factor
    curvature = _by_position(left, _contract(right, block, received))  # (S, l, i, k m)
    curvature = rearrange(curvature, "s l i w -> i (s l) w").contiguous()
    weights = left.patches.shape[2] - (left.bias is not None)
    bends, signal = None, None
    if moved is not None:
        assert left.signal is not None
        bends = rearrange(left.unfold(_contract(right, moved, received)), "s l j w -> (s l) (j w)")
        signal = rearrange(left.signal, "s l i -> i (s l)")
    for channels in _groups(left.channels, left.patches.shape[2] * right.size):
        count = channels.stop - channels.start
        product = work.take("product", block, count, len(patches), right.size)
        torch.bmm(patches.expand(count, -1, -1), curvature[channels], out=product)
        if bends is not None and signal is not None:
            bent = work.take("bent", block, count, weights * right.size)
            torch.mm(signal[channels], bends, out=bent)
            product[:, :weights] += bent.view(count, weights, -1)
        _put(left, right, product.view(count, len(patches), right.channels, -1), channels, target)


def _groups(channels: int, entries: int) -> Iterator[slice]:
    """Groups of channels whose intermediate results, with so many ``entries`` a channel, fit into a cache."""
    step = max(1, _CACHED // entries)
    return (slice(start, min(start + step, channels)) for start in range(0, channels, step))


def _contract(right: PatchMap, block: Tensor, received: Tensor) -> Tensor:
    """``M D[w,θ']`` for M ``(S, r, d_w)``: ``(S, r, P_w)``."""
    by_channel = rearrange(_columns_last(right, block), "s r k l -> s (r k) l")
    return rearrange(by_channel @ received, "s (r k) m -> s r (k m)", k=right.channels)


def _columns_last(right: PatchMap, block: Tensor) -> Tensor:
    """Columns of ``(S, r, d_w)`` by channel and position, ``(S, r, k, l')``."""
    axes = right.entries.replace("i", "k")
    return rearrange(block, f"s r {axes} -> s r k (b l)", b=right.joint, k=right.channels)


def _by_position(left: PatchMap, block: Tensor) -> Tensor:
    """Rows of ``(S, d_u, r)`` by position and channel, ``(S, l, i, r)``."""
    return rearrange(block, f"s {left.entries} r -> s (b l) i r", b=left.joint, i=left.channels)


def _put(left: PatchMap, right: PatchMap, product: Tensor, channels: slice, target: Target) -> None:
    """Add ``(i, j, k, m)``, biases as last inputs, to the blocks of the parameters."""
    weights = product.shape[1] - (left.bias is not None), product.shape[3] - (right.bias is not None)
    assert left.weight is not None
    assert right.weight is not None
    first = slice(channels.start * weights[0], channels.stop * weights[0])
    parts = [(left.weight, first, product[:, : weights[0]].flatten(0, 1))]
    if left.bias is not None:
        parts.append((left.bias, channels, product[:, weights[0]]))
    for name, rows, part in parts:
        target(name, right.weight, part[:, :, : weights[1]], rows)
        if right.bias is not None:
            target(name, right.bias, part[:, :, weights[1]], rows)


_CACHED = 2**22  # entries of an intermediate result
