"""How often each rule of the verdicts fires: small networks of many kinds, fresh and trained a little.

python -m examples.studies.verdicts.calibration [--steps 200] [--only GROUP] [--list] [--out FILE]

Prints the table of rules × groups of docs/verdicts.md; about three minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diagnostics
from diagnostics.document.judge import RULES, judge
from examples.studies.verdicts.networks import Case, cases, train


def diagnosed(case: Case) -> diagnostics.Report:
    """The report on the first samples."""
    batch = case.data[0][: case.batch], case.data[1][: case.batch]
    return diagnostics.diagnose(case.model, batch, case.loss, name=case.name, progress=False)


def reports(groups: Sequence[str], steps: int) -> Iterable[dict[str, Any]]:
    """A row for each report: group, name, whether trained, the document."""
    for case in cases():
        if groups and case.group not in groups:
            continue
        for trained in (False, True):
            if trained:
                train(case, steps)
            start = time.perf_counter()
            data = diagnosed(case).data
            yield {
                "group": case.group,
                "name": case.name,
                "trained": trained,
                "report": data,
                "seconds": time.perf_counter() - start,
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rules and wordings × groups: of how many reports, fresh + trained; in Markdown."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    wordings = [(rule.id, wording) for rule in RULES for wording in rule.wordings]
    counts: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    sizes = {group: sum(row["group"] == group for row in rows) // 2 for group in groups}
    for row in rows:
        for rule, wording in {(v.rule, v.wording) for v in judge(row["report"])}:
            counts[rule, wording][row["group"]][row["trained"]] += 1
    head = ["rule", "wording", *(f"{group} ({sizes[group]})" for group in groups), f"all ({sum(sizes.values())})"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(groups) + 1)]
    for rule, wording in wordings:
        cells = [counts[rule, wording][group] for group in groups]
        cells.append([sum(cell[i] for cell in cells) for i in (0, 1)])
        shown = [f"{fresh} + {trained}" if fresh or trained else "" for fresh, trained in cells]
        lines.append(f"| {rule} | `{wording}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of Adam, for the trained networks")
    parser.add_argument("--only", nargs="*", default=[], metavar="GROUP", help="groups of networks")
    parser.add_argument("--list", action="store_true", help="the verdicts of each report too")
    parser.add_argument("--out", type=Path, help="write the reports into this JSON file")
    options = parser.parse_args()
    rows = []
    for row in reports(options.only, options.steps):
        rows.append(row)
        if options.list:
            state = "trained" if row["trained"] else "fresh"
            print(f"{row['group']}: {row['name']}, {state}, {row['seconds']:.1f} s")
            for verdict in judge(row["report"]):
                print(f"    {verdict.rule}: {verdict}")
    if options.out is not None:
        options.out.write_text(json.dumps(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
