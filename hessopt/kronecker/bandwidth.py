"""Which bandwidth running averages have: by predicted gain per cost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessopt.averages.accounting import kronecker_operations
from hessopt.averages.averages import KroneckerAverages
from hessopt.averages.running import Probe
from hessopt.checks import check_count
from hessopt.kronecker.band import KroneckerBand
from hessopt.kronecker.inverse import KroneckerInverse
from hessopt.network.cliques import check_bandwidth
from hessopt.search.gain import Candidate, most_gain

_log = logging.getLogger(__name__)

CANDIDATES = (0, 1, 2)


@dataclass(frozen=True)
class KroneckerBandwidth:
    r"""Decides at the steps N, 4N, 16N, …; until the first decision the bandwidth is 0.

    In the last ``window`` updates of factors before a decision, a probe averages the factors of all candidates' pairs,
    with equal weights. At the decision each candidate k gives its direction :math:`d_k = P_k^{-1} g` for the present
    gradient, from the probe's factors, and the most that the quadratic model allows along it::

        (gᵀ d)² / (2 dᵀ (J + Λ) d)

    where Λ has the layers' dampings and J is the Gauss-Newton matrix by the columns of the window's last batch, without
    a Kronecker product and without a band (:func:`hessopt.averages.accounting.sample_curvature`). How far to go along
    d, which the trust region decides by each P's own measure, does not enter. The gain is that over a step's operations
    (:func:`hessopt.averages.accounting.kronecker_operations`), not seconds, so runs repeat bit for bit. The present
    bandwidth is left only for a gain that is larger by ``hysteresis``; with another the engine goes on with the
    probe's averages. No off-diagonal factor is kept outside of the window while the bandwidth is 0.

    A closure is not needed. Parameters with a diagonal only, which no bandwidth couples, do not count.

    Args:
        every: N. Default: 200.
        candidates: Bandwidths, ascending, the first of them 0. Default: (0, 1, 2).
        window: Updates of factors. Default: 5.
        hysteresis: Relative gain. Default: 0.1.

    Raises:
        ValueError: an option is out of range.
    """

    every: int = 200
    candidates: tuple[int, ...] = CANDIDATES
    window: int = 5
    hysteresis: float = 0.1

    def __post_init__(self) -> None:
        check_count("every", self.every)
        check_count("window", self.window)
        for bandwidth in self.candidates:
            check_bandwidth(bandwidth)
        if self.candidates[:1] != (0,) or tuple(sorted(set(self.candidates))) != self.candidates:
            raise ValueError(f"candidates must be bandwidths, ascending from 0, got {self.candidates!r}.")
        if not self.hysteresis >= 0:
            raise ValueError(f"hysteresis must be at least 0, got {self.hysteresis!r}.")

    def decides(self, step: int) -> bool:
        """Whether a decision is due at this step, the first of which is 0: at N, 4 N, 16 N, …."""
        count, rest = divmod(step, self.every)
        return rest == 0 and count > 0 and count & (count - 1) == 0 and count.bit_length() % 2 == 1

    def watch(self, band: KroneckerBand, gradients: Sequence[Tensor | None]) -> None:
        """Before the solve of every step: decide or open the window, if it is time."""
        averages = band.averages
        if not averages.updates:
            return
        if self.decides(band.steps) and averages.probe is not None and averages.probe.last:
            self._decide(band, averages.probe, gradients)
            averages.probe = None
        reach = self.window * band.options.factor_every
        if averages.probe is None and any(self.decides(band.steps + i) for i in range(1, reach + 1)):
            averages.open_probe(band.taper.of(self.candidates))

    @torch.no_grad()
    def _decide(self, band: KroneckerBand, probe: Probe, gradients: Sequence[Tensor | None]) -> None:
        options, damping, ranks = band.options, band.inverse.absolute_damping, band.gathering.ranks
        made: dict[int, tuple[KroneckerAverages, KroneckerInverse]] = {}
        for k in reversed(self.candidates):
            factors = band.averages.blank_factors(band.taper.of([k]))
            factors.adopt(probe.factors)
            made[k] = factors, band.inverse.of(factors)
        widest = made[self.candidates[-1]][1]
        widest.refresh(damping, ranks)
        gradient = band.inverse.flat(gradients)
        found = []
        for k in self.candidates:
            factors, inverse = made[k]
            if not factors.pairs:
                step = widest.solve_blocks(gradient) if widest.cross else widest.solve(gradient)[0]
            else:
                if inverse is not widest:
                    inverse.share(widest)
                step = inverse.solve(gradient)[0]
            bend = probe.curvature(step, ranks) + widest.penalty(step, damping)
            reduction = (gradient @ step).square() / (2 * bend).clamp_min(torch.finfo(bend.dtype).tiny)
            cost = kronecker_operations(
                factors, band.averages.rows, options.factor_every, options.inverse_every, band.inverse.iterations
            )
            found.append(Candidate(k, float(reduction), cost))
        assert not isinstance(band.bandwidth, str)
        chosen = most_gain(found, band.bandwidth, self.hysteresis)
        evidence = ", ".join(f"{c.bandwidth}: {c.reduction:.3g} for {c.cost:.3g}" for c in found)
        _log.info("bandwidth %d at step %d; reduction for operations %s", chosen, band.steps, evidence)
        if chosen != band.bandwidth:
            factors, inverse = made[chosen]
            band.take(chosen, factors, inverse if inverse.ready else band.inverse.of(factors))
