"""Which rows make up the comparison with peers, and which show what the parts of an optimizer contribute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.shared.task import Problem
from examples.studies.ablation.contender import Contender
from examples.studies.ablation.results import OBJECTIVE, SECONDS, STEPS, WORK, Entry, entries, lower_median
from examples.studies.ablation.table import Row


def main_rows(rows: Sequence[Row], contenders: Mapping[str, Contender]) -> list[Row]:
    """Of each problem the rows of one study, the one of the largest budget in which ours is tuned or has its defaults.

    Variants are left out, and so are studies of equal steps, and problems that ours was not compared on: there is
    nothing to win or to lose.
    """
    chosen: dict[str, tuple[float, str]] = {}
    for row in rows:
        own = row["contender"] in contenders and contenders[row["contender"]].ours
        if own and row["role"] in ("tuned", "default") and "steps" not in row["budget"]:
            candidate = (float(row["budget"]["seconds"]), row["study"])
            chosen[row["problem"]] = max(candidate, chosen.get(row["problem"], candidate))
    return [
        row
        for row in rows
        if row["role"] != "variant" and row["problem"] in chosen and row["study"] == chosen[row["problem"]][1]
    ]


@dataclass(frozen=True)
class Parts:
    """A study with variants: its name, and tables with their titles."""

    study: str
    tables: Sequence[tuple[str, str]]


def part_tables(
    rows: Sequence[Row], contenders: Mapping[str, Contender], problems: Mapping[str, Problem]
) -> list[Parts]:
    """Of each study with variants its tables, with a line for each variant or tuned peer.

    Median objectives at the end, which is at equal seconds, and at equal gradient-equivalents, the most that all of the
    lines got to; and seconds to what AdamW ends with. Of a study of equal steps the objectives at the end, and the
    seconds to there.
    """
    found = []
    for study in dict.fromkeys(row["study"] for row in rows if row["role"] == "variant"):
        own = [row for row in rows if row["study"] == study]
        here = [e for e in entries(own, contenders) if e.contender in contenders]
        ends = {(_label(e, contenders), e.problem): e.final for e in here if e.curves}
        if any("steps" in row["budget"] for row in own):
            taken = {row["problem"]: row["budget"].get("steps") for row in own if row["role"] != "tuning"}
            titles = {name: f"after {steps:g} steps" for name, steps in taken.items() if steps is not None}
            spent = {
                (_label(e, contenders), e.problem): lower_median([c[-1][SECONDS] for c in e.curves])
                for e in here
                if e.curves and all(c[-1][STEPS] == taken[e.problem] for c in e.curves)
            }
            tables = [
                ("At equal steps:", _table(ends, problems, titles)),
                ("Seconds to there, on a machine that other work ran on:", _table(spent, problems, titles)),
            ]
        else:
            tables = [
                ("At equal seconds:", _table(ends, problems)),
                ("At equal gradient-equivalents:", _table(_at_equal_work(here, contenders), problems)),
            ]
            if shares := _shares_of(REFERENCE, here, contenders):
                title = f"Seconds to the objective that {contenders[REFERENCE].title}, tuned, ends with, by its own:"
                tables.append((title, _table(shares, problems, never="never")))
        found.append(Parts(study, tables))
    return found


Cells = Mapping[tuple[str, str], float]
REFERENCE = "adamw"


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


def _shares_of(name: str, here: Sequence[Entry], contenders: Mapping[str, Contender]) -> dict[tuple[str, str], float]:
    """Median seconds to a tuned peer's last objective over that peer's own."""
    found = {}
    for peer in (e for e in here if (e.contender, e.role) == (name, "tuned") and math.isfinite(e.final)):
        own = lower_median(peer.to_target(peer.final))
        for e in here:
            if e.problem == peer.problem and e.curves:
                found[_label(e, contenders), e.problem] = lower_median(e.to_target(peer.final)) / own
    return found


def _table(
    cells: Cells, problems: Mapping[str, Problem], after: Mapping[str, str] | None = None, never: str = "diverged"
) -> str:
    names = list(dict.fromkeys(name for _, name in cells))
    titles = [problems[name].title if name in problems else name for name in names]
    if after:
        titles = [
            f"{title}, {after[name]}" if name in after else title for name, title in zip(names, titles, strict=True)
        ]
    lines = [f"| | {' | '.join(titles)} |", "| --- " * (len(names) + 1) + "|"]
    best = {name: min(value for (_, problem), value in cells.items() if problem == name) for name in names}
    for label in dict.fromkeys(label for label, _ in cells):
        row = [_cell(cells.get((label, name)), best[name], never) for name in names]
        lines.append(f"| {label} | {' | '.join(row)} |")
    return "\n".join(lines)


def _cell(value: float | None, best: float, never: str) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return never
    return f"**{value:.3g}**" if value <= best else f"{value:.3g}"
