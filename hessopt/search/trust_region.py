"""The radius of a trust region, adapted by how well the model predicted the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ACCEPTANCE = 1e-4
"""Least ratio of actual to predicted reduction at which a step is accepted."""
POOR, GOOD = 0.25, 0.75
"""Below the one an accepted step shrinks the radius, above the other it may grow it."""
SHRINK, LEAST_SHRINK, GROW = 0.5, 0.0625, 2.5
"""Factors on the step's length; the first two bound what interpolation proposes."""


@dataclass
class TrustRegion:
    """Radius Δ that follows the ratio ρ of the actual to the predicted reduction of the objective.

    ===================  ==============================================
    ``ρ > 0.75``         ``Δ ← max(Δ, 2.5 ‖d‖)``
    ``0.25 ≤ ρ ≤ 0.75``  Δ stays
    ``1e-4 < ρ < 0.25``  ``Δ ← ½ ‖d‖``
    ``ρ ≤ 1e-4``         rejected: ``Δ ← t ‖d‖``, t in [1/16, 1/2]
    ===================  ==============================================

    For a rejected step, t is the minimizer of the parabola through the objective, its slope and the trial value; 1/16
    where the trial was not finite.

    Args:
        radius: Δ to start from; positive.
        minimum: Lower bound of Δ; positive.
        maximum: Upper bound of Δ.

    Raises:
        ValueError: a bound or the start value is out of range.

    Source:
        Conn, Gould and Toint, "Trust-Region Methods" (2000), algorithm 6.1.1 and section 17.1.

    Example:
        >>> region = TrustRegion(1.0)
        >>> region.accept(ratio=1.0, length=1.0)
        >>> region.radius
        2.5
        >>> region.reject(length=2.0, slope=-1.0, change=3.0)
        >>> region.radius
        0.25
    """

    radius: float
    minimum: float = 1e-12
    maximum: float = 1e12

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.maximum < math.inf:
            raise ValueError(f"radius bounds must satisfy 0 < minimum <= maximum, got {self.minimum}, {self.maximum}.")
        if not self.minimum <= self.radius <= self.maximum:
            raise ValueError(f"radius must lie in [{self.minimum}, {self.maximum}], got {self.radius}.")

    def accept(self, ratio: float, length: float) -> None:
        """Adapt Δ after an accepted step of this length."""
        if ratio > GOOD:
            self.radius = self._bounded(max(self.radius, GROW * length))
        elif ratio < POOR:
            self.radius = self._bounded(SHRINK * length)

    def reject(self, length: float, slope: float, change: float) -> None:
        """Shrink Δ after a rejected step.

        Args:
            length: ``‖d‖``.
            slope: ``gᵀd``.
            change: Objective at the trial minus that before.
        """
        above = change - slope
        factor = -slope / (2 * above) if math.isfinite(above) and above > 0 and slope < 0 else LEAST_SHRINK
        self.radius = self._bounded(min(max(factor, LEAST_SHRINK), SHRINK) * min(length, self.radius))

    def state_dict(self) -> dict[str, float]:
        """Δ as a plain number. The bounds are the user's choice, not state."""
        return {"radius": self.radius}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up Δ of :meth:`state_dict`, within this object's own bounds."""
        self.radius = self._bounded(float(state["radius"]))

    def _bounded(self, value: float) -> float:
        return min(max(value, self.minimum), self.maximum)
