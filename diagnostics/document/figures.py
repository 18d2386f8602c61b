"""The figures of a report as tensors, for rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from diagnostics.document.values import number, tensor


class Figures:
    """Sections of a report, with matrices as tensors and standard errors of zero where figures are exact.

    Args:
        report: ``report.data``, or the loaded JSON.
    """

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report
        self.sections: Mapping[str, Any] = report["sections"]
        self.epsilon = number(report["options"]["epsilon"])

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes of the pair table."""
        return tuple(self.sections["metrics"]["nodes"])

    @cached_property
    def distance(self) -> Tensor:
        """Between the nodes, ``(n, n)``."""
        return tensor(self.sections["metrics"]["distance"])

    def metric(self, name: str) -> Tensor:
        """A metric of all pairs, ``(n, n)``."""
        return tensor(self.sections["metrics"][name])

    def error(self, name: str) -> Tensor:
        """Its standard errors, ``(n, n)``."""
        errors = self.sections["metrics"]["errors"]
        return torch.zeros_like(self.distance) if errors is None else tensor(errors[name]).nan_to_num(nan=0.0)

    def margin(self, name: str) -> Tensor:
        """Half the width of its 95 % intervals, ``(n, n)``."""
        return reach(self.sections["metrics"]["probes"]) * self.error(name)

    @cached_property
    def depth(self) -> dict[str, int]:
        """Longest directed path from an input to each node of the graph."""
        depth: dict[str, int] = {}
        for node in self.sections["network"]["nodes"]:
            depth[node["name"]] = max((depth[p] + 1 for p in node["parents"]), default=0)
        return depth


def reach(probes: int | None) -> float:
    """How many standard errors a 95 % interval reaches: Student's t of ``probes − 1`` degrees of freedom."""
    return 0.0 if probes is None else float(stdtrit(max(probes - 1, 1), 0.975))


def named(nodes: Sequence[str]) -> str:
    """Names for a sentence: ``a``, ``a and b``, ``a to d`` of more than three in a row."""
    if len(nodes) > 3:
        return f"{nodes[0]} to {nodes[-1]}"
    return nodes[0] if len(nodes) == 1 else f"{', '.join(nodes[:-1])} and {nodes[-1]}"


def percent(share: float) -> str:
    """A share in per cent, with two digits at least."""
    value = 100 * share
    if 0 < value < 0.1:
        return "less than 0.1 %"
    return f"{value:.0f} %" if value >= 9.5 else f"{value:.2g} %"
