"""When a measured quantity has changed abruptly: a robust rule for short histories on a logarithmic scale."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """An abrupt change of one quantity.

    Attributes:
        name: The quantity.
        step: When it was measured.
        value: What was measured.
        expected: The median of the measurements before.
        score: The deviation of the logarithm in units of its usual spread, as in :class:`ChangeDetector`.
    """

    name: str
    step: int
    value: float
    expected: float
    score: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.name} is {self.value:.3g}, and was {self.expected:.3g} (score {self.score:+.1f})"
        )


@dataclass
class ChangeDetector:
    """Flags a measurement far from the median of the last ones (Hampel's identifier, on logarithms).

    With x the logarithms of the last ``window`` measurements, m their median and ``σ = 1.4826 · median(|x − m|)``,
    which is the standard deviation of normal ones, a new measurement y with relative standard error s is an abrupt
    change if ``|log y − m| > threshold · √(max(σ, floor)² + s²)``.

    Positive quantities that vary by a constant *factor* thus have one and the same threshold at all sizes, and a slow
    drift is no change. After a change the history starts anew, so that a jump is flagged once. Measurements that are
    zero or not finite are flagged when the one before was not, and are otherwise left out.

    Attributes:
        window: How many measurements are looked back at.
        threshold: Scores beyond it are changes.
        least: Measurements before the first can be flagged.
        floor: The least spread of logarithms: smaller changes than ``exp(threshold · floor)`` are never flagged.
    """

    window: int = 20
    threshold: float = 5.0
    least: int = 5
    floor: float = 0.05
    _logs: dict[str, deque[float]] = field(default_factory=dict, repr=False)
    _usable: dict[str, bool] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 2 <= self.least <= self.window:
            raise ValueError(f"need 2 <= least <= window, got least={self.least} and window={self.window}.")
        if not self.threshold > 0 or not self.floor > 0:
            raise ValueError(f"threshold and floor must be positive, got {self.threshold} and {self.floor}.")

    def update(self, name: str, step: int, value: float, relative_error: float = 0.0) -> Change | None:
        """Take up a measurement; the change that it is, or None.

        Args:
            name: The quantity; each has a history of its own.
            step: When it was measured.
            value: What was measured; its absolute value counts.
            relative_error: Standard error of the value, divided by the value; NaN counts as none.
        """
        logs = self._logs.setdefault(name, deque(maxlen=self.window))
        usable, before = math.isfinite(value) and value != 0, self._usable.get(name, True)
        self._usable[name] = usable
        if not usable:
            if not before or len(logs) < self.least:
                return None
            return Change(name, step, value, math.exp(statistics.median(logs)), math.inf)
        new = math.log(abs(value))
        change = self._compare(name, step, value, new, relative_error) if len(logs) >= self.least else None
        if change is not None:
            logs.clear()
        logs.append(new)
        return change

    def _compare(self, name: str, step: int, value: float, new: float, relative_error: float) -> Change | None:
        logs = self._logs[name]
        middle = statistics.median(logs)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
        noise = relative_error if math.isfinite(relative_error) else 0.0
        score = (new - middle) / math.hypot(max(spread, self.floor), noise)
        if abs(score) <= self.threshold:
            return None
        return Change(name, step, value, math.exp(middle), score)
