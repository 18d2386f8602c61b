"""What the positions of a layer see: patches of a convolution's input, and their Gram matrix without unfolding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

WORTH = 0.7
"""Share of the operations of unfolding below which the Gram matrix is computed without."""


def patches_of(module: nn.modules.conv._ConvNd, x: Tensor, one: bool) -> Tensor:
    """What each output position sees, ``(g, n, T, c·k)``; with ``one`` also the number one, the bias's input.

    In memory positions come last: they lie next to each other in the image as well, which makes the copy fast.
    """
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, padding, mode=mode)
    return _unfolded(x, module.groups, module.kernel_size, module.stride, module.dilation, one).permute(0, 2, 3, 1)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """What each output position of a layer sees, a row each.

    Args:
        module: A convolution without groups, not transposed; or a module that acts on the last dimension.
        x: Its input, ``(n, c, …)`` or ``(…, in)``.

    Returns:
        ``(positions of all samples, in)``; those of a convolution are :func:`patches_of`, in the order of its flattened
        weight, so that ``rows @ weight.flatten(1).mT`` is its output without the bias.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return patches_of(module, x, False)[0].flatten(0, 1)
    return x.flatten(0, -2)


def patch_gram(module: nn.modules.conv._ConvNd, x: Tensor, one: bool, worth: float = WORTH) -> Tensor | None:
    r"""``Σ p pᵀ`` over samples and output positions of the patches p of :func:`patches_of`, ``(g, a, a)``.

    If every position whose patch touches the image took part, an entry would depend on the difference of the two
    offsets in the patch alone, and be an autocorrelation of the image:

    .. math::
       \sum_q x_c(q)\, x_{c'}(q + \delta' - \delta),

    so that of the :math:`k^2` products of shifted images :math:`(2k - 1)/k`-th part in each dimension is needed, half
    of that by symmetry. Positions outside of the convolution's own, a margin of the image, are unfolded and subtracted.

    Returns:
        None where that is not worth it, or not possible: with strides, dilation, or another padding than zeros.

    Args:
        module: The convolution.
        x: Its input, ``(n, g·c, …)``.
        one: Append the number one to the patches.
        worth: Most operations, in those of unfolding.
    """
    kernel, spatial = module.kernel_size, x.shape[2:]
    padding = module._reversed_padding_repeated_twice
    if any(s != 1 for s in (*module.stride, *module.dilation)) or (any(padding) and module.padding_mode != "zeros"):
        return None
    both = [padding[2 * i : 2 * i + 2] for i in reversed(range(len(kernel)))]
    counts = [size + sum(pads) - k + 1 for size, pads, k in zip(spatial, both, kernel, strict=True)]
    # Positions are counted from the first one whose patch touches the image; own ones are [first, last).
    inner = [
        (max(k - 1 - low, 0), size + k - 1 - max(k - 1 - high, 0))
        for size, k, (low, high) in zip(spatial, kernel, both, strict=True)
    ]
    touching = prod(size + k - 1 for size, k in zip(spatial, kernel, strict=True))
    own = prod(last - first for first, last in inner)
    c, taps = x.shape[1] // module.groups, prod(kernel)
    shifts = (prod(2 * k - 1 for k in kernel) + 1) // 2
    if shifts * touching + taps**2 * (touching - own) > worth * taps**2 * prod(counts):
        return None
    gram = _of_all_positions(x, module.groups, kernel, one, shifts)
    margin = functional.pad(x, [k - 1 for k in reversed(kernel) for _ in range(2)])
    for region in _margin(inner, [size + k - 1 for size, k in zip(spatial, kernel, strict=True)]):
        box = [slice(start, end + k - 1) for (start, end), k in zip(region, kernel, strict=True)]
        part = margin[(slice(None), slice(None), *box)]
        ones = (1,) * len(kernel)
        seen = _unfolded(part, module.groups, kernel, ones, ones, one).flatten(2)
        gram.baddbmm_(seen, seen.mT, alpha=-1)
    if one:
        gram[:, c * taps, c * taps] = float(len(x) * prod(counts))  # those that see nothing but padding as well
    return gram


def _of_all_positions(x: Tensor, groups: int, kernel: Sequence[int], one: bool, shifts: int) -> Tensor:
    """The Gram matrix over all positions whose patch touches the image."""
    n, c, taps = len(x), x.shape[1] // groups, prod(kernel)
    # Zeros on one side are enough: in the flat image a shift then runs into them at every border.
    flat = functional.pad(x, [p for k in reversed(kernel) for p in (0, k - 1)])
    spatial = flat.shape[2:]
    flat = flat.unflatten(1, (groups, c)).permute(1, 2, 0, *range(3, flat.ndim + 1)).reshape(groups, c, -1)
    weights = [prod(spatial[i + 1 :]) for i in range(len(kernel))]
    ranges = [range(1 - k, k) for k in kernel]
    differences = list(product(*ranges))[-shifts:]  # the zero difference and what follows it
    length = flat.shape[2]
    products = []
    for difference in differences:
        offset = sum(d * w for d, w in zip(difference, weights, strict=True))
        products.append(flat[:, :, : length - offset] @ flat[:, :, offset:].mT)
    stacked = torch.stack(products, 1)
    stacked = torch.cat([stacked, stacked.mT], 1)
    place = {difference: i for i, difference in enumerate(differences)}
    offsets = list(product(*(range(k) for k in kernel)))
    index = [
        [
            place[d] if (d := tuple(b - a for a, b in zip(left, right, strict=True))) in place
            else shifts + place[tuple(-t for t in d)]
            for right in offsets
        ]
        for left in offsets
    ]  # fmt: skip
    gathered = stacked[:, torch.tensor(index, device=x.device)]  # (g, taps, taps, c, c)
    gram = x.new_zeros(groups, c * taps + one, c * taps + one)
    gram[:, : c * taps, : c * taps] = gathered.permute(0, 3, 1, 4, 2).reshape(groups, c * taps, c * taps)
    if one:
        sums = flat.sum(2).repeat_interleave(taps, 1)
        gram[:, -1, :-1], gram[:, :-1, -1] = sums, sums
        gram[:, -1, -1] = float(n * prod(s for s in spatial))
    return gram


def _margin(inner: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Boxes that make up all positions but the inner ones, without overlap."""
    boxes = []
    for i, (first, last) in enumerate(inner):
        for start, end in ((0, first), (last, sizes[i])):
            if start < end:
                boxes.append([*inner[:i], (start, end), *((0, size) for size in sizes[i + 1 :])])
    return boxes


def _unfolded(
    x: Tensor, groups: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], one: bool
) -> Tensor:
    """Patches of an image that is padded already, ``(g, c·k, n, T)``."""
    x = x.contiguous()
    spatial, strides = x.shape[2:], x.stride()
    counts = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)
    ]
    per_group = x.shape[1] // groups
    view = x.as_strided(
        (groups, per_group, *kernel, len(x), *counts),
        (
            per_group * strides[1],
            strides[1],
            *(step * d for step, d in zip(strides[2:], dilation, strict=True)),
            strides[0],
            *(step * s for step, s in zip(strides[2:], stride, strict=True)),
        ),
    )
    size = per_group * prod(kernel)
    patches = x.new_empty(groups, size + one, len(x), prod(counts))
    patches[:, :size].view(view.shape).copy_(view)
    if one:
        patches[:, size] = 1.0
    return patches
