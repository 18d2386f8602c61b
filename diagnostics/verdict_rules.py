"""The rules of the verdicts (docs/verdicts.md says the same with the reasons)."""

from __future__ import annotations

from diagnostics.reporting.figures import Figures
from diagnostics.reporting.rules_nodes import NODE_RULES
from diagnostics.reporting.rules_pairs import PAIR_RULES
from diagnostics.reporting.rules_whole import WHOLE_RULES
from diagnostics.verdicts import Rule

RULES: tuple[Rule, ...] = (*WHOLE_RULES, *NODE_RULES, *PAIR_RULES)

__all__ = ["RULES", "Figures"]
