"""How the benchmarks measure time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def median_seconds(run: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Median wall-clock time of ``repeats`` runs after one that does not count, and the last result."""
    result, seconds = run(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result
