"""Which samples of a batch influence each other, by products with cotangents that spell out the samples' numbers.

Every two samples differ in a bit of their number. For each bit, there is a vector-Jacobian product with a random
cotangent on the samples where the bit is set, and one on those where it is not: ``2⌈log₂ B⌉`` batched products tell
which samples of the output reach what (but for cancellation by accident, of probability zero).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.autograd.tape import batched_vjp


def mixes_samples(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether entries of ``outputs`` at some samples depend on ``inputs`` at other samples.

    The product with the cotangent on some samples must vanish exactly on the others.

    Args:
        outputs: Tensors ``(B, …)`` with a tape.
        inputs: Tensors ``(B, …)`` on that tape.
    """
    if len(outputs[0]) == 1:
        return False
    masks, products = _bit_products(outputs, inputs)
    return any(bool((p.reshape(*masks.shape, -1).abs().sum(2) * ~masks).any()) for p in products if p is not None)


def sample_rows(output: Tensor, tensors: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor | None]:
    """For every tensor the number of the one sample of ``output`` that each of its rows reaches.

    A row that samples with a bit and samples without it both reach mixes samples; otherwise the products spell out its
    sample's number. So the network may be called on parts of the batch, in any order, or several times for a sample.

    Args:
        output: ``(B, …)``, with a tape.
        tensors: Tensors on that tape.
        dims: For each tensor the number of leading dimensions that number its rows: R is their product.

    Returns:
        For each tensor a vector ``(R,)`` of numbers in ``0..B-1``, or None if a row reaches several samples, or
        if there are no rows. Rows that reach nothing (behind units that are off, say) get the number that the
        layout of the others suggests: the same number as the row's, or that of blocks of equal length; else -1.
    """
    batch = output.shape[0]
    if batch == 1:
        pairs = zip(tensors, dims, strict=True)
        return [torch.zeros(math.prod(t.shape[:d]), dtype=torch.long, device=t.device) for t, d in pairs]
    masks, products = _bit_products([output], tensors)
    return [_numbers(p, len(masks) // 2, batch, t, d) for p, t, d in zip(products, tensors, dims, strict=True)]


def _bit_products(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Masks of samples ``(2⌈log₂ B⌉, B)``, where bits are set and then where they are not; products of each mask."""
    batch = len(outputs[0])
    index = torch.arange(batch)
    bits = torch.stack([(index >> k) & 1 for k in range((batch - 1).bit_length())]).bool()
    masks = torch.cat([bits, ~bits]).to(outputs[0].device)
    generator = torch.Generator().manual_seed(0)
    cotangents = []
    for output in outputs:
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)
        cotangents.append(masks.view(*masks.shape, *[1] * (output.ndim - 1)) * noise)
    return masks, batched_vjp(outputs, inputs, cotangents)


def _numbers(product: Tensor | None, bits: int, batch: int, tensor: Tensor, dims: int) -> Tensor | None:
    rows = math.prod(tensor.shape[:dims])
    if not dims or not rows:
        return None
    if product is None:
        return torch.full((rows,), -1, device=tensor.device)
    reached = (product != 0).reshape(2 * bits, rows, -1).any(dim=2)
    ones, zeros = reached[:bits], reached[bits:]
    if bool((ones & zeros).any()):
        return None
    powers = 2 ** torch.arange(bits, device=tensor.device)
    alive = (ones | zeros).all(dim=0)
    number = torch.where(alive, (ones * powers[:, None]).sum(dim=0), -1)
    if rows % batch == 0:
        layout = torch.arange(rows, device=tensor.device) // (rows // batch)
        if bool((number == layout)[alive].all()):
            number = layout
    return number
