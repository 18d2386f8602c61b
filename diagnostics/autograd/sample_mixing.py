"""Do the samples of a batch influence each other?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.autograd.tape import batched_vjp


def mixes_samples(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether entries of ``outputs`` at some samples depend on ``inputs`` at other samples.

    Every two samples differ in a bit of their index. For each bit, a vector-Jacobian product with a random cotangent
    on the samples where the bit is set must vanish exactly on the others, and the other way round: 2⌈log₂ B⌉ batched
    products find every coupled pair (but for cancellation by accident, of probability zero).

    Args:
        outputs: Tensors ``(B, …)`` with a tape.
        inputs: Tensors ``(B, …)`` on that tape.
    """
    if len(outputs[0]) == 1:
        return False
    generator = torch.Generator().manual_seed(0)
    masks = _bit_masks(len(outputs[0])).to(outputs[0].device)
    cotangents = []
    for output in outputs:
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)
        cotangents.append(masks.view(*masks.shape, *[1] * (output.ndim - 1)) * noise)
    products = batched_vjp(outputs, inputs, cotangents)
    return any(bool((p.reshape(*masks.shape, -1).abs().sum(2) * ~masks).any()) for p in products if p is not None)


def _bit_masks(batch_size: int) -> Tensor:
    index = torch.arange(batch_size)
    bits = torch.stack([(index >> k) & 1 for k in range((batch_size - 1).bit_length())]).bool()
    return torch.cat([bits, ~bits])
