"""The Gauss-Newton model of the objective around the current parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessopt.banded.systems import BandedSystem
from hessopt.factors.sample_factors import Factor
from hessopt.network.cliques import Cliques


@dataclass(frozen=True)
class QuadraticModel:
    """``m(d) = gᵀd + ½ ‖Ĵd‖² + ½ Σ ω d²``, the change of the objective ``f + ½ Σ ω θ²`` to second order.

    Every list has an item for each layer, which is a list with an item for each trained parameter of the layer.

    Attributes:
        parameters: θ.
        factors: Ĵ; ``ĴᵀĴ`` is the Gauss-Newton matrix of f.
        gradients: g, the gradient of the objective, ``ω θ`` included.
        lr: Factor on the step.
        weight_decay: ω.
        residuals: r, ``(N,)``, where ``g = Ĵᵀ r``; None if that is not known.
    """

    parameters: Sequence[Sequence[Tensor]]
    factors: Sequence[Factor]
    gradients: Sequence[Sequence[Tensor]]
    lr: Sequence[Sequence[float]]
    weight_decay: Sequence[Sequence[float]]
    residuals: Tensor | None = None

    def step(self, damping: float, cliques: Cliques, system: BandedSystem) -> list[list[Tensor]]:
        """The change of the parameters by the banded solve with diagonal ``damping + ω``, times ``-lr``."""
        diagonal = [[damping + decay for decay in decays] for decays in self.weight_decay]
        solution = system.solve(self.gradients, diagonal, cliques, self.residuals)
        return [[-lr * s for lr, s in zip(*pair, strict=True)] for pair in zip(self.lr, solution, strict=True)]

    def scaled(self, step: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """A displacement times the learning rates."""
        return [[lr * d for lr, d in zip(*pair, strict=True)] for pair in zip(self.lr, step, strict=True)]

    def at(self, step: Sequence[Sequence[Tensor]]) -> QuadraticModel:
        """The same model around ``θ + d``: with the gradient ``g + (ĴᵀĴ + ω) d``, and the residuals ``r + Ĵd``."""
        change = self._change(step)
        products = [factor.vjp(change) for factor in self.factors]
        parts = zip(self.gradients, products, self.weight_decay, step, strict=True)
        gradients = [[g + y + omega * d for g, y, omega, d in zip(*own, strict=True)] for own in parts]
        return replace(self, gradients=gradients, residuals=None if self.residuals is None else self.residuals + change)

    def slope(self, step: Sequence[Sequence[Tensor]]) -> float:
        """``gᵀd``."""
        return _total(
            (g * d).sum() for pair in zip(self.gradients, step, strict=True) for g, d in zip(*pair, strict=True)
        )

    def gradient_norm(self) -> float:
        """``‖g‖``."""
        return math.sqrt(_total(g.square().sum() for gradients in self.gradients for g in gradients))

    def trace(self) -> float:
        """``tr(ĴᵀĴ)``, an upper bound of the largest eigenvalue that costs next to nothing."""
        return float(torch.stack([factor.trace() for factor in self.factors]).sum())

    def predicted_reduction(self, step: Sequence[Sequence[Tensor]]) -> float:
        """``-m(d)`` of a step d, whatever the bandwidth that it was solved with."""
        change = self._change(step)
        decay = _total(
            omega * d.square().sum()
            for pair in zip(self.weight_decay, step, strict=True)
            for omega, d in zip(*pair, strict=True)
        )
        return -self.slope(step) - (float(change.square().sum()) + decay) / 2

    def _change(self, step: Sequence[Sequence[Tensor]]) -> Tensor:
        """``Ĵd``."""
        return torch.stack([factor.jvp(d) for factor, d in zip(self.factors, step, strict=True)]).sum(dim=0)

    def penalty_change(self, step: Sequence[Sequence[Tensor]]) -> float:
        """``½ Σ ω ((θ + d)² - θ²)``, without the cancellation. To be called while the parameters are θ."""
        return _total(
            omega * (d * (p.detach() + d / 2)).sum()
            for triple in zip(self.weight_decay, step, self.parameters, strict=True)
            for omega, d, p in zip(*triple, strict=True)
            if omega
        )


def _total(parts: Iterable[Tensor]) -> float:
    collected = list(parts)
    return float(torch.stack(collected).sum()) if collected else 0.0
