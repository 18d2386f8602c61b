"""The monitor measures what it says, when it says, and leaves the training bit for bit as it would be."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.training.monitor import METRICS, Metric, Monitor, MonitorLimits
from diagnostics.training.writers import Measurement
from tests.helpers.networks import Chain
from tests.helpers.peak import Peak


class _Noisy(nn.Module):
    """Batch statistics and dropout: what a careless measurement would change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.tanh(self.norm(self.first(x))), 0.3, self.training)
        return self.head(torch.tanh(self.second(h)))


def _data(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x.to(device), torch.arange(12, device=device) % 3


def _train(model: nn.Module, steps: int, monitor: Monitor | None, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = _data(device)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if monitor is not None:
            monitor.step((x, y))
        optimizer.step()
    modes = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"state": state, "modes": modes, "random": torch.get_rng_state(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("training_mode", [False, True])
def test_training_is_bit_for_bit_the_same(training_mode: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    model = _Noisy().double().to(device)
    model.norm.eval()  # a module in a mode of its own
    watched = copy.deepcopy(model)
    metrics: tuple[Metric, ...] = ("resonance", "coupling", "gn_gap", "sharpness", "negative")
    monitor = Monitor(watched, F.cross_entropy, every=2, metrics=metrics, probes=4, training_mode=training_mode)
    alone, together = _train(model, 5, None, device), _train(watched, 5, monitor, device)
    assert len(monitor.history) == 3
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_measures_what_the_exact_methods_give(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Chain(4, 5, 5, 3).double().to(device)
    batch = _data(device)
    found = Monitor(model, F.cross_entropy, probes=30, lr=0.5).measure(batch)
    graph = diagnostics.capture(model, batch[0], lambda z: F.cross_entropy(z, batch[1]))
    exact = diagnostics.metrics(diagnostics.hessian_blocks(graph))  # nodes are smaller than 30: no noise
    eigenvalues = torch.linalg.eigvalsh(diagnostics.parameter_hessian(graph))
    pairs = torch.ones(2, 2, dtype=torch.bool).triu()
    assert found.table is not None
    assert found.values["resonance"] == pytest.approx(exact.resonance[pairs].mean().item(), rel=1e-10)
    assert found.values["coupling"] == pytest.approx(exact.coupling[0, 1].item(), rel=1e-10)
    assert found.values["stable_rank"] == pytest.approx(exact.stable_rank[pairs].mean().item(), rel=1e-3)
    assert found.values["gn_gap"] == pytest.approx(exact.gap_ratio, rel=1e-10)
    assert found.values["sharpness"] == pytest.approx(eigenvalues[-1].item(), rel=1e-2)
    assert found.values["negative"] == pytest.approx(-eigenvalues[0].item(), rel=1e-2)
    assert found.values["sharpness_to_limit"] == pytest.approx(found.values["sharpness"] * 0.5 / 2)


class _Quadratic(nn.Module):
    """The Hessian is diagonal: 172, −27, and zeros, of which a random vector is nearly all."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        z: Tensor = (86 * w[:1].square() - 13.5 * w[1:2].square()).sum() + 0 * w.sum() + x
        return z


@pytest.mark.parametrize("n", [1000, 200_000])
@pytest.mark.parametrize("metrics", [("sharpness", "negative"), ("negative",), ("sharpness",)])
def test_a_negative_eigenvalue_beside_a_large_positive_one_is_measured(n: int, metrics: tuple[Metric, ...]) -> None:
    x = torch.zeros(1, 1)
    monitor = Monitor(_Quadratic(n), lambda z, _: z.sum(), every=1, metrics=metrics)
    for _ in range(2):  # the second starts from the eigenvectors of the first
        found = monitor.step((x, x))
        assert found is not None
        expected = {"sharpness": 172.0, "negative": 27.0}
        assert found.values == {name: pytest.approx(expected[name], rel=1e-2) for name in metrics}
        assert not found.notes


def test_what_has_not_converged_is_a_lower_bound_and_noted() -> None:
    torch.manual_seed(0)
    model, batch = Chain(4, 9, 9, 3).double(), _data()
    graph = diagnostics.capture(model, batch[0], lambda z: F.cross_entropy(z, batch[1]))
    eigenvalues = torch.linalg.eigvalsh(diagnostics.parameter_hessian(graph))
    for most in (2, 4, 8, 100):
        monitor = Monitor(
            model, F.cross_entropy, metrics=("sharpness", "negative"), limits=MonitorLimits(max_products=most)
        )
        found = monitor.measure(batch)
        assert found.values["sharpness"] <= eigenvalues[-1].item() * (1 + 1e-12)
        assert found.values["negative"] <= -eigenvalues[0].item() * (1 + 1e-12)
        if most == 2:
            assert "sharpness and negative not converged after 2 products: lower bounds" in found.notes
        if not found.notes:
            assert found.values["sharpness"] == pytest.approx(eigenvalues[-1].item(), rel=1e-2)
            assert found.values["negative"] == pytest.approx(-eigenvalues[0].item(), rel=1e-2)
    assert not found.notes


def test_memory_is_limited() -> None:
    torch.manual_seed(0)
    model, batch = Chain(4, 40, 40, 3).double(), _data()
    vector = 8 * sum(p.numel() for p in model.parameters())
    monitor = Monitor(model, F.cross_entropy, limits=MonitorLimits(memory_limit=20 * vector, max_products=200))
    with Peak() as peak:
        found = monitor.measure(batch)
    assert peak.bytes <= 34 * vector
    assert found.values["sharpness"] == pytest.approx(
        Monitor(model, F.cross_entropy, metrics=["sharpness"]).measure(batch).values["sharpness"], rel=1e-2
    )
    few = Monitor(model, F.cross_entropy, metrics=["resonance"], limits=MonitorLimits(memory_limit=24_000)).measure(
        batch
    )
    assert "probes, to fit into the memory" in few.notes[0]
    for metric in ("resonance", "sharpness"):
        with pytest.raises(diagnostics.MemoryBudgetError):
            Monitor(model, F.cross_entropy, metrics=[metric], limits=MonitorLimits(memory_limit=1000)).measure(batch)  # type: ignore[list-item]


def test_measures_every_so_many_steps_and_only_what_was_asked_for() -> None:
    torch.manual_seed(0)
    monitor = Monitor(Chain(4, 5, 3).double(), F.cross_entropy, every=3, metrics=["gn_gap"], keep_tables=False)
    found = [monitor.step(_data()) for _ in range(8)]
    assert [m is not None for m in found] == [True, False, False, True, False, False, True, False]
    assert [m.step for m in monitor.history] == [0, 3, 6]
    assert all(set(m.values) == {"gn_gap"} and m.table is None for m in monitor.history)


def test_overhead_puts_measurements_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr("diagnostics.training.monitor.time.perf_counter", lambda: clock[0])
    torch.manual_seed(0)
    monitor = Monitor(
        Chain(4, 5, 3).double(), F.cross_entropy, every=1, metrics=["gn_gap"], limits=MonitorLimits(overhead=0.1)
    )
    measure = monitor.measure

    def slow(batch: Any, step: int | None = None) -> Measurement:
        measurement = measure(batch, step)
        clock[0] += 1.0  # seconds that a measurement takes
        monitor._spent += 1.0
        object.__setattr__(measurement, "seconds", 1.0)
        return measurement

    monkeypatch.setattr(monitor, "measure", slow)
    for _ in range(100):
        monitor.step(_data())
        clock[0] += 0.5
    assert 4 <= len(monitor.history) <= 6  # of about 56 seconds, a tenth
    assert monitor._spent <= 0.1 * clock[0] + 1
    assert caplog.text.count("the measurement is put off") == 1
    first = monitor.history[0]
    assert first.due == first.step == 0
    assert not first.notes
    for before, found in itertools.pairwise(monitor.history):
        assert found.due == before.step + 1 < found.step
        assert f"due at step {found.due}, put off for {found.step - found.due} steps" in found.notes[0]
        assert found.to_dict()["due"] == found.due
    assert monitor.waiting == 100 - 1 - monitor.history[-1].step
    assert monitor.measure(_data()).due == 100  # one that was asked for is not the one that waits


def test_short_runs_are_measured_when_due_and_long_ones_take_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("diagnostics.training.monitor.time.perf_counter", lambda: clock[0])
    torch.manual_seed(0)
    monitor = Monitor(Chain(4, 5, 3).double(), F.cross_entropy, every=5, metrics=["sharpness"])
    eigenvalues = monitor._eigenvalues

    def slow(*arguments: Any) -> dict[str, float]:
        clock[0] += 6.0
        return eigenvalues(*arguments)

    monkeypatch.setattr(monitor, "_eigenvalues", slow)
    for _ in range(600):
        monitor.step(_data())
        clock[0] += 1.0
    assert [m.step for m in monitor.history[:5]] == [0, 5, 10, 15, 20]  # 30 seconds
    assert len(monitor.history) > 6
    assert monitor.history[5].due == 25
    for m in monitor.history[5:]:
        assert m.due < m.step
    assert sum(m.seconds for m in monitor.history) <= max(30.0, 0.1 * clock[0])


def test_abrupt_changes_and_instability_are_flagged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Chain(4, 5, 5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, F.cross_entropy, every=1, metrics=["resonance", "gn_gap", "sharpness"])
    stop = monitor.attach(optimizer, _data())
    with caplog.at_level(logging.WARNING, logger="diagnostics.training.monitor"):
        for i in range(12):
            if i == 8:
                with torch.no_grad():
                    for p in model[-1].parameters():
                        p.mul_(20)
                optimizer.param_groups[0]["lr"] = 1e6
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
    stop()
    optimizer.step()
    assert len(monitor.history) == 12
    assert [m.step for m in monitor.history if m.changes] == [8]
    assert {"resonance", "sharpness"} <= {change.name for change in monitor.history[8].changes}
    assert "abrupt change at step 8: " in caplog.text
    assert caplog.text.count("times the largest that the step size is stable at") == 1


def test_momentum_raises_the_limit_and_other_optimizers_have_none() -> None:
    torch.manual_seed(0)
    model = Chain(4, 5, 3).double()
    for optimizer, limit in (
        (torch.optim.SGD(model.parameters(), lr=0.1), 20.0),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 38.0),
        (torch.optim.Adam(model.parameters(), lr=0.1), None),
    ):
        monitor = Monitor(model, F.cross_entropy, metrics=["sharpness"])
        monitor.attach(optimizer, _data())()
        values = monitor.measure(_data()).values
        if limit is None:
            assert "sharpness_to_limit" not in values
        else:
            assert values["sharpness_to_limit"] == pytest.approx(values["sharpness"] / limit)


def test_writes_to_files_tensorboard_and_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.scalars.append((tag, scalar_value, global_step))

    board = Writer()
    seen: list[Measurement] = []
    path = tmp_path / "curvature.jsonl"
    monitor = Monitor(Chain(4, 5, 3).double(), F.cross_entropy, every=1, writers=[path, board, seen.append])
    monitor.step(_data())
    monitor.step(_data())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[1]["gn_gap"] == monitor.history[1].values["gn_gap"]
    assert seen == monitor.history
    assert ("curvature/sharpness", monitor.history[1].values["sharpness"], 1) in board.scalars
    assert len(board.scalars) == 2 * len(METRICS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"metrics": ["sharpnes"]}, "metrics must be some of"),
        ({"metrics": []}, "metrics must be some of"),
        ({"writers": ["no/such/folder/file.jsonl"]}, "there is no folder"),
    ],
)
def test_arguments_are_checked(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(Chain(4, 5, 3), F.cross_entropy, **bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"overhead": 2.0}, r"in \(0, 1\]"),
        ({"overhead": "none"}, r"in \(0, 1\]"),
        ({"memory_limit": 0}, "number of bytes"),
    ],
)
def test_limits_are_checked(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonitorLimits(**bad)


def test_bad_batches_and_models_are_refused() -> None:
    model = Chain(4, 5, 3).double()
    monitor = Monitor(model, F.cross_entropy)
    with pytest.raises(diagnostics.DiagnosticsError, match="a batch is a pair"):
        monitor.step(torch.randn(3, 4))
    with pytest.raises(TypeError, match="a writer is"):
        Monitor(model, F.cross_entropy, writers=[3])  # type: ignore[list-item]
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(diagnostics.CaptureError, match="has not seen an input"):
        Monitor(lazy, F.cross_entropy)
