"""Which rows make up the comparison with peers, and which show what the parts of an optimizer contribute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ablation.contender import Contender
from ablation.results import Entry, entries
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
) -> list[tuple[str, str]]:
    """Of each study with variants its name and a table: median final objectives, a line a variant or tuned peer."""
    found = []
    for study in dict.fromkeys(row["study"] for row in rows if row["role"] == "variant"):
        here = entries([row for row in rows if row["study"] == study], contenders)
        found.append((study, _table([e for e in here if e.contender in contenders], contenders, problems)))
    return found


def _table(here: Sequence[Entry], contenders: Mapping[str, Contender], problems: Mapping[str, Problem]) -> str:
    names = list(dict.fromkeys(e.problem for e in here))
    titles = [problems[name].title.split(",")[0] if name in problems else name for name in names]
    lines = [f"| | {' | '.join(titles)} |", "| --- " * (len(names) + 1) + "|"]
    best = {name: min(e.final for e in here if e.problem == name) for name in names}
    groups: dict[str, dict[str, Entry]] = {}
    for e in sorted(here, key=lambda e: e.role != "tuned"):
        title = contenders[e.contender].title
        label = {"tuned": f"{title}, tuned", "default": f"{title}, defaults"}.get(e.role, f"{title}: {e.label}")
        groups.setdefault(label, {})[e.problem] = e
    for label, row in groups.items():
        lines.append(f"| {label} | {' | '.join(_cell(row.get(name), best[name]) for name in names)} |")
    return "\n".join(lines)


def _cell(entry: Entry | None, best: float) -> str:
    if entry is None or not entry.curves:
        return "–"
    if not math.isfinite(entry.final):
        return "diverged"
    text = f"{entry.final:.3g}"
    return f"**{text}**" if entry.final <= best else text
