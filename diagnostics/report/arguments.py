"""Numbers that say how a network is diagnosed, checked before any work."""

from __future__ import annotations

import math


def check_numbers(
    *,
    probes: int | None = None,
    seed: int = 0,
    epsilon: float = 0.1,
    memory_limit: float = 1.0,
    seconds: float | None = None,
) -> None:
    """Raise a ValueError that names the first of the arguments of :func:`diagnostics.diagnose` that is out of range."""
    if probes is not None and not 3 <= probes < 2**31:
        raise ValueError(f"probes must be at least 3, so that there is a standard error, got {probes}.")
    if not -(2**63) <= seed < 2**63:
        raise ValueError("seed must be an integer of 64 bits.")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}.")
    if not 0 < memory_limit < math.inf:
        raise ValueError(f"memory_limit must be a positive and finite number of bytes, got {memory_limit}.")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, or None, got {seconds}.")
