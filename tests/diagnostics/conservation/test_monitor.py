"""The drift of conserved quantities is the identity to rounding wherever it is called exact, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnostics.conservation.monitor import ConservationMonitor
from diagnostics.errors import DiagnosticsError
from tests.helpers.conservation import STEPS, TOLERANCE, check, data_of, mlp, train


def _norms(model: nn.Module) -> list[float]:
    return [m.weight.square().sum().item() for m in model if isinstance(m, nn.Linear)]  # type: ignore[union-attr]


def test_full_batch_relu_is_eta_squared_times_s(device: torch.device) -> None:
    model = mlp(nn.ReLU()).to(device)
    before = _norms(model)
    report = train(model, data_of(device), lr=0.2)
    after = _norms(model)
    check(report, quantities=2)
    for i, drift in enumerate(report.drifts):  # the paper's quantity and its S, computed apart from the monitor
        expected = after[i + 1] - after[i] - before[i + 1] + before[i]
        assert drift.drift.sum().item() == pytest.approx(expected, abs=1e-11)
        assert (0.2**2 * drift.gradient_sum).sum().item() == pytest.approx(expected, abs=1e-11)


def test_mean_squared_error_and_identity_activation() -> None:
    model, (x, _) = mlp(nn.Identity()), data_of()
    target = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ConservationMonitor(model, x, opt)
    for _ in range(STEPS):
        opt.zero_grad()
        F.mse_loss(model(x), target).backward()
        opt.step()
        monitor.step()
    check(monitor.report(), quantities=2)


def test_mini_batches() -> None:
    check(train(mlp(nn.ReLU()), data_of(), batch=8), quantities=2)


def test_leaky_relu() -> None:
    check(train(mlp(nn.LeakyReLU(0.2)), data_of(), batch=8), quantities=2)


def test_biases_belong_to_the_invariant() -> None:
    model = mlp(nn.ReLU(), bias=True)
    naive = {"0": model[0].bias, "2": model[2].bias}  # type: ignore[dict-item]
    before = {name: b.square().sum().item() for name, b in naive.items()}
    report = train(model, data_of())
    check(report, quantities=2)
    for drift, (name, bias) in zip(report.drifts, naive.items(), strict=True):
        without = bias.square().sum().item() - before[name]  # what the invariant without biases is off by
        assert abs(without) > 100 * TOLERANCE
        assert drift.quantity.name.startswith(name)


def test_one_law_per_neuron() -> None:
    model = mlp(nn.ReLU(), bias=True)
    first, second = model[0], model[2]

    def laws() -> Tensor:
        out, into, bias = second.weight.square().sum(0), first.weight.square().sum(1), first.bias.square()  # type: ignore[operator, union-attr]
        return (out - into - bias).detach()

    before = laws()
    report = train(model, data_of())
    drift = report["0 → 2"]
    assert drift.quantity.channels == 12
    torch.testing.assert_close(drift.start, before, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(drift.drift, laws() - before, rtol=0, atol=1e-13)
    torch.testing.assert_close(drift.drift, 0.1**2 * drift.gradient_sum, rtol=0, atol=TOLERANCE)
    assert drift.drift.abs().max() > 1e-5


def test_convolutions_with_max_and_average_pooling(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 4, 3),
    ).double().to(device)  # fmt: skip
    report = train(model, data_of(device, 2, 14, 14), batch=16)
    check(report, quantities=2)
    assert [d.quantity.channels for d in report.drifts] == [4, 6]


def test_transposed_convolution_and_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.ConvTranspose1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(42, 3),
    ).double()  # fmt: skip
    check(train(model, data_of()), quantities=2)
    words = nn.Sequential(nn.Embedding(7, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3, bias=False)).double()
    tokens = torch.randint(7, (32, 4), generator=torch.Generator().manual_seed(0))
    report = train(words, (tokens, data_of()[1]))
    assert report.drifts[0].quantity.channels == 1  # features of a token are not whole blocks of columns
    check(report, quantities=1)


class _Residual(nn.Module):
    """A stream that three layers write to and three read, with a gate in one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gate, self.value, self.out, self.head = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.down(self.up(h).relu())
        return self.head(h + self.out(self.gate(h).relu() * self.value(h)))


def test_residual_stream_and_gates() -> None:
    torch.manual_seed(0)
    report = train(_Residual().double(), data_of(), lr=0.05)
    assert {d.quantity.name: d.quantity.channels for d in report.drifts} == {
        "stem + down + out → up, gate, value, head": 8,
        "up → down": 12,
        "gate → out": 5,
        "value → out": 5,
    }
    check(report, quantities=4)


