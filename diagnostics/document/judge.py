"""The rules of the verdicts (docs/verdicts.md says the same with the reasons)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diagnostics.document.figures import Figures
from diagnostics.document.rules_nodes import NODE_RULES
from diagnostics.document.rules_pairs import PAIR_RULES
from diagnostics.document.rules_whole import WHOLE_RULES
from diagnostics.document.verdict import Rule, Verdict

RULES: tuple[Rule, ...] = (*WHOLE_RULES, *NODE_RULES, *PAIR_RULES)


def judge(report: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on a report's figures, warnings first.

    Args:
        report: ``report.data``, or the loaded JSON. Rules whose sections are missing are passed over.
    """
    figures = Figures(report)
    found = []
    for rule in RULES:
        if all(section in report["sections"] for section in rule.needs):
            for wording, nodes, values, significant in rule.find(figures):
                numbers = {k: v for k, v in values.items() if v is None or isinstance(v, (int, float))}
                text = rule.wordings[wording].format(**values, **rule.threshold)
                found.append(Verdict(rule.id, wording, rule.level, nodes, text, numbers, significant))
    return sorted(found, key=lambda verdict: ("warning", "advice", "note").index(verdict.level))
