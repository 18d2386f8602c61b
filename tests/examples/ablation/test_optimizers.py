"""Every contender can be built, and trains."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.shared.task import Problem, Task
from examples.studies.ablation import runner
from examples.studies.ablation.budget import Budget
from examples.studies.ablation.contender import NotApplicable
from examples.studies.ablation.meter import Meter, loss_of
from examples.studies.ablation.optimizers import CONTENDERS
from tests.examples.ablation.toys import build


@pytest.mark.parametrize(
    "name",
    [
        "sgd", "adamw", "lbfgs", "muon", "mousse", "newton_muon", "adam_lbfgs", "ssbroyden", "scipy_lbfgsb",
        "scipy_trust_ncg",
    ],
)  # fmt: skip
def test_baselines_of_torch_and_scipy_train(name: str) -> None:
    _trains(name)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adahessian", "torch_optimizer"),
        ("shampoo", "torch_optimizer"),
        ("soap", "pytorch_optimizer"),
        ("psgd", "pytorch_optimizer"),
        ("normuon", "pytorch_optimizer"),
        ("schedule_free", "pytorch_optimizer"),
        ("prodigy", "pytorch_optimizer"),
        ("kfac", "curvlinops"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_baselines_of_other_packages_train(name: str, package: str) -> None:
    pytest.importorskip(package)
    _trains(name)


@pytest.mark.parametrize("name", [c.name for c in CONTENDERS.values() if c.ours])
def test_ours_train(name: str) -> None:
    _trains(name)


def _deep(seed: int, device: torch.device, data: Path | None) -> Task:
    task = build(seed, device, data)
    task.model.insert(2, nn.Linear(8, 8))  # type: ignore[operator]
    task.model.insert(3, nn.Tanh())  # type: ignore[operator]
    return task


def _trains(name: str) -> None:
    deep = Problem("deep", "a", "", "loss", _deep, 1.0)
    results = [runner.run(deep, CONTENDERS[name], s, 0, Budget(1e6, 100)) for s in CONTENDERS[name].grid[:2]]
    assert all(result.status != "does not apply" for result in results), [result.reason for result in results]
    start = results[0].curve[0][3]
    assert min(result.final for result in results) < 0.5 * start


def test_random_rows_are_those_of_the_problem() -> None:
    """In its strata, not of batches; evaluations are counted; no such problem, no contender."""
    torch.manual_seed(0)
    asked: list[int] = []
    task = build(0, torch.device("cpu"), None, batches=8)
    evaluate = task.residual_rows
    assert evaluate is not None
    task = replace(task, residual_rows=lambda rows: asked.append(len(rows)) or evaluate(rows))
    meter = Meter(1)
    attached = meter.attach(task)
    stepper = CONTENDERS["banded_rows"].build(attached, first=12, growth=1.0)
    before = loss_of(evaluate(torch.arange(32))).item()
    batch = next(task.batches)
    with meter.watching(attached):
        for _ in range(10):
            stepper.step(batch)
    assert set(asked) == {12}
    assert meter.evaluations == len(asked) > 10
    assert loss_of(evaluate(torch.arange(32))).item() < 0.5 * before
    with pytest.raises(NotApplicable, match="row by row"):
        CONTENDERS["banded_rows"].build(replace(task, residual_rows=None))


def test_kfac_preconditions() -> None:
    """On one linear layer of one output, where the second factor is a number, its step is along the Newton step's."""
    pytest.importorskip("curvlinops")

    def one(seed: int, device: torch.device, data: Path | None) -> Task:
        task = build(seed, device, data)
        x = next(task.batches)[0] * torch.tensor([1.0, 5.0, 0.2])
        net, loss = nn.Linear(3, 1, bias=False), nn.MSELoss()
        batch = (x, x @ torch.ones(3, 1))
        return Task(
            net,
            itertools.repeat(batch),
            lambda b: (loss(z := net(b[0]), b[1]), z),
            lambda: {"objective": loss(net(x), batch[1]).item()},
            True,
            loss,
            lambda b: b,
        )

    torch.manual_seed(0)
    task = one(0, torch.device("cpu"), None)
    x, _ = batch = next(task.batches)
    stepper = CONTENDERS["kfac"].build(task, lr=1.0, damping=1e-9, momentum=0.0)
    gradient = torch.autograd.grad(loss_of(task.evaluate_loss(batch)), task.model.weight)[0]  # type: ignore[arg-type]
    before = task.model.weight.detach().clone()  # type: ignore[union-attr, operator]
    stepper.step(batch)
    found = before - task.model.weight.detach()  # type: ignore[union-attr, operator]
    expected = gradient @ torch.linalg.inv(x.T @ x / len(x))
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine > 0.9999
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) < 0.9


def test_every_contender_has_six_settings_that_differ() -> None:
    for c in CONTENDERS.values():
        assert len({repr(sorted(s.items())) for s in c.grid}) == len(c.grid) >= 6, c.name
