"""Verdicts: what the figures of a report mean, in plain words, each by a rule that docs/verdicts.md states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Level: TypeAlias = Literal["note", "advice", "warning"]


@dataclass(frozen=True)
class Verdict:
    """One statement about a network, with the figures behind it.

    Attributes:
        rule: Id of the rule, as in docs/verdicts.md.
        wording: Which of the rule's wordings.
        level: ``"note"``, ``"advice"`` (there is something to choose) or ``"warning"`` (something is wrong).
        nodes: Names of the nodes that it is about; empty: the whole network.
        text: The statement.
        figures: The numbers in it, by name; null where a number is not known.
        significant: Whether the 95 % interval of the figures lies beyond the threshold as a whole.
    """

    rule: str
    wording: str
    level: Level
    nodes: tuple[str, ...]
    text: str
    figures: Mapping[str, float | None]
    significant: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON (but for NaN and infinity)."""
        return asdict(self) | {"nodes": list(self.nodes), "figures": dict(self.figures)}

    def __str__(self) -> str:
        mark = {"note": "·", "advice": "→", "warning": "!"}[self.level]
        return f"{mark} {self.text}" + (
            "" if self.significant else " (not significant: the 95 % interval reaches the threshold)"
        )


Finding: TypeAlias = tuple[str, tuple[str, ...], Mapping[str, Any], bool]
"""Wording, nodes, what is filled into it and the figures (numbers among it), significant."""


@dataclass(frozen=True)
class Rule:
    """What makes a verdict.

    Attributes:
        id: Its name.
        level: Of its verdicts.
        condition: The rule in words.
        threshold: Numbers in the condition.
        reference: Where it comes from.
        wordings: Templates by name.
        find: ``find(figures)`` yields what it finds, in the figures of a report.
        needs: Sections that it reads.
    """

    id: str
    level: Level
    condition: str
    threshold: Mapping[str, float]
    reference: str
    wordings: Mapping[str, str]
    find: Callable[[Any], Iterator[Finding]]
    needs: tuple[str, ...]
