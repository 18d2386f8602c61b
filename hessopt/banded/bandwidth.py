"""Which bandwidth to use: by predicted gain per cost, or by the interaction radius."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hessopt.banded.quadratic_model import QuadraticModel
from hessopt.banded.systems import BandedSystem
from hessopt.checks import check_choice, check_count
from hessopt.errors import SolveError
from hessopt.network.cliques import Bandwidth, Cliques, band_cliques
from hessopt.search.gain import Candidate, most_gain

_log = logging.getLogger(__name__)

HYSTERESIS = 0.1
"""By how much another bandwidth's gain must be more, relatively."""


def coupling_radius(norms: Tensor, distances: NDArray[np.float64], epsilon: float) -> float:
    """k_ε in parameter space: the largest distance of layers with coupling ``C(v,w) > ε``.

    ``C(v,w) = ‖M[v,w]‖_F / √(‖M[v,v]‖_F ‖M[w,w]‖_F)``, the criterion of :func:`diagnostics.interaction_radius`, of the
    Gauss-Newton matrix M of the parameters.

    Args:
        norms: ``‖M[v,w]‖_F``, ``(n, n)``.
        distances: Of the layers.
        epsilon: ε.
    """
    own = norms.diagonal().sqrt()
    scale = own[:, None] * own
    coupled = ((norms > epsilon * scale) & (norms > 0)).fill_diagonal_(False).cpu().numpy()
    return float(distances[coupled].max()) if coupled.any() else 0.0


def candidates(distances: NDArray[np.float64], radius: float) -> list[int]:
    """0, 1, 2, 4, … and the least bandwidth that is the full matrix, those beyond the radius left out but for one.

    Args:
        distances: Of the layers, ``(n, n)``.
        radius: Interaction radius; the candidates' largest is the least one that reaches it.
    """
    full = len(distances) - 1 if np.isinf(distances).any() else int(distances.max(initial=0))
    found = sorted({0, full, *(2**i for i in range(max(full, 1).bit_length()) if 2**i < full)})
    return within(found, radius)


def within(bandwidths: Sequence[int], radius: float) -> list[int]:
    """Those of ascending bandwidths up to the first one that reaches the radius."""
    return [k for i, k in enumerate(bandwidths) if i == 0 or bandwidths[i - 1] < radius]


def bandwidth_cliques(distances: NDArray[np.float64], bandwidth: Bandwidth) -> Cliques:
    """Cliques of the band; one of all layers, connected or not, if the bandwidth is the number of layers less one."""
    if bandwidth == "full" or bandwidth >= len(distances) - 1:
        return Cliques((tuple(range(len(distances))),), ())
    return _cliques(np.ascontiguousarray(distances, dtype=float).tobytes(), len(distances), bandwidth)


@lru_cache(maxsize=64)
def _cliques(distances: bytes, count: int, bandwidth: int) -> Cliques:
    """They take longer than a small step, and are the same at every one."""
    return band_cliques(np.frombuffer(distances).reshape(count, count), bandwidth)


@dataclass(frozen=True)
class AutoBandwidth:
    """Chooses the bandwidth, at every N-th step.

    ``"gain"``: for each of :func:`candidates` its step at the present damping, that step's reduction of the exact
    Gauss-Newton model divided by a step's cost. One that takes no fewer operations than a larger bandwidth, whose
    curvature is closer to the exact one, is left out: often there is nothing to compare, and nothing is tried. Nor is
    it at the first step, where the largest bandwidth is taken. The cost is that of the operations, which makes runs
    repeatable, or the seconds that the solve and the rest of the step took here, which does not. The present bandwidth
    is kept unless another's gain is more by a tenth. ``"radius"``: the least bandwidth that reaches k_ε, from the first
    step on.

    Args:
        rule: ``"gain"``: predicted reduction of the objective by cost of a step; or ``"radius"``. Default: ``"gain"``.
        every: N, at least 1. Default: 10.
        epsilon: ε of the interaction radius, the coupling of layers that counts as none. Default: 0.1.
        cost: Of a step, for the gain: ``"model"``, operations, so that runs repeat bit for bit; or ``"measured"``,
            seconds of the solve. Default: None, ``"model"`` where there is a gain.

    Raises:
        ValueError: an option is out of range, or does nothing.
    """

    rule: Literal["gain", "radius"] = "gain"
    every: int = 10
    epsilon: float = 0.1
    cost: Literal["model", "measured"] | None = None

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, ("gain", "radius"))
        if self.cost is not None:
            check_choice("cost", self.cost, ("model", "measured"))
            if self.rule == "radius":
                raise ValueError('rule="radius" asks for no cost; leave cost= out.')
        check_count("every", self.every)
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon!r}.")

    def choose(
        self,
        state: Mapping[str, Any],
        distances: NDArray[np.float64],
        model: QuadraticModel,
        system: BandedSystem,
        damping: float,
    ) -> int:
        """This step's bandwidth.

        Args:
            state: ``"step"``, the number of steps so far, and ``"bandwidth"``, the present one, if there are.
            distances: Of the layers.
            model: The quadratic model.
            system: Its solves.
            damping: λ.
        """
        current: int | None = state.get("bandwidth")
        if current is not None and state.get("step", 0) % self.every:
            return current
        bandwidths = candidates(distances, math.inf)
        costs = {k: system.operations(bandwidth_cliques(distances, k)) for k in bandwidths}
        if self.rule == "gain":
            bandwidths = [k for i, k in enumerate(bandwidths) if all(costs[k] < costs[j] for j in bandwidths[i + 1 :])]
            if len(bandwidths) == 1 or current is None:
                _log.info("bandwidth %d, untried: %d take fewer operations", bandwidths[-1], len(bandwidths) - 1)
                return bandwidths[-1]
        radius = coupling_radius(system.block_norms(), distances, self.epsilon)
        bandwidths = within(bandwidths, radius)
        if self.rule == "radius":
            _log.info("bandwidth %d: interaction radius %g at %g", bandwidths[-1], radius, self.epsilon)
            return bandwidths[-1]
        found = [self._candidate(k, distances, costs[k], model, system, damping) for k in bandwidths]
        chosen = most_gain(found, current, HYSTERESIS)
        evidence = ", ".join(f"{c.bandwidth}: {c.reduction:.3g} for {c.cost:.3g}" for c in found)
        _log.info(
            "bandwidth %d: interaction radius %g at %g; reduction for cost %s", chosen, radius, self.epsilon, evidence
        )
        return chosen

    def _candidate(
        self,
        bandwidth: int,
        distances: NDArray[np.float64],
        operations: float,
        model: QuadraticModel,
        system: BandedSystem,
        damping: float,
    ) -> Candidate:
        cliques = bandwidth_cliques(distances, bandwidth)
        start = time.perf_counter()
        try:
            reduction = model.predicted_reduction(model.step(damping, cliques, system))
        except SolveError:
            reduction = 0.0
        seconds = time.perf_counter() - start
        return Candidate(bandwidth, reduction, seconds if self.cost == "measured" else operations)
