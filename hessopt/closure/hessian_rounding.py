"""How far rounding can move the eigenvalues of a loss's second derivative that automatic differentiation formed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diagnostics.autograd.tape import Function

AMPLITUDE = 1 / 16
"""Of the noise, in units of what flows: small, as it compounds, and far above the rounding of the passes themselves."""


def formation_rounding(loss: Tensor | GradientEdge, output: Tensor, hessians: Tensor) -> Tensor:
    """Estimate, sample by sample, of the rounding error of ``K_b = ∂²ℓ / ∂z_b ∂z_b``, as a Frobenius norm.

    Where a softmax is certain, ``K`` is a small difference of large numbers, which neither ``K`` nor its eigenvalues
    show: with a temperature s inside of the loss, the terms are of order s². So the second backward pass, which is
    linear in what flows, is made again with noise on the inflow of each of its operations: of the size of the largest
    entry of the sample, as operations that mix entries (softmax, sums) round relative to it. How much this changes
    ``K`` is what one rounding unit at every operation would change, times the noise in rounding units.

    Args:
        loss: ℓ, or its place, on the tape of ``output``, which is retained.
        output: z, ``(B, …)``.
        hessians: K, ``(B, K, K)``, of :func:`hessopt.closure.output_curvature.output_hessians`.

    Returns:
        ``(B,)``, in the dtype of ``hessians``.
    """
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    if not gradient.requires_grad or not hessians.numel():
        return hessians.new_zeros(len(hessians))
    seeds = unit_rows(output).reshape(-1, *output.shape)
    handles = [node.register_prehook(_Noise(i, len(output))) for i, node in enumerate(_between(gradient, output))]
    try:
        (rows,) = torch.autograd.grad(
            gradient, output, seeds, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
    finally:
        for handle in handles:
            handle.remove()
    change = rows.reshape(len(seeds), len(output), -1).transpose(0, 1) - hessians
    eps = torch.finfo(output.dtype).eps
    estimate: Tensor = change.flatten(1).norm(dim=1) * (eps / AMPLITUDE)
    return estimate


class _Noise:
    """Hook that adds to every entry the largest one of its sample, times the amplitude and a number near ±1.

    Args:
        number: Of the operation, so that each has numbers of its own.
        batch: B; where the first dimension is another one, the largest entry of all is taken.
    """

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch = number, batch

    def __call__(self, slopes: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if slope is None else slope + self._of(slope) for slope in slopes)

    def _of(self, slope: Tensor) -> Tensor:
        count = slope.numel()
        if not count:
            return slope
        own = slope.ndim > 0 and len(slope) == self.batch
        size = slope.abs().reshape(self.batch if own else 1, -1).amax(1).view(-1, *[1] * (slope.ndim - own))
        # No generator: PyTorch refuses random numbers inside of a batched pass.
        number = torch.arange(1, count + 1, dtype=torch.float64, device=slope.device)
        signs = torch.cos((number * 12.9898 + self.number) % 6.283185307179586).to(slope.dtype).view(slope.shape)
        return size.reshape(size.shape if own else [1] * slope.ndim) * signs * (2**0.5 * AMPLITUDE)


def unit_rows(output: Tensor) -> Tensor:
    """``(K, B, K)`` for z ``(B, …)`` with K entries a sample: row k of every sample is the k-th unit vector."""
    width = output[0].numel()
    unit = torch.eye(width, dtype=output.dtype, device=output.device)
    return unit.unsqueeze(1).expand(width, len(output), width)


def _between(gradient: Tensor, output: Tensor) -> list[Function]:
    """The operations on the tape from ``gradient`` back to ``output``, which is not walked past."""
    found: dict[Function, None] = {}
    stack = [gradient.grad_fn]
    while stack:
        node = stack.pop()
        # An AccumulateGrad is the end of the tape: a leaf.
        if node is None or node in found or node is output.grad_fn or hasattr(node, "variable"):
            continue
        found[node] = None
        stack += [parent for parent, _ in node.next_functions]
    return list(found)
