"""Numbers as JSON has them: NaN is null, infinities are strings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Any:
    """Tensors, tuples and numbers as lists and JSON numbers; NaN as None, infinities as ``"Infinity"``."""
    if isinstance(value, Tensor):
        return encode(value.detach().cpu().tolist())
    if isinstance(value, Mapping):
        return {str(name): encode(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def number(value: Any) -> float:
    """A number of a report as a float: NaN for null."""
    return math.nan if value is None else _INFINITE[value] if isinstance(value, str) else float(value)


def tensor(values: Any) -> Tensor:
    """Nested lists of numbers of a report as a tensor in float64."""

    def decoded(entry: Any) -> Any:
        return [decoded(e) for e in entry] if isinstance(entry, list) else number(entry)

    return torch.tensor(decoded(values), dtype=torch.float64)
