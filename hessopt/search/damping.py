"""Levenberg–Marquardt damping, adapted by how well the quadratic model predicted the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FACTORS_OF_LENGTHS = ((0.5, 1 / 10), (0.1, 1 / 3), (0.03, 1.0), (0.0, 4.0))
"""Least multiple of a step that was taken, and the factor of λ that follows from it."""


@dataclass
class NielsenDamping:
    """Damping λ that follows the ratio ρ of the actual to the predicted reduction of the loss.

    After an accepted step ``λ ← λ · max(1/3, 1 − (2ρ − 1)³)`` and ``ν ← 2``; after a rejected one ``λ ← λ · ν`` and
    ``ν ← 2ν``. So λ changes smoothly with ρ, falls by at most a factor of three, and grows faster than geometrically
    while steps keep being rejected. λ stays inside ``[minimum, maximum]``.

    Args:
        value: λ to start from; positive.
        growth: ν to start from; greater than 1.
        minimum: Lower bound of λ; positive.
        maximum: Upper bound of λ.

    Raises:
        ValueError: a bound or a start value is out of range.

    Source:
        H. B. Nielsen, "Damping parameter in Marquardt's method", report IMM-REP-1999-05, Technical University of
        Denmark (1999), section 3.

    Example:
        >>> damping = NielsenDamping(1.0)
        >>> for _ in range(2):
        ...     damping.reject()
        >>> damping.value, damping.growth
        (8.0, 8.0)
        >>> damping.accept(ratio=1.0)
        >>> round(damping.value, 3), damping.growth
        (2.667, 2.0)
    """

    value: float
    growth: float = 2.0
    minimum: float = 1e-12
    maximum: float = 1e12

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.maximum < math.inf:
            raise ValueError(f"damping bounds must satisfy 0 < minimum <= maximum, got {self.minimum}, {self.maximum}.")
        if not self.minimum <= self.value <= self.maximum:
            raise ValueError(f"damping must lie in [{self.minimum}, {self.maximum}], got {self.value}.")
        if not self.growth > 1:
            raise ValueError(f"growth must be greater than 1, got {self.growth}.")

    def accept(self, ratio: float) -> None:
        """Adapt λ after an accepted step.

        Args:
            ratio: Actual reduction of the loss divided by the predicted one; positive.
        """
        # Beyond 1 the cube only makes the factor smaller than 1/3, and far beyond it would overflow.
        cube = (2 * min(ratio, 1.0) - 1) ** 3
        self.value = self._bounded(self.value * max(1 / 3, 1 - cube))
        self.growth = 2.0

    def reject(self) -> None:
        """Raise λ after a rejected step."""
        self.value = self._bounded(self.value * self.growth)
        # Without the bound a long run of rejections at the upper bound of λ would end in infinity.
        self.growth = min(2 * self.growth, 2.0**64)

    def follow_length(self, length: float) -> None:
        """After a line search along the step, which had λ: the more of it was taken, the less damping next time.

        ==================  ========
        ``t ≥ 0.5``         ``λ/10``
        ``0.1 ≤ t < 0.5``   ``λ/3``
        ``0.03 ≤ t < 0.1``  λ
        ``t < 0.03``        ``4 λ``
        ==================  ========

        A small length says that the step was far too long for the quadratic model, which damping mends in all
        directions at once and a length only along one.

        Args:
            length: t, the multiple of the step that was taken; 0 if none was.
        """
        factor = next(factor for least, factor in FACTORS_OF_LENGTHS if length >= least)
        self.value = self._bounded(self.value * factor)

    def state_dict(self) -> dict[str, float]:
        """λ and ν as plain numbers. The bounds are the user's choice, not state."""
        return {"damping": self.value, "growth": self.growth}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up λ and ν of :meth:`state_dict`, within this object's own bounds."""
        self.value = self._bounded(float(state["damping"]))
        self.growth = float(state["growth"])

    def _bounded(self, value: float) -> float:
        return min(max(value, self.minimum), self.maximum)
