"""Which bandwidth the mini-batch engine uses: by predicted gain per cost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessopt.bandwidth_choice import Candidate, most_gain
from hessopt.kronecker_band import KroneckerBand
from hessopt.kronecker_factors import KroneckerFactors
from hessopt.kronecker_inverse import KroneckerInverse
from hessopt.kronecker_report import step_operations

_log = logging.getLogger(__name__)

CANDIDATES = (0, 1, 2)


@dataclass(frozen=True)
class KroneckerBandwidth:
    r"""Decides at every N-th step; until the first decision the bandwidth is 0.

    In the last ``window`` updates of factors before a decision, a probe averages the factors of all candidates' pairs,
    with equal weights. At the decision each candidate k gives its direction :math:`d_k = P_k^{-1} g` for the present
    gradient, from the probe's factors, and the reduction that the model M of the largest candidate predicts for the
    step :math:`s = \gamma\sigma d_k`, inside the trust region as in :class:`hessopt.kronecker_step.KroneckerStep`::

        gᵀ s − ½ sᵀ M s

    Its gain is that over the operations of a step (:func:`hessopt.kronecker_report.step_operations`), not seconds, so
    runs repeat bit for bit. The present bandwidth is left only for a gain that is larger by ``hysteresis``. With
    another bandwidth the engine goes on with the probe's averages. No off-diagonal factor is kept outside of the window
    while the bandwidth is 0.

    M is the engine's model, not the exact Gauss-Newton matrix, so a closure is not needed; and the parameters with a
    diagonal only, which no bandwidth couples, do not count.

    Args:
        every: N.
        candidates: Bandwidths, ascending.
        window: Updates of factors.
        hysteresis: Relative gain.
    """

    every: int = 200
    candidates: tuple[int, ...] = CANDIDATES
    window: int = 5
    hysteresis: float = 0.1

    def watch(self, band: KroneckerBand, gradients: Sequence[Tensor | None], lr: float, trust: float | None) -> None:
        """Before the solve of every step: decide or open the window, if it is time."""
        if band.factors is None or not band.factors.updates:
            return
        place = band.steps % self.every
        if band.steps and place == 0 and band.probe is not None and band.probe.updates:
            self._decide(band, band.probe, gradients, lr, trust)
            band.probe = None
        if place >= self.every - self.window * band.factor_every and band.probe is None:
            band.probe = band.blank_factors(*self.candidates)

    @torch.no_grad()
    def _decide(
        self,
        band: KroneckerBand,
        probe: KroneckerFactors,
        gradients: Sequence[Tensor | None],
        lr: float,
        trust: float | None,
    ) -> None:
        made: dict[int, tuple[KroneckerFactors, KroneckerInverse]] = {}
        for k in self.candidates:
            factors = band.blank_factors(k)
            factors.adopt(probe)
            inverse = KroneckerInverse(factors, band.iterations)
            inverse.refresh(band.absolute_damping)
            made[k] = factors, inverse
        model = made[self.candidates[-1]][0]
        found = [
            Candidate(
                k,
                _reduction(model, inverse, band.flat(gradients), lr, None if trust is None else trust * band.scale),
                step_operations(factors, band.rows, band.factor_every, band.inverse_every, band.iterations),
            )
            for k, (factors, inverse) in made.items()
        ]
        assert not isinstance(band.bandwidth, str)
        chosen = most_gain(found, band.bandwidth, self.hysteresis)
        evidence = ", ".join(f"{c.bandwidth}: {c.reduction:.3g} for {c.cost:.3g}" for c in found)
        _log.info("bandwidth %d at step %d; reduction for operations %s", chosen, band.steps, evidence)
        if chosen != band.bandwidth:
            band.take(chosen, *made[chosen])


def _reduction(
    model: KroneckerFactors, inverse: KroneckerInverse, gradient: Tensor, lr: float, bound: float | None
) -> float:
    step, decrement, _ = inverse.solve(gradient)
    curvature = step @ torch.cat([y.flatten() for y in model.product(model.matrices(step))])
    slope, bend = float(decrement), float(curvature)
    length = lr
    if bound is not None and lr**2 * slope > bound:
        length = (bound / slope) ** 0.5
    return length * slope - length**2 * bend / 2
