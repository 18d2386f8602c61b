"""One run of the ablation framework: the same for all contenders, and within its budget."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.shared.task import Problem, Task
from examples.studies.ablation import runner
from examples.studies.ablation.budget import Budget, Checkpoints
from examples.studies.ablation.contender import Finished, GradientStep, NotApplicable
from examples.studies.ablation.optimizers import CONTENDERS
from tests.examples.ablation import toys
from tests.examples.ablation.toys import BATCHES, FULL, LONG, contender


class Recorder:
    """Passes on what a contender is given: its task's parameters at the start, its batches and a random number."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def build(self, name: str, draws: int) -> Any:
        def make(task: Task) -> Any:
            seen = self.seen[name] = [p.detach().clone() for p in task.model.parameters()]
            seen.append(torch.rand(2))
            torch.rand(draws)  # what one contender draws is not to shift the batches or the start of another
            optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1 * (1 + draws))

            class Step(GradientStep):
                def step(self, batch: Any) -> float:
                    if len(seen) >= 20:
                        raise Finished("enough")
                    seen.extend(batch)
                    return super().step(batch)

            return Step(task, optimizer)

        return contender(name, make)


@pytest.mark.parametrize("problem", [FULL, BATCHES], ids=lambda p: p.name)
def test_all_contenders_start_alike_and_see_the_same_batches(problem: Problem) -> None:
    recorder = Recorder()
    for name, draws in (("a", 0), ("b", 7)):
        runner.run(problem, recorder.build(name, draws), {}, 5, LONG)
    runner.run(problem, recorder.build("other", 0), {}, 6, LONG)
    a, b, other = (recorder.seen[name] for name in ("a", "b", "other"))
    assert len(a) == len(b) >= 20
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
    assert not torch.equal(a[0], other[0])
    assert not torch.equal(a[-1], other[-1])


@pytest.mark.parametrize("checkpoints", [2, 40])
def test_measuring_changes_nothing(checkpoints: int) -> None:
    class Noisy(GradientStep):
        def step(self, batch: Any) -> float:
            for p in self.task.model.parameters():
                p.data += 0.01 * torch.randn_like(p)
            return super().step(batch)

    noisy = contender("noisy", lambda task: Noisy(task, torch.optim.SGD(task.model.parameters(), lr=0.1)))
    result = runner.run(FULL, noisy, {}, 0, Budget(1e6, 30), checkpoints=checkpoints)
    task = runner.fresh_task(FULL, 0, torch.device("cpu"), None)
    torch.manual_seed(0)
    alone = noisy.build(task)
    for batch in itertools.islice(task.batches, result.curve[-1][2]):
        alone.step(batch)
    assert result.final == task.measure()["objective"]


def test_budget_of_gradient_equivalents() -> None:
    sgd = contender("sgd", lambda task: GradientStep(task, torch.optim.SGD(task.model.parameters(), lr=0.1)))
    result = runner.run(FULL, sgd, {}, 0, Budget(1e6, 20.5))
    assert result.status == "budget spent"
    assert result.curve[0][:3] == (0.0, 0.0, 0)
    assert result.curve[-1][1:3] == (pytest.approx(20), 20)
    assert result.steps == 21  # the step that crosses is neither measured nor shown


def test_budget_of_steps() -> None:
    sgd = contender("sgd", lambda task: GradientStep(task, torch.optim.SGD(task.model.parameters(), lr=0.1)))
    budget = Budget(1e6, 1e6, steps=10)
    result = runner.run(FULL, sgd, {}, 0, budget)
    assert result.curve[-1][2] == 10
    assert budget.scaled(0.5).stated() == {"seconds": 5e5, "gradient_equivalents": 5e5, "steps": 5}
    assert Budget(1, 2).stated() == {"seconds": 1, "gradient_equivalents": 2}  # as in tables of before


def test_budget_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()  # a clock that goes one second a look: a step takes one
    monkeypatch.setattr("examples.studies.ablation.budget.time.perf_counter", lambda: float(next(now)))
    sgd = contender("sgd", lambda task: GradientStep(task, torch.optim.SGD(task.model.parameters(), lr=0.1)))
    result = runner.run(FULL, sgd, {}, 0, Budget(12, 1e6))
    assert all(point[0] <= 12 for point in result.curve)
    assert result.curve[-1][0] == 12
    assert result.curve[-1][2] == 11  # construction took one second as well
    assert result.steps == 12


