"""The comparisons of ``examples/studies/theories``: what they compute by themselves, and that a stopped one goes on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics import predict_imbalance
from examples.studies.theories import conservation
from examples.studies.theories.continual import ARMS, FAINTEST, STRONGEST, Outcome, Penalty, run, tuned
from examples.studies.theories.continual_benchmarks import Benchmark, Task, digits, mlp, permuted
from examples.studies.theories.rows import Rows
from examples.studies.theories.spectral_newton import RATES, FlatMuon
from examples.studies.theories.spectral_newton import tuned as tuned_rate


def task_of(seed: int, classes: int = 10) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 64, generator=generator).double(), torch.randint(classes, (12,), generator=generator)
    return Task(x, y, x, y, torch.arange(classes))


def small(**changes: object) -> Benchmark:
    fields = {**vars(digits(3)), "epochs": 1, "remembered": 4, "samples": 8, **changes}
    return Benchmark(**fields)  # type: ignore[arg-type]


def test_penalty_is_the_sum_over_tasks() -> None:
    torch.manual_seed(0)
    net, penalty, terms = mlp(64).double(), Penalty(3.0), []
    torch.set_default_dtype(torch.float64)
    try:
        for seed in range(3):
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(torch.randn_like(p))
            task = task_of(seed)
            penalty.remember(net, task, task.x, task.y)
            fisher = [torch.zeros_like(p) for p in net.parameters()]
            for x, y in zip(task.x, task.y, strict=True):
                rows = torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), list(net.parameters()))
                fisher = [f + r.square() / 12 for f, r in zip(fisher, rows, strict=True)]
            terms.append((fisher, [p.detach().clone() for p in net.parameters()]))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    found = torch.autograd.grad(penalty(net), list(net.parameters()))
    for i, p in enumerate(net.parameters()):
        expected = sum((3.0 * fisher[i] * (p - center[i]) for fisher, center in terms), torch.zeros_like(p))
        torch.testing.assert_close(found[i], expected.detach(), rtol=1e-10, atol=1e-12)
        assert found[i].abs().max() > 1e-3


def test_outputs_of_other_tasks_do_not_count() -> None:
    task = Task(*[torch.zeros(0)] * 4, torch.tensor([2, 5]))
    z = torch.randn(6, 10, requires_grad=True)
    y = torch.tensor([2, 5, 2, 5, 2, 5])
    (gradient,) = torch.autograd.grad(task.loss(z, y), z)
    torch.testing.assert_close(task.loss(z, y), F.cross_entropy(z[:, [2, 5]], (y == 5).long()))
    assert not gradient[:, [0, 1, 3, 4, 6, 7, 8, 9]].any()


def test_permutations_keep_images_and_the_first_task() -> None:
    x, y = torch.randn(5, 8), torch.arange(5)
    tasks = permuted(x, y, x, y, 3, seed=0)
    assert torch.equal(tasks[0].x, x)
    for task in tasks[1:]:
        assert not torch.equal(task.x, x)
        assert torch.equal(task.x, task.x_test)  # one permutation for both
        assert torch.equal(task.x.sort().values, x.sort().values)


def watched(arm: str) -> tuple[Outcome, list[list[Tensor]]]:
    """A run with the weights after each task."""
    history: list[list[Tensor]] = []

    class Recorded(Task):
        def accuracy(self, net: nn.Module) -> float:
            history.append([p.detach().clone() for p in net.parameters()])
            return super().accuracy(net)

    plain = small().tasks

    def tasks(seed: int) -> list[Task]:
        return [Recorded(**vars(task)) for task in plain(seed)]

    found = run(small(tasks=tasks), arm, 0, strength=1e3 if arm == "EWC" else 0.0)
    return found, history[:3]


@pytest.fixture(scope="module")
def naive() -> tuple[Outcome, list[list[Tensor]]]:
    return watched("naive")


@pytest.mark.parametrize("arm", ARMS)
def test_arms_do_what_they_say(arm: str, naive: tuple[Outcome, list[list[Tensor]]]) -> None:
    found, history = watched(arm)
    moved = [[not torch.equal(a, b) for a, b in zip(*history[i : i + 2], strict=True)] for i in range(2)]
    if arm == "full freeze":
        assert moved == [[False] * 3] * 2
        assert found.bwt == 0
    elif arm == "partial freeze":
        assert moved == [[False, False, True]] * 2
    else:
        assert moved == [[True] * 3] * 2
    same = [all(map(torch.equal, mine, theirs)) for mine, theirs in zip(history, naive[1], strict=True)]
    assert same == [True, arm == "naive", arm == "naive"]  # the first task is learnt alike; runs are seeded
    assert 0 < found.acc < 100
    assert 0 < found.learnt < 100


def test_rows_go_on_where_they_were(tmp_path: Path) -> None:
    path, calls = tmp_path / "rows.jsonl", []

    def new(value: float) -> Callable[[], dict[str, float]]:
        def call() -> dict[str, float]:
            calls.append(value)
            return {"acc": value}

        return call

    rows = Rows(path)
    assert rows.get(new(1.23456), arm="naive", seed=0) == {"acc": 1.2346}
    assert rows.get(new(2.0), arm="naive", seed=1) == {"acc": 2.0}
    assert rows.get(new(3.0), arm="naive", seed=0) == {"acc": 1.2346}
    again = Rows(path)
    assert again.get(new(4.0), arm="naive", seed=1) == {"acc": 2.0}
    assert calls == [1.23456, 2.0]
    assert len(path.read_text().splitlines()) == 2


def test_the_grid_of_ewc_is_extended_to_have_the_best_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(best: int) -> dict[float, float]:
        def outcome(*arguments: object) -> Outcome:
            strength = arguments[-1]
            assert isinstance(strength, float)
            power = round(torch.tensor(strength).log10().item())
            return Outcome(-abs(power - best), 0.0, 0.0, 0.0)

        monkeypatch.setattr("examples.studies.theories.continual.outcome", outcome)
        return tuned(small(), Rows())

    for best in (-1, 1, 4):
        found = scored(best)
        assert max(found, key=lambda penalty: found[penalty]) == pytest.approx(10.0**best)
        assert min(found) < 10.0**best < max(found)
    assert min(scored(FAINTEST - 3)) == pytest.approx(10.0**FAINTEST)  # an end there is
    assert max(scored(STRONGEST + 3)) == pytest.approx(10.0**STRONGEST)


@pytest.mark.parametrize("best", [2e-3, 0.02, 0.5])
def test_learning_rates_are_tried_until_the_best_is_inside(best: float) -> None:
    tried = []

    def trial(rate: float) -> float:
        tried.append(rate)
        return abs(torch.tensor(rate / best).log().item())

    assert tuned_rate(trial, 0.02) == pytest.approx(best)
    assert len(tried) == len(set(tried))
    assert min(tried) < best < max(tried)
    assert all(any(rate == pytest.approx(known) for known in RATES) for rate in tried)


def test_flat_muon_moves_convolutions_as_their_matrices() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    flat, plain = FlatMuon([kernel], 0.1), torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        kernel.grad = torch.randn(4, 3, 2, 2)
        matrix.grad = kernel.grad.flatten(1).clone()
        flat.step()
        plain.step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


@pytest.mark.slow
def test_published_imbalance_is_reproduced_in_all_its_digits() -> None:
    """Measured and predicted S(η) of arXiv 2604.07405's "hessian_4way", ReLU and squared error, η = 0.01."""
    measured, guess = conservation.PUBLISHED["relu", "mse"][conservation.RATES.index(0.01)]
    drifts, predictions = [], []
    for seed in conservation.SEEDS:
        model, batch = conservation.setting("relu", seed)
        found = predict_imbalance(model, batch, conservation.mse, 0.01, 2000, method="hessian")
        predictions.append(found.gradient_sum.item())
        drifts.append(conservation.drift(model, batch, conservation.mse, 0.01, 2000))
    assert statistics.fmean(drifts) / 0.01**2 == pytest.approx(measured, rel=5e-5)
    assert statistics.fmean(predictions) == pytest.approx(guess, rel=5e-5)


def test_growth_of_exponents_is_fitted_above_one() -> None:
    widths = (16, 32, 64)
    assert conservation.growing(widths, [1 + 0.01 * width**1.5 for width in widths]) == pytest.approx(1.5)
    assert conservation.growing((8, *widths), [0.9, 1.16, 1.32, 1.64]) == pytest.approx(1.0)
    assert math.isnan(conservation.growing(widths, [0.9, 1.0, 1.1]))
