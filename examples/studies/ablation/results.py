"""What the table says: finals, time to target, and where this package's optimizers stand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from examples.studies.ablation.contender import Contender
from examples.studies.ablation.table import Row

Curve = Sequence[Sequence[float]]
SECONDS, WORK, STEPS, OBJECTIVE = range(4)
"""Columns of a curve."""

SOLVED = 1e-10
"""Objectives below this share of the first one count as equal: they are rounding errors of it."""


@dataclass(frozen=True)
class Entry:
    """A contender, in one role, on one problem: a row of the page's tables.

    Attributes:
        problem: Name.
        family: Of the problem.
        contender: Name.
        role: ``"tuned"``, ``"default"`` or ``"variant"``.
        label: Of a variant.
        ours: The contender is of this package.
        settings: Of its runs.
        finals: Last objective by seed; infinite where it diverged.
        curves: By seed.
        reasons: Of runs that did not spend their budget, with the status.
        test: The figure of held-out data at the last point, by seed; none where there are no such data.
        test_name: Of that figure.
    """

    problem: str
    family: str
    contender: str
    role: str
    label: str
    ours: bool
    settings: Mapping[str, object]
    finals: tuple[float, ...]
    curves: tuple[Curve, ...]
    reasons: tuple[str, ...]
    test: tuple[float, ...] = ()
    test_name: str = ""

    @property
    def final(self) -> float:
        """Median over seeds; infinite where nothing applies."""
        return median(self.finals) if self.finals else math.inf

    def to_target(self, target: float, column: int = SECONDS) -> tuple[float, ...]:
        """Seconds or gradient-equivalents to the target by seed; infinite where it is not reached."""
        return tuple(to_target(curve, target, column) for curve in self.curves)


def to_target(curve: Curve, target: float, column: int = SECONDS) -> float:
    """Where a curve first is at the target or below it, linearly between its points; infinite where it never is."""
    for i, point in enumerate(curve):
        if point[OBJECTIVE] <= target:
            if i == 0:
                return float(point[column])
            before = curve[i - 1]
            share = (before[OBJECTIVE] - target) / (before[OBJECTIVE] - point[OBJECTIVE])
            return float(before[column] + share * (point[column] - before[column]))
    return math.inf


def entries(rows: Iterable[Row], contenders: Mapping[str, Contender]) -> list[Entry]:
    """The rows that count, by problem, contender and role; of two rows for the same, the later."""
    latest: dict[tuple[str, ...], dict[int, Row]] = {}
    excuses: dict[tuple[str, ...], Row] = {}
    for row in rows:
        name = (row["problem"], row["contender"], row["role"], row["label"])
        if row["role"] == "tuning":
            if row["status"] == "does not apply":
                excuses[(row["problem"], row["contender"], "tuned", "")] = row
        else:
            latest.setdefault(name, {})[row["seed"]] = row
    found = [_entry(list(by_seed.values()), contenders) for by_seed in latest.values()]
    found += [_entry([row], contenders, role="tuned") for name, row in excuses.items() if name not in latest]
    order = {name: i for i, name in enumerate(contenders)}
    problems = list(dict.fromkeys(entry.problem for entry in found))
    roles = ("tuned", "default", "variant")
    return sorted(
        found,
        key=lambda e: (problems.index(e.problem), order.get(e.contender, len(order)), roles.index(e.role), e.label),
    )


def _entry(rows: Sequence[Row], contenders: Mapping[str, Contender], role: str | None = None) -> Entry:
    first = rows[-1]
    applicable = [row for row in rows if row["status"] != "does not apply"]
    reasons = [f"{row['status']}: {row['reason']}" for row in rows if row["status"] != "budget spent"]
    # The loss where there is nothing that says more, which problems state after it.
    names = [name for row in applicable for name in row["measured"] if name.startswith("test_")]
    return Entry(
        problem=first["problem"],
        family=first["family"],
        contender=first["contender"],
        role=first["role"] if role is None else role,
        label=first["label"],
        ours=first["contender"] in contenders and contenders[first["contender"]].ours,
        settings=first["settings"],
        finals=tuple(math.inf if row["final"] is None else row["final"] for row in applicable),
        curves=tuple(row["curve"] for row in applicable),
        reasons=tuple(dict.fromkeys(reasons)),
        test=tuple(row["measured"][names[-1]] for row in applicable if names[-1:] and names[-1] in row["measured"]),
        test_name=names[-1] if names else "",
    )


@dataclass(frozen=True)
class Verdict:
    """How one problem ended.

    Attributes:
        problem: Name.
        family: Of the problem.
        best_peer: The tuned peer with the lowest median final objective.
        target: That objective, or :data:`SOLVED` of the one that runs begin with if that is more.
        seconds: Median seconds to the target of the peer that gets there first.
        work: Median gradient-equivalents likewise.
        ratios: By entry of ours: its median seconds to the target, over ``seconds``; infinite where the median seed
            does not reach it.
    """

    problem: str
    family: str
    best_peer: Entry
    target: float
    seconds: float
    work: float
    ratios: Mapping[tuple[str, str, str], float]


def verdicts(found: Sequence[Entry]) -> list[Verdict]:
    """One for each problem that a tuned peer has run on."""
    result = []
    for problem in dict.fromkeys(entry.problem for entry in found):
        here = [entry for entry in found if entry.problem == problem]
        peers = [e for e in here if not e.ours and e.role == "tuned" and math.isfinite(e.final)]
        if not peers:
            continue
        best = min(peers, key=lambda e: e.final)
        target = max(best.final, SOLVED * median(curve[0][OBJECTIVE] for curve in best.curves))
        seconds = min(lower_median(e.to_target(target)) for e in peers)
        work = min(lower_median(e.to_target(target, WORK)) for e in peers)
        ratios = {
            (e.contender, e.role, e.label): _ratio(lower_median(e.to_target(target)) if e.curves else math.inf, seconds)
            for e in here
            if e.ours
        }
        result.append(Verdict(problem, best.family, best, target, seconds, work, ratios))
    return result


def _ratio(ours: float, peers: float) -> float:
    return math.inf if math.isinf(ours) else ours / max(peers, 1e-9)


@dataclass(frozen=True)
class Standing:
    """Where one of ours stands over all families.

    Attributes:
        families: Number of families.
        reached: Families in at least half of whose problems it reaches the tuned best peer's objective.
        ratio: Median over families of the median over problems of the ratio of seconds; infinite where it is not
            reached.
    """

    families: int
    reached: int
    ratio: float


def standing(found: Sequence[Verdict], wanted: Sequence[tuple[str, str, str]]) -> Standing:
    """Of one entry of ours, or of the best of several on each problem."""
    by_family: dict[str, list[float]] = {}
    for verdict in found:
        ratio = min((verdict.ratios.get(name, math.inf) for name in wanted), default=math.inf)
        by_family.setdefault(verdict.family, []).append(ratio)
    medians = [lower_median(ratios) for ratios in by_family.values()]
    reached = sum(math.isfinite(ratio) for ratio in medians)
    return Standing(len(medians), reached, median(medians) if medians else math.inf)


def lower_median(values: Sequence[float]) -> float:
    """The median; of an even number, the lower of the two in the middle, so that half of them reaching is enough."""
    return sorted(values)[(len(values) - 1) // 2]