def test_curves_are_short_and_end_with_the_budget() -> None:
    sgd = contender("sgd", lambda task: GradientStep(task, torch.optim.SGD(task.model.parameters(), lr=0.01)))
    curve = runner.run(FULL, sgd, {}, 0, Budget(1e6, 2000)).curve
    assert len(curve) <= 33
    assert curve[-1][2] == 2000
    assert [p[2] for p in curve] == sorted({p[2] for p in curve})


def test_checkpoints_are_geometric() -> None:
    checkpoints = Checkpoints(4, 1e-3)
    due = [i for i in range(1, 10001) if checkpoints.due(i / 10000)]
    assert due[:3] == [10, 100, 1000]
    assert all(i >= 9998 for i in due[3:])
    assert due[-1] == 10000


def test_divergence_is_recorded() -> None:
    wild = contender("wild", lambda task: GradientStep(task, torch.optim.SGD(task.model.parameters(), lr=1e9)))
    result = runner.run(FULL, wild, {}, 0, LONG)
    assert result.status == "diverged"
    assert "inf" in result.reason or "nan" in result.reason
    assert result.final == float("inf")


def test_reasons() -> None:
    def refuses(task: Task) -> Any:
        raise NotApplicable("not this one")

    class Breaks(GradientStep):
        def step(self, batch: Any) -> float:
            if self.task.model[0].weight.grad is not None:  # type: ignore[index, union-attr]
                raise RuntimeError("broken\nand more")
            return super().step(batch)

    breaks = contender("breaks", lambda task: Breaks(task, torch.optim.SGD(task.model.parameters(), lr=0.1)))
    refused = runner.run(FULL, contender("refuses", refuses), {}, 0, LONG)
    assert (refused.status, refused.reason) == ("does not apply", "NotApplicable: not this one")
    broken = runner.run(FULL, breaks, {}, 0, LONG)
    assert (broken.status, broken.reason, broken.steps) == ("stopped", "RuntimeError: broken", 1)
    assert runner.run(BATCHES, CONTENDERS["lbfgs"], {}, 0, LONG).status == "does not apply"


def test_cosine_schedule_goes_to_zero_with_the_budget() -> None:
    rates: list[float] = []

    class Step(GradientStep):
        def step(self, batch: Any) -> float:
            loss = super().step(batch)
            rates.append(self.optimizers[0].param_groups[0]["lr"])
            return loss

    def make(task: Task) -> Step:
        return Step(task, torch.optim.SGD(task.model.parameters(), lr=0.1), schedule="cosine")

    runner.run(FULL, contender("cosine", make), {}, 0, Budget(1e6, 8))
    assert rates[:5] == pytest.approx([0.05 * (1 + torch.tensor(torch.pi * i / 8).cos().item()) for i in range(5)])
    assert rates[8] == pytest.approx(0, abs=1e-9)


def test_a_step_without_end_is_interrupted() -> None:
    class Endless(GradientStep):
        def step(self, batch: Any) -> float:
            if self.task.model[0].weight.grad is None:  # type: ignore[index, union-attr]
                return super().step(batch)
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)

    endless = contender("endless", lambda task: Endless(task, torch.optim.SGD(task.model.parameters(), lr=0.1)))
    result = runner.run(FULL, endless, {}, 0, Budget(0.5, 1e6))
    assert (result.status, result.steps, result.curve[-1][2]) == ("budget spent", 1, 1)
    assert 0.55 < result.seconds < 5


def test_averages_are_what_is_measured_and_what_trains_goes_on() -> None:
    """Batch-norm statistics, too: those of the average while it is measured, then the others again."""

    class Averaging(torch.optim.SGD):
        shown = 0

        def eval(self) -> None:
            self.shown += 1
            for group in self.param_groups:
                for p in group["params"]:
                    p.data += 1

        def train(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data -= 1

    task = toys.build(0, torch.device("cpu"), None)
    task.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()
    optimizer = Averaging(task.model.parameters(), lr=0.01)
    task.evaluate_loss = lambda x: (task.model(x).square().mean(), task.model(x))
    step = GradientStep(task, optimizer)
    norm = task.model[1]
    batches = [torch.randn(8, 4, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        step.step(x)
    weights, running = task.model[0].weight.detach().clone(), norm.running_mean.clone()
    with step.shown():
        torch.testing.assert_close(task.model[0].weight.detach(), weights + 1)
        means = torch.stack([task.model[0](x).mean(0) for x in batches for _ in range(2)])
        torch.testing.assert_close(norm.running_mean, means.mean(0).detach())
    torch.testing.assert_close(task.model[0].weight.detach(), weights)
    assert torch.equal(norm.running_mean, running)
    assert norm.momentum == 0.1
    assert optimizer.shown == 1
