"""The monitor measures what it says, when it says, and leaves the training bit for bit as it would be."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
from diagnostics.monitor import METRICS, Measurement, Metric, Monitor
from tests.networks import Chain


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
    found = Monitor(model, F.cross_entropy, probes=30, max_products=60, lr=0.5).measure(batch)
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


def test_measures_every_so_many_steps_and_only_what_was_asked_for() -> None:
    torch.manual_seed(0)
    monitor = Monitor(Chain(4, 5, 3).double(), F.cross_entropy, every=3, metrics=["gn_gap"], keep_tables=False)
    found = [monitor.step(_data()) for _ in range(8)]
    assert [m is not None for m in found] == [True, False, False, True, False, False, True, False]
    assert [m.step for m in monitor.history] == [0, 3, 6]
    assert all(set(m.values) == {"gn_gap"} and m.table is None for m in monitor.history)


def test_overhead_puts_measurements_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("diagnostics.monitor.time.perf_counter", lambda: clock[0])
    torch.manual_seed(0)
    monitor = Monitor(Chain(4, 5, 3).double(), F.cross_entropy, every=1, metrics=["gn_gap"], overhead=0.1)
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


def test_abrupt_changes_and_instability_are_flagged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Chain(4, 5, 5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, F.cross_entropy, every=1, metrics=["resonance", "gn_gap", "sharpness"])
    stop = monitor.attach(optimizer, _data())
    with caplog.at_level(logging.WARNING, logger="diagnostics.monitor"):
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
        ({"overhead": 2.0}, r"in \(0, 1\]"),
        ({"writers": ["no/such/folder/file.jsonl"]}, "there is no folder"),
    ],
)
def test_arguments_are_checked(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(Chain(4, 5, 3), F.cross_entropy, **bad)


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
