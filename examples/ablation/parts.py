"""Which rows make up the comparison with peers, and which show what the parts of an optimizer contribute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ablation.contender import Contender
from ablation.results import OBJECTIVE, WORK, Entry, entries, lower_median
from ablation.table import Row
from ablation.task import Problem


def main_rows(rows: Sequence[Row], contenders: Mapping[str, Contender]) -> list[Row]:
    """Of each problem the rows of one study, the one of the largest budget in which ours is tuned or has its defaults.

    Variants are left out, and so are problems that ours was not compared on: there is nothing to win or to lose.
    """
    chosen: dict[str, tuple[float, str]] = {}
    for row in rows:
        own = row["contender"] in contenders and contenders[row["contender"]].ours
        if own and row["role"] in ("tuned", "default"):
            candidate = (float(row["budget"]["seconds"]), row["study"])
            chosen[row["problem"]] = max(candidate, chosen.get(row["problem"], candidate))
    return [
        row
        for row in rows
        if row["role"] != "variant" and row["problem"] in chosen and row["study"] == chosen[row["problem"]][1]
    ]


def part_tables(
    rows: Sequence[Row], contenders: Mapping[str, Contender], problems: Mapping[str, Problem]
) -> list[tuple[str, str, str]]:
    """Of each study with variants its name and two tables, with a line for each variant or tuned peer.

    Median objectives at the end, which is at equal seconds; and at equal gradient-equivalents, the most that all of the
    lines got to.
    """
    found = []
    for study in dict.fromkeys(row["study"] for row in rows if row["role"] == "variant"):
        here = entries([row for row in rows if row["study"] == study], contenders)
        here = [e for e in here if e.contender in contenders]
        ends = {(_label(e, contenders), e.problem): e.final for e in here if e.curves}
        found.append((study, _table(ends, problems), _table(_at_equal_work(here, contenders), problems)))
    return found


Cells = Mapping[tuple[str, str], float]


def _label(e: Entry, contenders: Mapping[str, Contender]) -> str:
    title = contenders[e.contender].title
    return {"tuned": f"{title}, tuned", "default": f"{title}, defaults"}.get(e.role, f"{title}: {e.label}")


def _at_equal_work(here: Sequence[Entry], contenders: Mapping[str, Contender]) -> dict[tuple[str, str], float]:
    found = {}
    for problem in dict.fromkeys(e.problem for e in here):
        applied = [e for e in here if e.problem == problem and e.curves]
        least = min((lower_median([curve[-1][WORK] for curve in e.curves]) for e in applied), default=0.0)
        for e in applied:
            # Before its first point after the start a curve has the objective that it begins with.
            seen = [[p[OBJECTIVE] for p in curve if p[WORK] <= least] or [curve[0][OBJECTIVE]] for curve in e.curves]
            found[_label(e, contenders), problem] = lower_median([values[-1] for values in seen])
    return found


def _table(cells: Cells, problems: Mapping[str, Problem]) -> str:
    names = list(dict.fromkeys(name for _, name in cells))
    titles = [problems[name].title if name in problems else name for name in names]
    lines = [f"| | {' | '.join(titles)} |", "| --- " * (len(names) + 1) + "|"]
    best = {name: min(value for (_, problem), value in cells.items() if problem == name) for name in names}
    for label in dict.fromkeys(label for label, _ in cells):
        row = [_cell(cells.get((label, name)), best[name]) for name in names]
        lines.append(f"| {label} | {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "diverged"
    return f"**{value:.3g}**" if value <= best else f"{value:.3g}"
