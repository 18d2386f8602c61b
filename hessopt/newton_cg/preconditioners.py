"""Preconditioners of conjugate gradients: symmetric positive definite M, known by ``M⁻¹ v``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_PROBES = 8
"""Probes of the first step, whose average the later ones refine."""


class RunningDiagonal:
    """Diagonal of a matrix by Hutchinson's estimator ``E[v ∘ Bv]``, v of random signs, averaged over steps.

    ``s ← b s + (1 − b) (v ∘ Bv)``; the preconditioner is ``M = (‖s‖ₑ + ε mean ‖s‖ₑ)^ξ``, with absolute values by
    entries, scaled to the geometric mean 1, so that a radius in its norm is of the size of one in the parameters. The
    exponent ξ = 3/4 takes back some of the estimator's noise (Martens 2010, section 4.7).

    Args:
        estimate: s of earlier steps, ``(P,)``, or None.
        decay: b.
        damping: ε.
        exponent: ξ.

    Source:
        Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007; Martens 2010.
    """

    def __init__(
        self, estimate: Tensor | None = None, *, decay: float = 0.9, damping: float = 1e-2, exponent: float = 0.75
    ) -> None:
        self.estimate = estimate
        self.decay = decay
        self.damping = damping
        self.exponent = exponent
        self._scale: Tensor | None = None

    def update(self, product: Callable[[Tensor], Tensor], like: Tensor, generator: torch.Generator) -> None:
        """Take one more probe (the first time :data:`FIRST_PROBES`).

        Args:
            product: ``v ↦ Bv``.
            like: A vector of the size, dtype and device of v.
            generator: Source of the probes, on the CPU.
        """
        count = FIRST_PROBES if self.estimate is None else 1
        samples = []
        for _ in range(count):
            signs = torch.randint(0, 2, (like.numel(),), generator=generator, dtype=torch.int8)
            v = (2 * signs - 1).to(like)
            samples.append(v * product(v))
        new = torch.stack(samples).mean(0)
        self.estimate = new if self.estimate is None else self.estimate.lerp(new, 1 - self.decay)
        self._scale = None

    def solve(self, v: Tensor) -> Tensor:
        """``M⁻¹ v``."""
        return v / self.scale

    def metric(self, v: Tensor) -> Tensor:
        """``M v``."""
        return v * self.scale

    @property
    def scale(self) -> Tensor:
        """The diagonal of M."""
        if self._scale is None:
            if self.estimate is None:
                raise RuntimeError("call update() before using the preconditioner.")
            size = self.estimate.abs()
            mean = size.mean()
            size = torch.where(mean > 0, size / mean + self.damping, torch.ones_like(size)) ** self.exponent
            self._scale = size / size.log().mean().exp()
        return self._scale
