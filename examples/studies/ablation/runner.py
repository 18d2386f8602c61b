"""One run: a problem, a contender, its settings and a seed, within a budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from examples.shared.task import Problem, Task
from examples.studies.ablation.budget import GRACE, Budget, BudgetSpent, Checkpoints, Clock
from examples.studies.ablation.contender import Contender, Finished
from examples.studies.ablation.meter import Meter, operations_of_gradient

Point: TypeAlias = "tuple[float, float, int, float]"
"""Seconds, gradient-equivalents, steps, objective."""


@dataclass
class Run:
    """What came of a run.

    Attributes:
        status: ``"budget spent"``; ``"finished"`` (the optimizer stopped by itself); ``"diverged"`` (loss or objective
            not finite); ``"stopped"`` (an error after the first step); ``"does not apply"`` (an error before).
        reason: What the error or the optimizer said.
        curve: Every point is inside the budget. The first one is before the first step.
        measured: All figures of the problem at the last point.
        steps: Steps taken, also those beyond the budget.
        seconds: Inside of steps, those beyond the budget included.
        gradient_equivalents: Likewise.
        unit: Operations of one gradient-equivalent.
    """

    status: str = "budget spent"
    reason: str = ""
    curve: list[Point] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    gradient_equivalents: float = 0.0
    unit: int = 0

    @property
    def final(self) -> float:
        """The last objective; infinite where the run diverged or nothing was measured."""
        if self.status in ("diverged", "does not apply") or not self.curve or not math.isfinite(self.curve[-1][3]):
            return math.inf
        return self.curve[-1][3]


class _Diverged(Exception):
    """Loss or objective are not finite."""


def run(
    problem: Problem,
    contender: Contender,
    settings: Mapping[str, Any],
    seed: int,
    budget: Budget,
    *,
    device: torch.device | None = None,
    data: Path | None = None,
    checkpoints: int = 30,
) -> Run:
    """Run a contender on a problem; an error of the contender ends up in the result."""
    device = torch.device("cpu") if device is None else device
    return _Runner(problem, contender, settings, seed, budget, device, data, checkpoints).run()


class _Runner:
    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        settings: Mapping[str, Any],
        seed: int,
        budget: Budget,
        device: torch.device,
        data: Path | None,
        checkpoints: int,
    ) -> None:
        self.contender, self.settings, self.budget = contender, settings, budget
        self.meter = Meter(unit_of(problem, device, data))
        self.task = fresh_task(problem, seed, device, data)
        self.metered = self.meter.attach(self.task)
        self.clock = Clock(device)
        self.checkpoints = Checkpoints(checkpoints)
        self.seed = seed
        self._provisional = False
        self._shown: Callable[[], AbstractContextManager[None]] = nullcontext
        self.result = Run(unit=int(self.meter.unit))

    def run(self) -> Run:
        result = self.result
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of others' packages, at every run
            try:
                self._measure()
                with self.clock.interrupting(GRACE * self.budget.seconds):
                    self._steps()
            except BudgetSpent:
                pass
            except _Diverged as error:
                result.status, result.reason = "diverged", str(error)
            except Finished as end:
                result.status, result.reason = "finished", str(end)
            except Exception as error:
                result.status = "stopped" if result.steps else "does not apply"
                result.reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]
        result.seconds, result.gradient_equivalents = self.clock.seconds, self.meter.spent
        return result

    def _steps(self) -> None:
        torch.manual_seed(self.seed)  # so that no contender sees what another's construction drew
        with self.clock.running(), self.meter.watching(self.metered):
            stepper = self.contender.build(self.metered, **self.settings)
        self._shown = getattr(stepper, "shown", nullcontext)
        if hasattr(stepper, "after_iteration"):
            stepper.after_iteration = self._after_iteration
        while True:
            batch = next(self.metered.batches)
            if hasattr(stepper, "share"):
                stepper.share = self._share()
            with self.clock.running(), self.meter.watching(self.metered):
                loss = stepper.step(batch)
            self._after_step(loss)

    def _after_iteration(self, loss: float) -> None:
        """For methods whose step is a whole run: they call this after each of their iterations."""
        with self.clock.paused(), self.meter.unwatched():
            self._after_step(loss)

    def _after_step(self, loss: float) -> None:
        self.result.steps += 1
        share = self._share()
        if share > 1:
            raise BudgetSpent
        if not math.isfinite(loss):
            raise _Diverged(f"the loss is {loss} at step {self.result.steps}")
        if self.checkpoints.due(share):
            self._measure()

    def _share(self) -> float:
        return self.budget.share(self.clock.seconds, self.meter.spent, self.result.steps)

    def _measure(self) -> None:
        result = self.result
        replaces, self._provisional = self._provisional, not self.checkpoints.kept
        random = torch.get_rng_state()
        modes = {module: module.training for module in self.task.model.modules()}
        try:
            with self.meter.unwatched(), self._shown():
                measured = self.task.measure()
        finally:
            torch.set_rng_state(random)
            for module, mode in modes.items():
                module.training = mode
        objective = measured["objective"]
        if not math.isfinite(objective):
            raise _Diverged(f"the objective is {objective} after step {result.steps}")
        if replaces:
            result.curve.pop()
        result.measured = measured
        result.curve.append((self.clock.seconds, self.meter.spent, result.steps, objective))


def fresh_task(problem: Problem, seed: int, device: torch.device, data: Path | None) -> Task:
    """The task of a seed, the same for every contender."""
    if problem.needs_data and data is None:
        raise ValueError(f"the problem {problem.name!r} needs data: pass its folder with --data.")
    torch.manual_seed(seed)
    return problem.build(seed, device, data)


_units: dict[tuple[Callable[..., Task], str], int] = {}


def unit_of(problem: Problem, device: torch.device, data: Path | None) -> int:
    """Operations of a gradient of one mini-batch of the problem, counted once."""
    key = (problem.build, device.type)
    if key not in _units:
        task = fresh_task(problem, 0, device, data)
        _units[key] = operations_of_gradient(task, next(task.batches))
    return _units[key]
