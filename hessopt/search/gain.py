"""Which of several choices gains most for its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """Evidence for one bandwidth at a decision.

    Attributes:
        bandwidth: k.
        reduction: Reduction of the objective by its step.
        cost: Of a step, in operations or in seconds.
    """

    bandwidth: int
    reduction: float
    cost: float

    @property
    def gain(self) -> float:
        """Reduction per cost; a step that does not reduce the objective has none."""
        return max(self.reduction, 0.0) / max(self.cost, 1e-12)


def most_gain(found: Sequence[Candidate], current: int | None, hysteresis: float) -> int:
    """The bandwidth of most gain, or the current one if none has more than ``1 + hysteresis`` times its gain."""
    best = max(found, key=lambda candidate: candidate.gain)
    for candidate in found:
        if candidate.bandwidth == current and best.gain <= (1 + hysteresis) * candidate.gain:
            return candidate.bandwidth
    return best.bandwidth
