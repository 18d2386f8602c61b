"""The calibration of verdicts: the networks are of many kinds, and the table counts what the rules find."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from diagnostics.document.judge import RULES
from examples.studies.verdicts.calibration import diagnosed, table
from examples.studies.verdicts.networks import Case, cases, digits, mlp, train

DOCS = Path(__file__).parents[2] / "docs" / "verdicts.md"


def test_there_are_more_than_thirty_networks_of_many_kinds_and_each_gives_a_finite_loss() -> None:
    groups: Counter[str] = Counter()
    names = set()
    for case in cases():
        groups[case.group] += 1
        names.add((case.group, case.name))
        loss = case.loss(case.model(case.data[0][: case.batch]), case.data[1][: case.batch])
        assert torch.isfinite(loss), case.name
    assert len(names) == groups.total() > 30
    assert len(groups) >= 8


def test_the_table_counts_fresh_and_trained_reports() -> None:
    torch.manual_seed(0)
    rows = []
    for name, activation in (("relu", nn.ReLU), ("tanh", nn.Tanh)):
        case = Case(name, "small", mlp((16, 5, 4, 10), activation), digits(), nn.functional.cross_entropy, batch=8)
        for trained in (False, True):
            if trained:
                train(case, 2, batch=8)
            rows.append({"group": "small", "name": name, "trained": trained, "report": diagnosed(case).data})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(rows).splitlines()]
    assert lines[0] == ["rule", "wording", "small (2)", "all (2)"]
    assert [row[:2] for row in lines[2:]] == [[rule.id, f"`{w}`"] for rule in RULES for w in rule.wordings]
    (flat,) = [row for row in lines if row[1] == "`flat`"]
    assert flat[2:] == ["1 + 1", "1 + 1"]


def test_the_table_in_the_docs_has_the_present_rules_and_networks() -> None:
    text = DOCS.read_text(encoding="utf-8").split("## How often the rules fire", 1)[1]
    (head, *rows) = [line for line in text.split("\n\n")[2].splitlines() if not line.startswith("| ---")]
    written = [[cell.strip() for cell in row.strip("|").split("|")][:2] for row in rows]
    assert written == [[rule.id, f"`{w}`"] for rule in RULES for w in rule.wordings]
    groups = Counter(case.group for case in cases())
    shown = [f"{group} ({count})" for group, count in groups.items()]
    assert [cell.strip() for cell in head.strip("|").split("|")][2:] == [*shown, f"all ({groups.total()})"]
