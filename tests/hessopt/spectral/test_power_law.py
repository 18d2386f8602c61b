"""SpectralNewton: its update by the definition, Muon as a special case, groups, and exponents measured online."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessopt
from diagnostics import PowerLaw as Fit
from diagnostics.alignment.exponents import curvature_exponents
from hessopt import AdamWPart, NewtonSchulz, OnlineExponent, PowerLaw, SaddleEscape, SpectralNewton
from hessopt.errors import ClosureError, ModelError
from hessopt.spectral.exponent import smoothed
from hessopt.spectral.groups import left_to_adamw
from hessopt.spectral.transfer import spectral_map


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 5)
        self.position = nn.Parameter(torch.zeros(1, 3, 5))
        self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.middle(self.embed(tokens) + self.position)))
        return logits


def _network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 9), nn.Tanh(),
        nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3),
    ).to(dtype)  # fmt: skip


def _data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 2, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (32,), generator=generator)


def _closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["scale_free", "published"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5, 2.0])
def test_steps_are_the_definition(alpha: float, form: Any, nesterov: bool, device: torch.device) -> None:
    """Several steps of every parameter: T by singular vectors, AdamW by torch's."""
    model = _network().to(device)
    x, y = (t.to(device) for t in _data())
    other = copy.deepcopy(model)
    optimizer = SpectralNewton(
        model,
        lr=0.03,
        coordinates=PowerLaw(alpha, 0.2, form, nesterov=nesterov),
        momentum=0.8,
        weight_decay=0.1,
        adamw=AdamWPart(ratio=0.5),
    )
    matrices = [p for name, p in other.named_parameters() if p.ndim > 1 and not name.startswith("9")]
    rest = [p for p in other.parameters() if all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW(rest, lr=0.015, weight_decay=0.1)
    buffers = [torch.zeros_like(p) for p in matrices]
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        other.zero_grad()
        F.cross_entropy(other(x), y).backward()
        adamw.step()
        with torch.no_grad():
            for p, buffer in zip(matrices, buffers, strict=True):
                assert p.grad is not None
                buffer.mul_(0.8).add_(0.2 * p.grad)
                g = (0.2 * p.grad + 0.8 * buffer if nesterov else buffer).flatten(1)
                step = spectral_map(g, alpha, 0.2, form=form, method="svd")
                p.mul_(1 - 0.003).sub_(0.03 * step.view_as(p))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_muon_with_its_own_iterations_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))  # wide: no rate factor
    other = copy.deepcopy(model)
    ours = SpectralNewton(
        model.parameters(),
        lr=0.02,
        coordinates=PowerLaw(1.0, 0.0, "published", NewtonSchulz(dtype=torch.bfloat16)),
        weight_decay=0.1,
    )
    muon = torch.optim.Muon(other.parameters(), lr=0.02, weight_decay=0.1)
    x = torch.randn(16, 12)
    for _ in range(5):
        for net, optimizer in ((model, ours), (other, muon)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_muon_is_the_limit_of_the_scale_free_form(shape: tuple[int, int]) -> None:
    """The exact polar factor: Muon's own is approximate, but of the same size and nearly the same direction."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    target = torch.randn(shape, dtype=torch.float64)
    steps = []
    makes: list[Any] = [
        lambda p: torch.optim.Muon([p], lr=1.0, weight_decay=0.0),
        lambda p: SpectralNewton([p], lr=1.0, coordinates=PowerLaw(1.0, 0.0)),
        lambda p: SpectralNewton([p], lr=1.0, coordinates=PowerLaw(1.0, 1e-9)),
    ]
    for make in makes:
        p = nn.Parameter(weight.detach().clone())
        (p - target).square().sum().backward()
        make(p).step()
        steps.append(p.detach() - weight.detach())
    muon, exact, limit = steps
    u, _, vh = torch.linalg.svd(weight.detach() - target, full_matrices=False)
    torch.testing.assert_close(exact, -(max(1, shape[0] / shape[1]) ** 0.5) * u @ vh, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(limit, exact, rtol=1e-5, atol=1e-7)
    assert (muon * exact).sum() / (muon.norm() * exact.norm()) > 0.97
    assert 0.7 < muon.norm() / exact.norm() < 1.3


def test_named_groups_and_their_rule() -> None:
    model = _network()
    optimizer = SpectralNewton(model, lr=0.1, coordinates=PowerLaw(), adamw=AdamWPart(ratio=0.2))
    spectral, adamw = optimizer.param_groups
    assert (spectral["name"], adamw["name"]) == ("spectral", "adamw")
    assert spectral["param_names"] == ["0.weight", "2.weight", "5.weight", "7.weight"]
    assert adamw["lr"] == pytest.approx(0.02)
    assert left_to_adamw(Tied()) == {
        "embed.weight": True, "position": True, "middle.weight": False, "middle.bias": True
    }  # fmt: skip
    assert left_to_adamw(nn.Linear(3, 2)) == {"weight": False, "bias": True}  # the head, but the only matrix
    assert not left_to_adamw(model, [])["9.weight"]
    chosen = left_to_adamw(model, ["0", "7.*"])
    assert [name for name, own in chosen.items() if own and name.endswith("weight")] == ["0.weight", "7.weight"]
    assert left_to_adamw(model, lambda name, p: p.ndim == 4)["2.weight"]
    listed = SpectralNewton(model.parameters(), coordinates=PowerLaw(), adamw=AdamWPart(["0.weight"]), model=model)
    assert len(listed.param_groups) == 1
    assert list(listed.alphas) == ["2.weight", "5.weight", "7.weight", "9.weight"]
    with pytest.raises(ValueError, match="matches 'nowhere'"):
        SpectralNewton(model, coordinates=PowerLaw(), adamw=AdamWPart(["nowhere"]))


def test_one_group_is_as_good_as_two() -> None:
    x, y = _data()
    results = []
    for make in (
        lambda m: SpectralNewton(m, coordinates=PowerLaw(), adamw=AdamWPart(ratio=0.3)),
        lambda m: SpectralNewton(m.parameters(), coordinates=PowerLaw(), adamw=AdamWPart(ratio=0.3), model=m),
        lambda m: SpectralNewton(m.parameters(), coordinates=PowerLaw(), adamw=AdamWPart(["9"], 0.3), model=m),
    ):
        model = _network()
        optimizer = make(model)
        for _ in range(3):
            optimizer.step(_closure(model, x, y))
        results.append([p.detach() for p in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-12, atol=1e-14)


def test_groups_have_options_of_their_own() -> None:
    model = _network()
    x, y = _data()
    groups = [
        {"params": [model[0].weight], "alpha": 1.0, "delta": 0.0, "momentum": 0.0},
        {"params": [model[5].weight], "method": "adamw", "lr": 0.1},
        {"params": [model[2].weight], "maximize": True},
    ]
    before = [copy.deepcopy(group["params"][0].detach()) for group in groups]  # type: ignore[index]
    gradients = torch.autograd.grad(_closure(model, x, y)(), [g["params"][0] for g in groups])  # type: ignore[index]
    SpectralNewton(groups, lr=0.05, coordinates=PowerLaw()).step(_closure(model, x, y))
    expected = -0.05 * spectral_map(gradients[0].flatten(1), 1.0, 0.0).view_as(gradients[0])
    torch.testing.assert_close(model[0].weight - before[0], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model[5].weight - before[1], -0.1 * gradients[1].sign(), rtol=1e-3, atol=1e-9)
    assert ((model[2].weight - before[2]) * gradients[2]).sum() > 0


@pytest.mark.parametrize("source", ["closure", "closure with backward", "batch"])
def test_online_exponents_are_those_of_diagnostics(source: str) -> None:
    model = _network()
    x, y = _data()
    options: dict[str, Any] = {"batch": (x, y), "loss_fn": F.cross_entropy} if source == "batch" else {}
    online = OnlineExponent(every=3, directions=8, **options)
    optimizer = SpectralNewton(model, coordinates=PowerLaw("online", online=online))
    assert all(math.isnan(alpha) for alpha in optimizer.alphas.values())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if source == "closure with backward":
            loss.backward()
        return loss

    expected: dict[str, float] = {}
    for step in range(7):
        due = step % 3 == 0
        table = curvature_exponents(model, (x, y), F.cross_entropy, 8, kronecker=None, control=False) if due else None
        if source == "batch":
            closure().backward()
            assert optimizer.step() is None
        else:
            optimizer.step(closure)
        if table is not None:
            for name in optimizer.alphas:
                fit = table[name].alpha
                value = min(max(fit.exponent, 0.5), 2.5)
                good = fit.r2 >= 0.8
                old = expected.get(name)
                expected[name] = 1.0 if not good else value if old is None or old == 1.0 else (old + value) / 2
        assert optimizer.last_step is not None
        assert optimizer.last_step.measured == (4 if due else 0)
        assert optimizer.alphas == pytest.approx(expected, rel=1e-6)
    assert len({round(alpha, 3) for alpha in expected.values()}) > 1
    assert any(alpha != 1 for alpha in expected.values())


def test_online_exponents_are_used() -> None:
    model, (x, y) = _network(), _data()
    before = copy.deepcopy(model)
    optimizer = SpectralNewton(model, lr=0.05, coordinates=PowerLaw("online"), momentum=0.0)
    optimizer.step(_closure(model, x, y))
    for name, alpha in optimizer.alphas.items():
        p, old = model.get_parameter(name), before.get_parameter(name)
        (g,) = torch.autograd.grad(_closure(before, x, y)(), [old])
        step = spectral_map(g.flatten(1), alpha, method="svd").view_as(p)
        torch.testing.assert_close(p, old - 0.05 * step, rtol=1e-9, atol=1e-11)


def test_maximizing_measures_the_curvature_of_minus_the_loss() -> None:
    model, (x, y) = _network(), _data()
    found = []
    for maximize, sign in ((False, 1), (True, -1)):
        net = copy.deepcopy(model)
        optimizer = SpectralNewton(net, coordinates=PowerLaw("online"), maximize=maximize)
        optimizer.step(lambda net=net, sign=sign: sign * F.cross_entropy(net(x), y))
        found.append(optimizer.alphas)
    assert found[0] == pytest.approx(found[1])
    assert any(alpha != 1 for alpha in found[0].values())


def test_smoothing(caplog: pytest.LogCaptureFixture) -> None:
    def fit(exponent: float, r2: float) -> Fit:
        return Fit(exponent, r2, 0.1, 0.0, 10)

    assert smoothed(None, fit(1.7, 0.9), 0.5, "w") == (1.7, True)
    assert smoothed(1.0, fit(2.0, 0.9), 0.25, "w") == (1.75, True)
    assert smoothed(None, fit(7.0, 0.9), 0.5, "w") == (2.5, True)
    assert smoothed(None, fit(-3.0, 0.9), 0.5, "w") == (0.5, True)
    with caplog.at_level(logging.INFO, "hessopt.spectral.exponent"):
        assert smoothed(2.0, fit(2.0, 0.79), 0.5, "the weight") == (1.0, False)
        assert smoothed(2.0, fit(math.nan, math.nan), 0.5, "w") == (1.0, False)
    assert "the weight falls back to 1" in caplog.text


def test_online_needs_something_to_measure_on() -> None:
    model, (x, y) = _network(), _data()
    before = copy.deepcopy(model.state_dict())
    optimizer = SpectralNewton(model, coordinates=PowerLaw("online"))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ClosureError, match=r"Pass a closure.*fixed batch.*fixed alpha"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimizer.step(_closure(model, x, y))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()  # not due
    fixed = PowerLaw("online", online=OnlineExponent(batch=(x, y), loss_fn=F.cross_entropy))
    with pytest.raises(ValueError, match="needs the network"):
        SpectralNewton(model.parameters(), coordinates=fixed)


def _every_four(alpha: Any) -> PowerLaw:
    return PowerLaw(alpha, online=OnlineExponent(every=4) if "online" in str(alpha) else None)


@pytest.mark.parametrize("alpha", [2.0, "online", {"conv": 1.0, "linear": "online"}])
def test_state_resumes_bit_for_bit(alpha: Any) -> None:
    model, (x, y) = _network(torch.float32), _data(torch.float32)
    optimizer = SpectralNewton(model, coordinates=_every_four(alpha))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(6):
        optimizer.step(_closure(model, x, y))
        scheduler.step()
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer)
    other = _network(torch.float32)
    resumed = SpectralNewton(other, coordinates=_every_four(alpha))
    again = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 20)
    for part, state in zip((other, resumed, again), states, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    for net, o, s in ((model, optimizer, scheduler), (other, resumed, again)):
        for _ in range(6):
            o.step(_closure(net, x, y))
            s.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert optimizer.alphas == resumed.alphas
    assert optimizer.param_groups[0]["lr"] < 0.02


def test_bfloat16_and_closures() -> None:
    model, (x, y) = _network(torch.bfloat16), _data(torch.bfloat16)
    optimizer = SpectralNewton(model, lr=0.01, coordinates=PowerLaw())
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x).float(), y))) for _ in range(20)]  # type: ignore[arg-type]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_inside_saddle_escape() -> None:
    model, (x, y) = _network(), _data()
    optimizer = SaddleEscape(SpectralNewton(model, coordinates=PowerLaw()), model=model)
    losses = [float(optimizer.step(_closure(model, x, y))) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_bad_gradients_change_nothing() -> None:
    model, (x, y) = _network(), _data()
    optimizer = SpectralNewton(model, coordinates=PowerLaw())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ClosureError, match=r"gradient of parameter .* is not finite"):
        optimizer.step(lambda: F.cross_entropy(model(x), y) + 0 * (model[0].weight * 0).sum().sqrt())
    sparse = nn.Embedding(4, 3, sparse=True)
    with pytest.raises(ModelError, match="sparse"):
        SpectralNewton(sparse.parameters(), coordinates=PowerLaw()).step(
            lambda: sparse(torch.tensor([1])).square().sum()
        )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (lambda: {"coordinates": PowerLaw("fast")}, ValueError, "alpha must be"),  # type: ignore[arg-type]
        (lambda: {"coordinates": PowerLaw({"conv": 1.0})}, ValueError, "layer type has the keys"),
        (lambda: {"coordinates": PowerLaw(1.0, online=OnlineExponent())}, ValueError, "no layer has that exponent"),
        (lambda: {"coordinates": PowerLaw(newton_schulz=NewtonSchulz())}, ValueError, "no layer has that exponent"),
        (lambda: {"coordinates": 1.0}, TypeError, "must be a hessopt.KroneckerCoordinates or hessopt.PowerLaw"),
        (lambda: {"loss": "mse"}, TypeError, "need no loss"),
        (lambda: {"coordinates": PowerLaw("online", online=OnlineExponent(decay=1.0))}, ValueError, "decay must lie"),
        (lambda: {"coordinates": PowerLaw("online", online=OnlineExponent(directions=2))}, ValueError, "directions"),
        (lambda: {"coordinates": PowerLaw("online", online=OnlineExponent(every=0))}, ValueError, "every must be"),
        (lambda: {"coordinates": PowerLaw("online", online=OnlineExponent(batch=(1, 2)))}, ValueError, "needs both"),
        (lambda: {"adamw": AdamWPart(betas=(0.9, 1.0))}, ValueError, "betas must lie"),
        (lambda: {"adamw": AdamWPart(ratio=-1.0)}, ValueError, "ratio must be"),
        (lambda: {"adamw": ["0"]}, TypeError, "must be a hessopt.AdamWPart"),
        (lambda: {"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: {"model": nn.Linear(1, 1)}, ValueError, "two different networks"),
    ],
)
def test_bad_arguments(options: Callable[[], dict[str, Any]], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        SpectralNewton(_network(), **{"coordinates": PowerLaw(), **options()})


def test_bad_model_and_method() -> None:
    with pytest.raises(TypeError, match="Module"):
        SpectralNewton(_network().parameters(), model="net", coordinates=PowerLaw())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass model="):
        SpectralNewton(_network().parameters(), coordinates=PowerLaw(), adamw=AdamWPart(["0"]))
    with pytest.raises(ValueError, match="method must be"):
        SpectralNewton([{"params": _network().parameters(), "method": "sgd"}], coordinates=PowerLaw())
    assert hessopt.SpectralNewton is SpectralNewton


def test_the_report_names_every_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    found = SpectralNewton(model, coordinates=PowerLaw()).report()
    assert found == {"0.weight": "spectral", "0.bias": "AdamW", "2.weight": "AdamW", "2.bias": "AdamW"}
