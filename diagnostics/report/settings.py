"""Numbers that say how a network is diagnosed, checked before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """Numbers of :func:`diagnostics.diagnose` that suit most networks as they are.

    Attributes:
        probes: Random probes at each node of an estimate. None: 30, or 10 where a pass over the data takes more than
            1e8 operations; then Lanczos iterations are fewer as well.
        seed: Of all random numbers; each section draws its own.
        epsilon: ε of the interaction radius and the recommended bandwidth.
        memory_limit: Bytes that a section may take beside the model, its data and the tapes of a pass over them. What
            does not fit is estimated instead, with fewer probes or with vectors that are not kept (the report's
            ``shortened`` says so), or left out with the size that it needs (``skipped``).

    Raises:
        ValueError: one is out of range.
    """

    probes: int | None = None
    seed: int = 0
    epsilon: float = 0.1
    memory_limit: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.probes is not None and not 3 <= self.probes < 2**31:
            raise ValueError(f"probes must be at least 3, so that there is a standard error, got {self.probes}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError("seed must be an integer of 64 bits.")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}.")
        if not 0 < self.memory_limit < math.inf:
            raise ValueError(f"memory_limit must be a positive and finite number of bytes, got {self.memory_limit}.")
