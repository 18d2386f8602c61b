"""The figures of a report that are worth comparing: a value and a standard error each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from diagnostics.document.values import number

Figure: TypeAlias = tuple[float, float, int | None]
"""Value, standard error, and the number of probes that it is from; None: the error is a bound, 0 where exact."""


def summary(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by name; errors of exact ones are 0, those of eigenvalues the bounds by their residuals."""
    sections = report["sections"]
    found: dict[str, Figure] = {"loss": _pair(sections["network"]["loss"], None)}
    if "spectrum" in sections:
        section, h = sections["spectrum"], sections["spectrum"]["H"]
        found["gradient norm"] = _pair(section["gradient_norm"], None)
        probes = h["density"] and h["density"]["probes"]
        found["largest eigenvalue"] = _pair(h["largest"], h["largest_residual"])
        found["smallest eigenvalue"] = _pair(h["smallest"], h["smallest_residual"])
        found["trace"] = _pair(h["trace"], h["trace_error"], probes)
        found["m-"] = _pair(h["negative_mass"], h["negative_mass_error"], probes)
    if "metrics" in sections:
        section = sections["metrics"]
        found["Gap (ratio of sums)"] = _pair(section["gap_ratio"], section["gap_ratio_error"], section["probes"])
        for row in section["by_distance"]:
            distance = f"{number(row['distance']):g}"
            names = {"resonance": "R", "stable_rank": "D"} if row["distance"] == 0 else {"coupling": "C"}
            for metric, symbol in names.items():
                error = None if row["errors"] is None else row["errors"][metric]
                found[f"{symbol} at distance {distance}"] = _pair(row[metric], error, section["probes"])
        for i, node in enumerate(section["nodes"]):
            for metric, symbol in {"resonance": "R", "gn_gap": "Gap"}.items():
                error = None if section["errors"] is None else section["errors"][metric][i][i]
                found[f"{symbol} of {node}"] = _pair(section[metric][i][i], error, section["probes"])
    if "parameters" in sections:
        for row in sections["parameters"]["discarded"][:2]:
            found[f"discarded, bandwidth {number(row['bandwidth']):g}"] = _pair(
                row["total"], row["total_error"], sections["parameters"]["probes"]
            )
    return found


def _pair(value: Any, error: Any, probes: int | None = None) -> Figure:
    uncertain = number(error)
    return number(value), 0.0 if math.isnan(uncertain) else uncertain, probes
