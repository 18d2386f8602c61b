"""When to look for negative curvature: at the start, where the gradient has become small, and on plateaus."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stationarity:
    """Decides at which steps a check of the curvature is due.

    A check is due at the first step; where ``‖g‖ ≤ gradient_ratio · max ‖g‖``, the largest since the last escape; and
    on a plateau: the mean loss of the last ``patience`` steps is below that of the ``patience`` steps before by less
    than ``plateau`` of its absolute value. After a check without an escape the next one is at least ``wait`` steps
    away, and ``wait`` doubles up to ``max_wait``, so that a convex problem pays for few; an escape sets it back.

    What checks cost is counted in gradients (a Hessian-vector product is 2, a trial of the loss 1) and bounded: beyond
    ``free``, a check that would bring it over ``overhead`` times the number of steps is put off. So it does not depend
    on the clock.

    Attributes:
        gradient_ratio: Gradients below this share of the largest are small.
        plateau: Relative decrease of the loss below which it stands still.
        patience: Steps that the loss is averaged over, and first value of ``wait``.
        max_wait: Bound of ``wait``.
        overhead: Cost of checks, beside that of as many gradients as there are steps. None: no limit.
        free: Gradients that checks may cost in any case.
        spent: Gradients that they have cost.
        put_off: Number of steps at which a check would have been due and was put off for its cost.
    """

    gradient_ratio: float = 1e-2
    plateau: float = 1e-2
    patience: int = 10
    max_wait: int = 1000
    overhead: float | None = 0.5
    free: int = 1000
    wait: int = field(default=0, init=False)
    since_check: int = field(default=0, init=False)
    largest: float = field(default=0.0, init=False)
    last: float = field(default=float("inf"), init=False)
    losses: deque[float] = field(default_factory=deque, init=False)
    steps: int = field(default=0, init=False)
    spent: int = field(default=0, init=False)
    last_cost: int = field(default=0, init=False)
    put_off: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.patience < 1 or self.max_wait < self.patience:
            raise ValueError(f"need 1 <= patience <= max_wait, got {self.patience} and {self.max_wait}.")
        if not 0 <= self.gradient_ratio <= 1 or not 0 <= self.plateau <= 1:
            raise ValueError(
                f"gradient_ratio and plateau are shares in [0, 1], got {self.gradient_ratio} and {self.plateau}."
            )

        if (self.overhead is not None and not self.overhead > 0) or self.free < 0:
            raise ValueError(
                f"overhead must be more than 0 or None, and free at least 0, got {self.overhead} and {self.free}."
            )

    @property
    def due(self) -> bool:
        """Whether the next step should check the curvature, and may."""
        return self.wanted and self.affordable

    @property
    def affordable(self) -> bool:
        """Whether one more check, as dear as the last, is within ``free`` or ``overhead``."""
        return self.overhead is None or self.spent + self.last_cost <= max(self.free, self.overhead * self.steps)

    @property
    def wanted(self) -> bool:
        """Whether the next step should check the curvature, whatever it costs."""
        if self.since_check < self.wait:
            return False
        return self.wait == 0 or self.last <= self.gradient_ratio * self.largest or self._stands_still()

    def observe(self, loss: float, gradient_norm: float) -> None:
        """Take up what a step of the base optimizer saw."""
        self.put_off += self.wanted and not self.affordable
        self.steps += 1
        self.since_check += 1
        self.last = gradient_norm
        self.largest = max(self.largest, gradient_norm)
        self.losses.append(loss)
        if len(self.losses) > 2 * self.patience:
            self.losses.popleft()

    def checked(self, escaped: bool, cost: int = 0) -> None:
        """Note the result of a check, and what it cost in gradients."""
        self.since_check = 0
        self.spent += cost
        self.last_cost = cost
        self.wait = self.patience if escaped or self.wait == 0 else min(2 * self.wait, self.max_wait)
        if escaped:
            self.largest, self.last = 0.0, float("inf")
            self.losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """What has been observed, as plain numbers."""
        names = ("wait", "since_check", "largest", "last", "steps", "spent", "last_cost", "put_off")
        return {**{name: getattr(self, name) for name in names}, "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, deque(value) if name == "losses" else value)

    def _stands_still(self) -> bool:
        if len(self.losses) < 2 * self.patience:
            return False
        values = list(self.losses)
        before, after = sum(values[: self.patience]), sum(values[self.patience :])
        return before - after <= self.plateau * abs(before)
