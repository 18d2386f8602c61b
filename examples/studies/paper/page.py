"""The page of the reproduction: hand-written text (page.md) with tables and figures of the results filled in."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diagnostics.results.files import write_text
from examples.studies.paper.comparison import NOT_RUN, OUTSIDE, TABLES, WITHIN, Line, Published, compare, coverage
from examples.studies.paper.facts import Facts
from examples.studies.paper.tables import shown

MARKS = {WITHIN: "✓", OUTSIDE: "✗", "not comparable": "≉", "paper inconsistent": "†", NOT_RUN: ""}
PHASES = ("init", "mid", "final")


def write(rows: Sequence[Mapping[str, Any]], figures: Sequence[str], page: Path) -> None:
    """Fill in ``page.md`` beside this file and save it.

    Args:
        rows: Of the results, chosen.
        figures: Names of the files in ``images`` beside the page.
        page: Where to.
    """
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True,
                              keep_trailing_newline=True, autoescape=False)  # fmt: skip

    def figure(name: str, caption: str) -> str:
        file = f"paper_{name}.png"
        return f"![{caption}](images/{file})\n\n*{caption}*" if file in figures else f"*{caption}: {NOT_RUN} yet.*"

    page.parent.mkdir(parents=True, exist_ok=True)
    text = environment.get_template("page.md").render(
        tables=lambda name: "\n\n".join(tables(name, rows)),
        ran=lambda name: ran(name, rows),
        summary=lambda: summary(rows),
        figure=figure,
        facts=Facts(rows),
    )
    write_text(page, "\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def ran(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What ran, as a sentence."""
    lines = coverage(name, rows)
    return f"Ran: {'; '.join(lines)}." if lines else "Nothing of it was run yet."


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each published table: how many of its figures agree."""
    cells = []
    for name, every in TABLES.items():
        for published in every:
            lines = compare(name, published, rows)
            counts = [sum(line.verdict.startswith(kind) for line in lines) for kind in MARKS]
            cells.append([published.title, f"`{name}.py`", *map(str, counts)])
    return _markdown(["", "script", *(f"{kind} {mark}".strip() for kind, mark in MARKS.items())], cells)


def tables(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All tables of an experiment: scalars value by value, curves as counts."""
    parts = []
    for published in TABLES[name]:
        lines = compare(name, published, rows)
        body = _curves(lines) if published.by_distance else _values(published, lines)
        parts.append(f"**{published.title}**\n\n{body}")
        if reasons := _reasons(lines):
            parts.append(reasons)
    return parts


def _values(published: Published, lines: Sequence[Line]) -> str:
    found = {(line.variant, line.quantity, line.phase): line for line in lines}
    cells = []
    for variant, quantity in dict.fromkeys((line.variant, line.quantity) for line in lines):
        row = [" ".join(variant), f"`{quantity}`"]
        for phase in PHASES:
            row += _cells(found.get((variant, quantity, phase)))
        cells.append(row)
    header = [f"{phase}, {whose}" for phase in PHASES for whose in ("paper", "ours")]
    return _markdown([", ".join(published.variant), "quantity", *header], cells)


def _cells(line: Line | None) -> list[str]:
    if line is None:
        return ["", ""]
    ours = f"{shown(*line.ours)} {_mark(line)}" if line.ours else NOT_RUN
    return [shown(*line.paper), ours]


def _mark(line: Line) -> str:
    return MARKS[line.verdict.split(":")[0]]


def _curves(lines: Sequence[Line]) -> str:
    """How many points of the curves agree, and the largest distance from the paper's mean of those that do not."""
    cells = []
    for quantity, phase in dict.fromkeys((line.quantity, line.phase) for line in lines):
        here = [line for line in lines if (line.quantity, line.phase) == (quantity, phase)]
        run = [line for line in here if line.ours]
        agree = sum(line.verdict == WITHIN for line in run)
        apart = [abs(line.ours[0] / line.paper[0] - 1) for line in run if line.ours and abs(line.paper[0]) > 1e-5]
        cells.append(
            [
                f"`{quantity}(d)`",
                phase,
                f"{agree} of {len(run)}" if run else NOT_RUN,
                f"{statistics.median(apart):.0%}" if apart else "",
            ]
        )
    return _markdown(["curve", "phase", "points within 2 σ", "median difference of the means"], cells)


def _reasons(lines: Sequence[Line]) -> str:
    found: dict[str, None] = {}
    for line in lines:
        kind, _, reason = line.verdict.partition(": ")
        if reason:
            found[f"{MARKS[kind]} {kind}: {reason}."] = None
    return "  \n".join(found)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
