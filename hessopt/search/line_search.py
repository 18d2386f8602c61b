"""Step lengths along one direction, by trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

ARMIJO = 1e-4
"""Least part of the linear prediction ``t · slope`` that a step must achieve."""


@dataclass(frozen=True)
class LineSearchResult:
    """What a search along a direction found.

    Attributes:
        length: t; 0 if no trial was good enough.
        change: Change of the objective at t; 0 if none was good enough.
        trials: Number of evaluations.
    """

    length: float
    change: float
    trials: int


def line_search(
    change: Callable[[float], float],
    slope: float,
    curvature: float = 0.0,
    *,
    length: float = 1.0,
    max_trials: int = 10,
    expand: bool = False,
    rounding: float = 0.0,
) -> LineSearchResult:
    """Find t > 0 at which the objective goes down enough: ``change(t) ≤ 1e-4 (t · slope + ½ t² min(curvature, 0))``.

    While that does not hold, t goes to the minimizer of the parabola through what is known, within [t/10, t/2] (t/10
    where the trial was not finite). With ``expand``, a first success is doubled while that goes down further.

    Args:
        change: ``t ↦ f(θ + t d) − f(θ)``; not finite means too far.
        slope: ``gᵀd``; not positive.
        curvature: ``dᵀBd``: where it is negative, the slope may be zero (a step along negative curvature).
        length: First t.
        max_trials: Most evaluations.
        expand: Try longer steps.
        rounding: Changes of this size are noise, and accepted.

    Raises:
        ValueError: the direction goes up.

    Source:
        Nocedal and Wright, "Numerical Optimization" (2006), section 3.5; Moré and Sorensen 1979 for the curvature.
    """
    bend = min(curvature, 0.0)
    if not slope <= 0 or (slope == 0 and bend == 0):
        raise ValueError(f"the direction does not go down: slope {slope}, curvature {curvature}.")

    def enough(t: float, value: float) -> bool:
        return value <= ARMIJO * (t * slope + t * t * bend / 2) + rounding

    trials = 0
    t, value = length, math.inf
    while trials < max_trials:
        value = change(t)
        trials += 1
        if enough(t, value):
            break
        above = value - t * slope
        best = -slope * t * t / (2 * above) if math.isfinite(above) and above > 0 else 0.0
        t = min(max(best, t / 10), t / 2)
    else:
        return LineSearchResult(0.0, 0.0, trials)
    while expand and trials < max_trials:
        further = change(2 * t)
        trials += 1
        if not (further < value and enough(2 * t, further)):
            break
        t, value = 2 * t, further
    return LineSearchResult(t, value, trials)
