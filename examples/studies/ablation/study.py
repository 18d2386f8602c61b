"""A study: contenders tuned alike on problems, then run on several seeds, each run once and for all.

Every contender is tuned with the same number of trials, the first of its grid, on a seed of its own and a stated
fraction of the budget; the trial with the lowest final objective is run with the full budget on each seed. Contenders
of this package are run with their defaults as well, untuned.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.shared.task import Problem
from examples.studies.ablation.budget import Budget
from examples.studies.ablation.contender import Contender, Settings
from examples.studies.ablation.runner import run
from examples.studies.ablation.table import Row, Table, key_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKPOINTS = 25
"""Points of a curve, about."""
TUNING_CHECKPOINTS = 5
"""Of a trial, whose end is all that counts."""


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Attributes:
        name: Of its table.
        problems: Names.
        contenders: Names.
        seeds: Of the runs that count.
        trials: Of each contender's grid.
        tuning_seed: Not among ``seeds``.
        tuning_fraction: Of the budget, for each trial.
        seconds: Budget of a run; None is each problem's own, times ``scale``.
        scale: See above.
        gradient_equivalents: Budget of a run.
        threads: Of torch.
        grids: By contender, in place of its own grid.
        budgets: Seconds by problem, in place of all of the above.
        steps: Budget of a run by problem, besides seconds: for comparisons a step or an epoch.
        untuned: Contenders of this package that run with their defaults only.
        variants: By label: ``contender`` and its settings, run untuned, for ablations.
    """

    name: str
    problems: Sequence[str]
    contenders: Sequence[str]
    seeds: Sequence[int]
    trials: int = 3
    tuning_seed: int = 0
    tuning_fraction: float = 0.5
    seconds: float | None = None
    scale: float = 1.0
    gradient_equivalents: float = 1e5
    threads: int = 1
    grids: Mapping[str, Sequence[Settings]] = field(default_factory=dict)
    budgets: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    untuned: Sequence[str] = ()
    variants: Mapping[str, Settings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"the tuning seed {self.tuning_seed} is one of the seeds: runs would be tuned on themselves."
            )
        if not 0 < self.tuning_fraction <= 1:
            raise ValueError(f"tuning_fraction must lie in (0, 1], got {self.tuning_fraction}.")
        strangers = sorted(set(self.untuned) - set(self.contenders))
        if strangers:
            raise ValueError(f"untuned= names {strangers}, which are not among the contenders.")

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a study's TOML file; its name is the file's if not given."""
        settings = {"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))}
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"{path} has unknown settings {unknown}; known are {sorted(known)}.")
        return cls(**settings)

    def budget(self, problem: Problem) -> Budget:
        seconds = self.budgets.get(problem.name, problem.seconds * self.scale if self.seconds is None else self.seconds)
        return Budget(seconds, self.gradient_equivalents, self.steps.get(problem.name))


@dataclass(frozen=True)
class Cell:
    """One row to be.

    Attributes:
        role: ``"tuning"``, ``"tuned"``, ``"default"`` or ``"variant"``.
        label: Of a variant, else empty.
    """

    problem: Problem
    contender: Contender
    settings: Settings
    role: str
    seed: int
    budget: Budget
    label: str = ""


class Session:
    """Runs a study into a table.

    Args:
        study: The study.
        table: Where rows go; what it has is not run again.
        problems: The problems there are, by name.
        contenders: The contenders there are, by name.
        only: Names of problems and contenders to restrict the study to, as ``problem``, ``contender`` or
            ``problem/contender``.
        device: Where to run.
        data: Folder of real data.
    """

    def __init__(
        self,
        study: Study,
        table: Table,
        problems: Mapping[str, Problem],
        contenders: Mapping[str, Contender],
        *,
        only: Sequence[str] = (),
        device: torch.device | None = None,
        data: Path | None = None,
    ) -> None:
        self.study, self.table, self.only, self.data = study, table, only, data
        self.device = torch.device("cpu") if device is None else device
        self.problems = [_named(problems, name, "problem") for name in study.problems]
        self.contenders = [_named(contenders, name, "contender") for name in study.contenders]
        self.variants = [
            (label, _named(contenders, str(settings.get("contender")), "contender"), settings)
            for label, settings in study.variants.items()
        ]
        for contender in self.contenders:
            there = len(self.grid(contender))
            if contender.name in study.untuned and not contender.ours:
                raise ValueError(f"{contender.name} is not of this package: it has to be tuned.")
            if contender.name not in study.untuned and there < study.trials:
                raise ValueError(f"{contender.name} has {there} settings, and the study has {study.trials} trials.")

    def grid(self, contender: Contender) -> Sequence[Settings]:
        return self.study.grids.get(contender.name, contender.grid)

    def pairs(self) -> list[tuple[Problem, Contender]]:
        return [
            (problem, contender)
            for problem in self.problems
            for contender in self.contenders
            if self._wanted(problem, contender)
        ]

    def estimate(self) -> tuple[int, float]:
        """Runs that are still to be made and their budgets' seconds together, which is the most that steps take.

        Setting up and measuring are not in it; contenders that do not apply take nothing.
        """
        missing: list[float] = []
        for problem, contender in self.pairs():
            tuning = [c for c in self.tuning(problem, contender) if self.table.find(self.key(c)) is None]
            missing += [c.budget.seconds for c in tuning]
            seeds = self.final(problem, contender, {}, "tuned")
            if tuning:
                missing += [c.budget.seconds for c in seeds]
            else:
                best = self.best(problem, contender)
                if best is not None:
                    missing += self._missing(self.final(problem, contender, best, "tuned"))
            if contender.ours:
                missing += self._missing(self.final(problem, contender, {}, "default"))
        missing += self._missing(self.variant_cells())
        return len(missing), sum(missing)

    def run(self) -> Table:
        """Run what is missing."""
        torch.set_num_threads(self.study.threads)
        runs, _ = self.estimate()
        with tqdm(total=runs, unit="run", disable=None) as bar:
            for problem, contender in self.pairs():
                for cell in self.tuning(problem, contender):
                    self._row(cell, bar)
                best = self.best(problem, contender)
                if best is not None:
                    for cell in self.final(problem, contender, best, "tuned"):
                        self._row(cell, bar)
                if contender.ours:
                    for cell in self.final(problem, contender, {}, "default"):
                        self._row(cell, bar)
            for cell in self.variant_cells():
                self._row(cell, bar)
        return self.table

    def tuning(self, problem: Problem, contender: Contender) -> list[Cell]:
        if contender.name in self.study.untuned:
            return []
        budget = self.study.budget(problem).scaled(self.study.tuning_fraction)
        trials = self.grid(contender)[: self.study.trials]
        return [Cell(problem, contender, s, "tuning", self.study.tuning_seed, budget) for s in trials]

    def best(self, problem: Problem, contender: Contender) -> Settings | None:
        """Settings of the trial with the lowest final objective; None if none applies. All trials must have run."""
        finals: list[tuple[float, int, Settings]] = []
        for i, cell in enumerate(self.tuning(problem, contender)):
            row = self.table.find(self.key(cell))
            assert row is not None
            if row["status"] != "does not apply":
                finals.append((float("inf") if row["final"] is None else row["final"], i, cell.settings))
        return min(finals, key=lambda entry: entry[:2])[2] if finals else None

    def final(self, problem: Problem, contender: Contender, settings: Settings, role: str) -> list[Cell]:
        budget = self.study.budget(problem)
        return [Cell(problem, contender, settings, role, seed, budget) for seed in self.study.seeds]

    def variant_cells(self) -> list[Cell]:
        return [
            Cell(problem, contender, _without_name(settings), "variant", seed, self.study.budget(problem), label)
            for problem in self.problems
            for label, contender, settings in self.variants
            if self._wanted(problem, contender)
            for seed in self.study.seeds
        ]

    def key(self, cell: Cell) -> str:
        return key_of(self._facts(cell))

    def _facts(self, cell: Cell) -> dict[str, Any]:
        return {
            "problem": cell.problem.name,
            "contender": cell.contender.name,
            "settings": dict(cell.settings),
            "role": cell.role,
            "label": cell.label,
            "seed": cell.seed,
            "budget": cell.budget.stated(),
            "threads": self.study.threads,
            "device": device_name(self.device),
            "versions": versions(cell.contender),
        }

    def _row(self, cell: Cell, bar: Any) -> Row:
        key = self.key(cell)
        found = self.table.find(key)
        if found is not None:
            return found
        bar.set_postfix_str(f"{cell.problem.name} {cell.contender.name} {cell.role} {cell.seed}")
        result = run(
            cell.problem,
            cell.contender,
            cell.settings,
            cell.seed,
            cell.budget,
            device=self.device,
            data=self.data,
            checkpoints=TUNING_CHECKPOINTS if cell.role == "tuning" else CHECKPOINTS,
        )
        row = self.table.append(
            {
                "key": key,
                "study": self.study.name,
                **self._facts(cell),
                "family": cell.problem.family,
                "trials": self.study.trials,
                "status": result.status,
                "reason": result.reason,
                "final": result.final,
                "measured": result.measured,
                "steps": result.steps,
                "seconds": result.seconds,
                "gradient_equivalents": result.gradient_equivalents,
                "unit": result.unit,
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                # Curves of trials are not shown.
                "curve": [] if cell.role == "tuning" else [list(point) for point in result.curve],
            }
        )
        bar.update()
        return row

    def _missing(self, cells: Sequence[Cell]) -> list[float]:
        return [cell.budget.seconds for cell in cells if self.table.find(self.key(cell)) is None]

    def _wanted(self, problem: Problem, contender: Contender) -> bool:
        names = {problem.name, contender.name, f"{problem.name}/{contender.name}"}
        return not self.only or bool(names & set(self.only))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else device.type


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(contender: Contender) -> dict[str, str]:
    """Of what the contender is made from."""
    packages = ["torch", *(["hessopt"] if contender.ours else []), *contender.packages]
    return {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _named(there: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in there:
        raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(there)}.")
    return there[name]


def _without_name(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name != "contender"}
