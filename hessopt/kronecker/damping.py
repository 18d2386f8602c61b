"""What is added to the diagonals of Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessopt.averages.averages import Stack


@dataclass(frozen=True)
class Damping:
    """The factored damping: ``A_v' = A_v + π √λ I`` and ``G_v' = G_v + (√λ / π) I`` of a layer v.

    ``π² = (tr A_v / a) / (tr G_v / o)``, so that the matrix of all layers is at least λI.

    With ``per_layer`` each layer has its own damping, λ times the mean of its diagonal: ``A_v' = A_v + √λ ā_v I`` and
    ``G_v' = G_v + √λ ḡ_v I`` with ``ā_v = tr A_v / a``, ``ḡ_v = tr G_v / o``. Then a layer whose inputs or gradients
    are rescaled takes the rescaled step. Where the loss is nearly zero, so is its curvature, but not the rounding error
    of its gradient: the two additions multiply to ``floor`` at least.

    Attributes:
        value: λ, in the curvature's own units; with ``per_layer`` a plain number.
        per_layer: In what units λ is.
        floor: See above; in the curvature's own units.

    Source:
        Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015), section
        6.3, for π; docs/banded.md.
    """

    value: float
    per_layer: bool = False
    floor: float = 0.0

    def of_factors(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """What is added to the diagonals of A and G, ``(m,)`` each, at least what rounding needs."""
        _, o, a = stack.shape
        trace_a, trace_g = (
            (f if diagonal else f.diagonal(dim1=1, dim2=2)).sum(1)
            for f, diagonal in zip(stack.factors, (stack.diagonal[1], stack.diagonal[0]), strict=True)
        )
        least = 10 * torch.finfo(trace_a.dtype).eps
        if self.per_layer:
            extra = [torch.where(t > 0, t / n, 1.0) * self.value**0.5 for t, n in ((trace_a, a), (trace_g, o))]
            inputs = extra[0].clamp_min(least * trace_a)
            return inputs, torch.maximum(extra[1].clamp_min(least * trace_g), self.floor / inputs)
        tiny = torch.finfo(trace_a.dtype).tiny
        pi = ((trace_a / a).clamp_min(tiny) / (trace_g / o).clamp_min(tiny)).sqrt()
        # No curvature at all on one side: π says nothing.
        pi = torch.where((trace_a > 0) & (trace_g > 0), pi, torch.ones_like(pi))
        return (pi * self.value**0.5).clamp_min(least * trace_a), (self.value**0.5 / pi).clamp_min(least * trace_g)

    def of_diagonal(self, diagonal: Tensor) -> Tensor | float:
        """What is added to the diagonal of a parameter without factors."""
        if not self.per_layer:
            return self.value
        return (self.value * diagonal.mean()).clamp_min(max(self.floor, torch.finfo(diagonal.dtype).tiny))
