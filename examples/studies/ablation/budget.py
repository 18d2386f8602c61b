"""How much a run may use, and when its objective is measured."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

GRACE = 1.2
"""A step that goes on beyond this multiple of the budget of seconds is interrupted: it would not count anyway."""


@dataclass(frozen=True)
class Budget:
    """What a run may use; it ends with the first of them.

    Attributes:
        seconds: Inside the optimizer's steps.
        gradient_equivalents: See :mod:`ablation.meter`.
        steps: Of the optimizer; None is any number.
    """

    seconds: float
    gradient_equivalents: float
    steps: float | None = None

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.gradient_equivalents > 0 and (self.steps is None or self.steps > 0)):
            raise ValueError(f"a budget must be positive, got {self}.")

    def share(self, seconds: float, gradient_equivalents: float, steps: int) -> float:
        """The share of the budget that is used up; beyond 1 it is spent."""
        taken = 0.0 if self.steps is None else steps / self.steps
        return max(seconds / self.seconds, gradient_equivalents / self.gradient_equivalents, taken)

    def scaled(self, fraction: float) -> Budget:
        steps = None if self.steps is None else self.steps * fraction
        return Budget(self.seconds * fraction, self.gradient_equivalents * fraction, steps)

    def stated(self) -> dict[str, float]:
        """The limits that there are, by name."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}


class Checkpoints:
    """Geometrically spaced shares of a budget, and every step that may be the last inside of it.

    Args:
        count: Checkpoints from ``first`` to 1.
        first: Share of the first one.

    Attributes:
        kept: The last :meth:`due` step stays in the curve, because a checkpoint was passed; otherwise the next replaces
            it.
    """

    def __init__(self, count: int = 30, first: float = 1e-3) -> None:
        self.kept = True
        self._shares = deque(first ** (1 - i / (count - 1)) for i in range(count))
        self._steps: deque[float] = deque(maxlen=20)
        self._before = 0.0

    def due(self, share: float) -> bool:
        """Whether to measure now, where ``share`` of the budget is used up."""
        self._steps.append(share - self._before)
        self._before = share
        passed = False
        while self._shares and share >= self._shares[0]:
            self._shares.popleft()
            passed = True
        last = share + 1.5 * max(self._steps) > 1  # the next step may be longer than this one
        if passed or last:
            self.kept = passed
        return passed or last


class BudgetSpent(BaseException):
    """The budget is spent. Not an Exception, so that no contender takes it for an error of its own."""


class Clock:
    """Adds up the time inside :meth:`running`, without what is inside :meth:`paused`.

    Attributes:
        seconds: So far; up to date while paused or stopped.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._since: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        self._since = self._now()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._stop()
        try:
            yield
        finally:
            self._since = self._now()

    @contextmanager
    def interrupting(self, limit: float) -> Iterator[None]:
        """Raise :class:`BudgetSpent` inside of a step that would go on beyond ``limit`` seconds.

        Only in the main thread of systems that have timers; elsewhere such a step ends when it ends.
        """
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return

        def ring(*_: object) -> None:
            since = self._since
            left = limit - self.seconds - (0.0 if since is None else time.perf_counter() - since)
            if since is not None and left <= 0:
                raise BudgetSpent
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(limit, 0.1))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _stop(self) -> None:
        since, self._since = self._since, None
        if since is not None:
            self.seconds += self._now() - since

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()