def test_layers_before_batch_norm_grow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12, eps=1e-30), nn.ReLU(), nn.Linear(12, 9, bias=False),
        nn.LayerNorm(9, eps=1e-30, elementwise_affine=False), nn.ReLU(), nn.Linear(9, 3),
    ).double()  # fmt: skip
    weight = model[0].weight
    before = weight.square().sum().item()
    report = train(model, data_of(), batch=16)
    check(report, quantities=3)
    assert [(d.quantity.name, d.quantity.kind, d.quantity.channels) for d in report.drifts] == [
        ("0", "scale-invariant", 12),
        ("1 → 3", "balanced", 12),
        ("3", "scale-invariant", 1),
    ]
    grown = report["0"]
    assert (grown.drift > 0).all()
    torch.testing.assert_close(grown.drift, 0.1**2 * grown.gradient_sum, rtol=0, atol=TOLERANCE)
    bias = model[0].bias.square().sum().item() - grown.start.sum().item() + before
    assert weight.square().sum().item() - before + bias == pytest.approx(grown.drift.sum().item(), abs=1e-11)


def test_epsilon_of_batch_norm_is_not_exact_but_nearly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).double()
    report = train(model, data_of())
    drift = report["0"]
    assert not drift.exact
    assert "eps=1e-05 of BatchNorm1d '1'" in drift.reason
    assert drift.residual is not None
    assert TOLERANCE < drift.residual.abs().max() < 1e-2 * drift.drift.abs().max()
    assert report["1 → 3"].exact


@pytest.mark.parametrize(("activation", "operation"), [(nn.Tanh(), "Tanh"), (nn.GELU(), "Gelu")])
def test_activations_that_are_not_homogeneous(activation: nn.Module, operation: str) -> None:
    report = train(mlp(activation), data_of())
    assert report.healthy  # nothing exact is broken
    for drift in report.drifts:
        assert not drift.exact
        assert operation in drift.reason
        assert drift.residual is not None
        assert drift.residual.abs().sum() > 0.05 * drift.drift.abs().sum()
    assert "not exact" in str(report)


def test_frozen_weights_are_not_exact() -> None:
    model = mlp(nn.ReLU(), bias=True)
    model[0].bias.requires_grad_(False)
    quantity = ConservationMonitor(model, data_of()[0]).quantities[0]
    assert not quantity.exact
    assert "'0.bias' is frozen" in quantity.reason


class _Noisy(nn.Module):
    """Batch statistics, dropout and a buffer: what a careless monitor would change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training)
        return self.head(self.second(h).relu())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_is_bit_for_bit_the_same(momentum: float, device: torch.device) -> None:
    torch.manual_seed(0)
    alone = _Noisy().to(device)
    alone.second.eval()
    watched = copy.deepcopy(alone)
    x, y = data_of(device)
    ends = []
    for model in (alone, watched):
        torch.manual_seed(3)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        monitor = ConservationMonitor(model, x.float()) if model is watched else None
        if monitor is not None:
            monitor.attach(opt)
        for _ in range(5):
            opt.zero_grad()
            F.cross_entropy(model(x.float()), y).backward()
            opt.step()
            if monitor is not None:
                monitor.report()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        ends.append([model.state_dict(), grads, modes, torch.get_rng_state(), opt.state_dict()])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_single_precision_is_healthy_too() -> None:
    model, (x, y) = mlp(nn.ReLU()).float(), data_of()
    report = train(model, (x.float(), y), momentum=0.5)
    assert report.healthy
    assert all(d.exact for d in report.drifts)
    assert report.drifts[0].start.dtype == torch.float64


def test_detached_monitor_takes_up_nothing() -> None:
    model, (x, y) = mlp(nn.ReLU()), data_of()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ConservationMonitor(model, x)
    monitor.attach(opt)()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    assert monitor.report().drifts[0].steps == 0
    assert not monitor.report().healthy  # the weights moved, and nobody told


def test_reports_are_readable_and_serialisable() -> None:
    report = train(mlp(nn.ReLU()), data_of(), steps=5)
    text = str(report)
    assert "conserved quantities after 5 steps" in text
    assert "0 → 2" in text
    assert report.to_dict()["0 → 2"]["steps"] == 5
    with pytest.raises(KeyError, match="no quantity 'x'"):
        report["x"]


def test_errors_name_the_cause() -> None:
    model, (x, y) = mlp(nn.ReLU()), data_of()
    with pytest.raises(DiagnosticsError, match="no two layers of Sequential follow"):
        ConservationMonitor(nn.Sequential(nn.Linear(6, 3).double()), x)
    with pytest.raises(ValueError, match="at least 0"):
        ConservationMonitor(model, x, decoupled_weight_decay=-1.0)
    monitor = ConservationMonitor(model, x)
    with pytest.raises(DiagnosticsError, match="pass the optimizer"):
        monitor.step()
    with pytest.raises(DiagnosticsError, match="attach"):
        monitor.report()
    with pytest.raises(DiagnosticsError, match="has none of the model's parameters"):
        monitor.attach(torch.optim.SGD(mlp(nn.ReLU()).parameters(), lr=0.1))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.attach(opt)
    with pytest.raises(DiagnosticsError, match=r"before optimizer\.zero_grad"):
        opt.step()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad = None
    with pytest.raises(DiagnosticsError, match=r"parameter '0.weight' has no gradient"):
        opt.step()
