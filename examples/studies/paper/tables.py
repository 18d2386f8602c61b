"""The comparison as text, for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from diagnostics.results.text_table import format_table
from examples.studies.paper.comparison import TABLES, WITHIN, Published, compare, coverage


def report(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables of an experiment, with what ran."""
    if not any(row["experiment"] == name for row in rows):
        return f"{name}: no results yet."
    lines = [f"{name}: {line}" for line in coverage(name, rows)]
    seconds = [row["value"] for row in rows if (row["experiment"], row["quantity"]) == (name, "seconds")]
    if seconds:
        lines.append(f"curvature: {statistics.median(seconds):.3g} s a checkpoint (median of {len(seconds)})")
    return "\n\n".join(["\n".join(lines), *(table(name, published, rows) for published in TABLES.get(name, ()))])


def table(name: str, published: Published, rows: Sequence[Mapping[str, Any]]) -> str:
    """One published table beside ours; only what we have."""
    lines = [line for line in compare(name, published, rows) if line.ours]
    if not lines:
        return f"{published.title}: nothing of it has run."
    head = f"{published.title}: {sum(line.verdict == WITHIN for line in lines)} of {len(lines)} {WITHIN}"
    cells = [
        [" ".join(line.variant), line.phase, line.where, shown(*line.paper), shown(*line.ours), line.verdict]
        for line in lines
        if line.ours
    ]
    return f"{head}\n{format_table(['variant', 'phase', 'quantity', 'paper', 'ours', 'verdict'], cells)}"


def shown(mean: float, spread: float) -> str:
    """``mean ± spread``; without the latter where it is unknown."""
    return f"{mean:.3g}" if spread != spread else f"{mean:.3g} ± {spread:.2g}"
