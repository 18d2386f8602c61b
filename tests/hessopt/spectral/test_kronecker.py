"""SpectralNewton in the coordinates of the curvature: its rule against dense algebra, and what users do with it."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import hessopt
from hessopt import (
    AdamWPart,
    CurvatureLengths,
    KroneckerAveraging,
    KroneckerCoordinates,
    Momentum,
    PowerLaw,
    SpectralNewton,
)
from hessopt.averages.options import due
from hessopt.errors import ClosureError
from hessopt.spectral.engine import OFTEN
from hessopt.spectral.gram_polar import COEFFICIENTS
from tests.helpers.linear_calls import linear_calls

F64 = torch.float64


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(
        F64
    )


def data(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=F64)
    return x, (x[:, :3] * x[:, 1:]).argmax(1)


def train(net: nn.Module, optimizer: SpectralNewton, seeds: range) -> None:
    for seed in seeds:
        x, y = data(seed)
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def everything(net: nn.Module, optimizer: SpectralNewton) -> list[Tensor]:
    def leaves(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value.clone()]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return [leaf for part in parts for leaf in leaves(part)]

    return [*values(net), *leaves(optimizer.state_dict()["state"])]


def test_updates_come_at_intervals_of_an_eighth_of_the_steps_until_every_tenth() -> None:
    """Curvature rises a hundredfold in the first fifty steps."""
    updates = [step for step in range(200) if due(step, 10, OFTEN)]
    early = [step for step in updates if step < 10 * OFTEN]
    assert early[0] == 0
    assert all(b - a == max(1, a // OFTEN) for a, b in itertools.pairwise(early))
    assert {step for step in updates if step >= 80} == set(range(80, 200, 10))
    net = network()
    optimizer = SpectralNewton(net, "cross_entropy")
    for step in range(30):
        x, y = data(step)
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert optimizer._engine.updates == sum(step < 30 for step in updates)  # type: ignore[attr-defined]


def test_a_gradient_that_is_longer_than_usual_counts_for_little_more() -> None:
    net = network()
    optimizer = SpectralNewton(net, "cross_entropy", momentum=Momentum(0.8, clip=1.5))
    usual = torch.zeros((), dtype=F64)
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    kept = {0, 1, 4, 5, 6, 7}  # of linear layers; a norm's are not clipped
    for step in range(12):
        x, y = data(step)
        optimizer.zero_grad()
        (functional.cross_entropy(net(x), y) * (100.0 if step in (7, 8) else 1.0)).backward()
        found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten() for i, g in enumerate(found) if i in kept]).norm()
        share = (1.5 * usual / norm).clamp_max(1) if step >= 5 else torch.ones((), dtype=F64)
        usual = usual.lerp(norm * share, max(0.03, 1 / (step + 1)))
        momentum = [m.lerp(g * share, 0.2) for m, g in zip(momentum, found, strict=True)]
        optimizer.step()
        assert (share < 0.1) == (step in (7, 8))
    state = optimizer.state_dict()["state"]
    for i in kept:
        torch.testing.assert_close(state[i]["momentum_buffer"], momentum[i])


@pytest.mark.parametrize("given", [{"decay": 1.0}, {"decay": -0.1}, {"clip": 0.0}, {"clip": float("inf")}])
def test_momentum_refuses_what_is_out_of_range(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"momentum|clip"):
        Momentum(**given)


def power(factor: Tensor, exponent: float, damping: float) -> Tensor:
    e, u = torch.linalg.eigh(factor)
    return (u * (e + damping**0.5 * factor.diagonal().mean()) ** -exponent) @ u.T


@pytest.mark.parametrize("kind", ["fisher", "empirical"])
def test_the_first_steps_are_the_definition(kind: Any) -> None:
    """Factors by sums over samples."""
    net = network()
    other = copy.deepcopy(net)
    averages = KroneckerAveraging(decay=0.95, factor_every=1, inverse_every=1, seed=3)
    optimizer = SpectralNewton(
        net,
        "cross_entropy",
        0.7,
        coordinates=KroneckerCoordinates(0.25, 0.02, averages, kind),
        step_lengths=CurvatureLengths(bandwidth="full"),
        weight_decay=0.1,
    )
    layers = [m for m in other if isinstance(m, nn.Linear)]
    momentum = [torch.zeros(m.out_features, m.in_features + 1, dtype=F64) for m in layers]
    rest = [p for m in other if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    adam = [(torch.zeros_like(p), torch.zeros_like(p)) for p in rest]
    curvature, slopes = torch.zeros(3, 3, dtype=F64), torch.zeros(3, dtype=F64)
    past, agreement = torch.full((3,), 0.02, dtype=F64).log(), torch.tensor([0.0, 0.2], dtype=F64)
    factors: list[list[Tensor]] = []
    for t in range(1, 4):
        x, y = data(t)
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        gathering = optimizer._engine.gathering  # type: ignore[attr-defined]
        # drawn at random, so the reference takes them
        drawn = [j.clone() for made in gathering._made.values() for j in made.batches[0].cotangents]
        optimizer.step()

        inputs, outputs, h = linear_calls(other, x)
        other.zero_grad()
        loss = functional.cross_entropy(h, y)
        own = [j[None] for j in torch.autograd.grad(loss * len(x) ** 0.5, outputs, retain_graph=True)]
        columns = drawn if kind == "fisher" else own
        loss.backward()
        found, changes = [], []
        weight = max(0.05, 1 / t)
        gradients = [torch.cat([m.weight.grad, m.bias.grad[:, None]], 1) for m in layers]  # type: ignore[list-item, index]
        both = torch.stack([torch.cat([t.flatten() for t in ts]) for ts in (momentum, gradients)])
        gram = both @ both.T
        agreement = 0.9 * agreement + 0.1 * torch.stack([gram[0, 1], gram[0, 0]]) / gram[1, 1]
        for i, (h, j) in enumerate(zip(inputs, columns, strict=True)):
            bent = torch.cat([h, torch.ones(len(h), 1, dtype=F64)], 1)
            new = [bent.T @ bent / len(h), j[0].T @ j[0]]
            factors = [*factors, new] if t == 1 else factors
            factors[i] = [old.lerp(own, weight) for old, own in zip(factors[i], new, strict=True)]
            g = gradients[i]
            momentum[i] = 0.9 * momentum[i] + 0.1 * g
            left, right = power(factors[i][1], 0.25, 0.02), power(factors[i][0], 0.25, 0.02)
            d = left @ polar(left @ (0.9 * momentum[i] + 0.1 * g) @ right) @ right
            found.append(0.2 * d.numel() ** 0.5 * d / d.norm())
            changes.append(((j[0] @ found[-1]) * bent).sum(1))
        z = torch.stack(changes, 1)
        mean = max(0.1, 1 / t)
        curvature = curvature.lerp(z.T @ z, mean)
        slopes = slopes.lerp(torch.stack([(m * d).sum() for m, d in zip(momentum, found, strict=True)]), mean)
        asked = minimised(curvature, slopes, 16)
        past = past.lerp(asked.log(), 1 / (t + 300))
        part = 1 / 3 + 2 / 3 * min(1.0, max(0.0, 2 * float(agreement[0] / agreement[1])))
        lengths = 0.5 * asked**part * past.exp().clamp(max=0.02) ** (1 - part)
        with torch.no_grad():
            for m, d, s in zip(layers, found, lengths, strict=True):
                whole = torch.cat([m.weight, m.bias[:, None]], 1)
                whole = whole - 0.7 * s * (d + 0.1 * whole)
                m.weight.copy_(whole[:, :-1])
                m.bias.copy_(whole[:, -1])
            for k, p in enumerate(rest):
                first, second = adam[k]
                assert p.grad is not None
                adam[k] = (0.9 * first + 0.1 * p.grad, 0.99 * second + 0.01 * p.grad**2)
                step = adam[k][0] / (1 - 0.9**t) / ((adam[k][1] / (1 - 0.99**t)).sqrt() + 1e-8)
                p.sub_(0.7 * lengths.median() * (step + 0.1 * p))
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def polar(z: Tensor) -> Tensor:
    x = z / z.norm()
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def minimised(curvature: Tensor, slopes: Tensor, rows: int) -> Tensor:
    """The formula of CoarseCurvature, entry by entry."""
    count, n = len(slopes), rows * 1.9 / 0.1
    bounds = []
    for v in range(count):
        total = float(curvature[v, v])
        for w in range(count):
            if w != v:
                noise = 2 * float(curvature[v, v] * curvature[w, w] / n) ** 0.5
                total += max(0.0, abs(float(curvature[v, w])) - noise)
        bounds.append(max(0.0, float(slopes[v])) / total)
    floor = 1e-3 * max(bounds)
    bounds = [max(b, floor) for b in bounds]
    median = sorted(bounds)[(count - 1) // 2]
    q = torch.tensor([b / median / min(max(b / median, 1 / 3), 3.0) for b in bounds], dtype=F64)
    return q * max(0.0, float(slopes @ q) / float(q @ curvature @ q))


def test_closures_and_declared_losses_take_the_same_steps() -> None:
    nets = [network(), network(), network()]
    criterion = nn.CrossEntropyLoss()
    optimizers = [
        SpectralNewton(nets[0], "cross_entropy"),
        SpectralNewton(nets[1], criterion),
        SpectralNewton(nets[2], criterion),
    ]
    for seed in range(5):
        x, y = data(seed)
        for net, optimizer in zip(nets[:2], optimizers[:2], strict=True):
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            optimizer.step()
        loss = optimizers[2].step(lambda: criterion(nets[2](x), y))  # noqa: B023
        assert loss is not None
    for other in nets[1:]:
        for a, b in zip(nets[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_any_closure_will_do() -> None:
    net = network()
    optimizer = SpectralNewton(net)
    x, y = data(0, 64)
    losses = [float(optimizer.step(lambda: functional.cross_entropy(net(x), y))) for _ in range(60)]  # type: ignore[arg-type]
    assert losses[-1] < 0.3 * losses[0]
    assert len(optimizer.step_lengths) == 3
    assert optimizer.gradient_norm is not None  # type: ignore[attr-defined]


def test_without_a_loss_inputs_alone_count_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    optimizer = SpectralNewton(net)
    with caplog.at_level(logging.WARNING):
        train(net, optimizer, range(4))
    assert [r.message for r in caplog.records if "the loss is not known" in r.message] != []
    assert len([r for r in caplog.records if "the loss is not known" in r.message]) == 1
    assert set(optimizer.step_lengths.values()) == {0.01}


def test_gradients_of_samples_need_no_loss_and_no_second_backward(caplog: pytest.LogCaptureFixture) -> None:
    """The same steps whether the module is seen, with a factor on its value, or nothing is declared."""
    criterion = nn.CrossEntropyLoss()
    coordinates = replace(often(), curvature="empirical")
    nets = [network() for _ in range(4)]
    losses = (None, criterion, criterion, None)
    optimizers = [SpectralNewton(net, loss, coordinates=coordinates) for net, loss in zip(nets, losses, strict=True)]
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    nets[0][3].register_full_backward_hook(count)
    for seed in range(5):
        x, y = data(seed)
        for net, optimizer, scale in zip(nets[:3], optimizers[:3], (1.0, 1.0, 64.0), strict=True):
            optimizer.zero_grad()
            (criterion(net(x), y) * scale).backward()
            torch._foreach_mul_([p.grad for p in net.parameters()], 1 / scale)
            optimizer.step()
        optimizers[3].step(lambda: criterion(nets[3](x), y))  # noqa: B023
    assert passes == 5
    assert not caplog.records
    assert 0.01 not in optimizers[0].step_lengths.values()
    for other in nets[1:]:
        for a, b in zip(nets[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_of_samples_are_refused_where_their_factor_is_not_seen() -> None:
    net = network().to(torch.float32)
    optimizer = SpectralNewton(net, coordinates=replace(often(), curvature="empirical"))
    before = values(net)
    x, y = data(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(functional.cross_entropy(net(x.float()), y)).backward()
    with pytest.raises(ClosureError, match=r"under a GradScaler.*declare the module"):
        scaler.step(optimizer)
    assert all(map(torch.equal, before, values(net)))
    alone = SpectralNewton(net)  # inputs have no factor
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(functional.cross_entropy(net(x.float()), y)).backward()
    scaler.step(alone)
    assert not any(map(torch.equal, before, values(net)))


@pytest.mark.parametrize("declared", ["cross_entropy", None])
def test_a_state_without_output_columns_is_refused_and_changes_nothing(declared: Any) -> None:
    saved, net = network(), network()
    without = SpectralNewton(saved, coordinates=often())
    coordinates = often() if declared else replace(often(), curvature="empirical")
    optimizer = SpectralNewton(net, declared, coordinates=coordinates)
    train(saved, without, range(3))
    train(net, optimizer, range(3))
    before = everything(net, optimizer)
    with pytest.raises(ValueError, match="another network"):
        optimizer.load_state_dict(without.state_dict())
    assert all(map(torch.equal, before, everything(net, optimizer)))
    train(net, optimizer, range(3, 4))
    assert not any(map(torch.equal, before, values(net)))


def test_the_network_holds_the_average_or_the_iterates() -> None:
    net = network()
    optimizer = SpectralNewton(net, "cross_entropy")
    train(net, optimizer, range(12))
    iterate = values(net)
    optimizer.eval()
    average = values(net)
    assert not any(map(torch.equal, iterate, average))
    with pytest.raises(ClosureError, match=r"optimizer\.train\(\)"):
        train(net, optimizer, range(12, 13))
    optimizer.train()
    assert all(map(torch.equal, iterate, values(net)))
    plain = network()
    alone = SpectralNewton(plain, "cross_entropy", average=None)
    train(plain, alone, range(12))
    alone.eval()
    assert all(map(torch.equal, iterate, values(plain)))


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize(("loss", "curvature"), [("cross_entropy", "fisher"), (None, "empirical")])
def test_a_copy_and_a_resumed_run_go_on_bit_for_bit(shown: bool, loss: Any, curvature: Any) -> None:
    net, coordinates = network(), replace(often(), curvature=curvature)
    optimizer = SpectralNewton(net, loss, coordinates=coordinates)
    train(net, optimizer, range(5))
    if shown:
        optimizer.eval()
    other = copy.deepcopy(net)
    resumed = SpectralNewton(other, loss, coordinates=coordinates)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, way in ((net, optimizer), (other, resumed)):
        way.train()
        train(own, way, range(5, 12))
        way.eval()
    assert all(map(torch.equal, values(net), values(other)))


def often() -> KroneckerCoordinates:
    return KroneckerCoordinates(averages=KroneckerAveraging(decay=0.95, factor_every=2, inverse_every=4))


@pytest.mark.parametrize("first", [False, True])
def test_a_batch_that_is_not_finite_changes_nothing(first: bool) -> None:
    net = network()
    optimizer = SpectralNewton(net, "cross_entropy", coordinates=often(), weight_decay=0.1)
    if not first:
        train(net, optimizer, range(3))
    before = [t for t in everything(net, optimizer) if t.is_floating_point()]
    x, y = data(9)
    x[0, 0] = torch.nan
    optimizer.zero_grad()
    functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    after = [t for t in everything(net, optimizer) if t.is_floating_point()]
    if not first:  # with no batch at all, a state has no averages
        assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, before[: len(values(net))], values(net)))
    assert "left out" in optimizer.report()
    train(net, optimizer, range(10, 12))
    assert not any(map(torch.equal, before[: len(values(net))], values(net)))


def test_frozen_and_missing_gradients() -> None:
    net = network()
    optimizer = SpectralNewton(net, "cross_entropy", coordinates=often())
    train(net, optimizer, range(3))
    net[3].weight.requires_grad_(False)
    before = values(net)
    train(net, optimizer, range(3, 6))
    moved = [not torch.equal(a, b) for a, b in zip(before, values(net), strict=True)]
    assert moved == [p is not net[3].weight for p in net.parameters()]


@pytest.mark.parametrize("entry", ["powers", "coarse"])
def test_a_state_of_other_shapes_is_refused_and_changes_nothing(entry: str) -> None:
    net = network()
    optimizer = SpectralNewton(net, "cross_entropy", coordinates=often())
    train(net, optimizer, range(3))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["spectral"]["engine"][entry][0] = torch.zeros(1, 2)
    train(net, optimizer, range(3, 5))
    before = everything(net, optimizer)
    with pytest.raises(ValueError, match="another network"):
        optimizer.load_state_dict(bad)
    assert all(map(torch.equal, before, everything(net, optimizer)))


def test_a_parameter_that_is_unfrozen_is_trained_from_the_next_step_on() -> None:
    net = network()
    net[0].requires_grad_(False)
    optimizer = SpectralNewton(net, "cross_entropy", coordinates=often())
    train(net, optimizer, range(2))
    net[0].requires_grad_(True)
    before = net[0].weight.detach().clone()
    train(net, optimizer, range(2, 3))
    assert torch.equal(before, net[0].weight)
    train(net, optimizer, range(3, 5))
    assert not torch.equal(before, net[0].weight)


def test_maximizing_minus_the_loss_is_minimizing_it() -> None:
    nets = [network(), network()]
    optimizers = [SpectralNewton(nets[0]), SpectralNewton(nets[1], maximize=True)]
    x, y = data(0)
    for _ in range(4):
        for net, optimizer, sign in zip(nets, optimizers, (1, -1), strict=True):
            optimizer.step(lambda: sign * functional.cross_entropy(net(x), y))  # noqa: B023
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)).tanh())


def test_a_tied_output_layer_has_factors_and_is_reported() -> None:
    torch.manual_seed(0)
    net = Tied()
    optimizer = SpectralNewton(net, hessopt.NamedLoss("cross_entropy", class_dim=-1))
    for _ in range(3):
        x = torch.randint(7, (5, 6))
        optimizer.zero_grad()
        functional.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    assert optimizer.report()["embedding.weight"] == "spectral, linear: 4 ⊗ 7"
    assert set(optimizer.step_lengths) == {"middle", "head"}


def test_networks_without_matrices_are_trained_by_adamw() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(4), nn.Flatten()).to(F64)
    optimizer = SpectralNewton(net, step_lengths="fixed")
    other = copy.deepcopy(net)
    adamw = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0)
    for seed in range(3):
        x = data(seed)[0]
        for own, way in ((net, optimizer), (other, adamw)):
            way.zero_grad()
            (own(x) * x.cos()).sum().backward()
            way.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"loss": 0.1}, TypeError, r"second argument is the loss.*lr=0\.1"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"momentum": 1.0}, ValueError, "momentum must lie"),
        ({"average": 0}, ValueError, "average must be positive"),
        ({"step_lengths": "long"}, ValueError, "step_lengths must be one of"),
        ({"lr": -1.0}, ValueError, "lr must be"),
        ({"coordinates": 0.5}, TypeError, "coordinates must be a hessopt.KroneckerCoordinates or hessopt.PowerLaw"),
        ({"adamw": "all"}, TypeError, "adamw must be a hessopt.AdamWPart"),
        ({"loss": hessopt.NamedLoss(None)}, ValueError, "only the reduction is known"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        SpectralNewton(network(), **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KroneckerCoordinates(exponent=0.0), "exponent must lie"),
        (lambda: KroneckerCoordinates(damping=0.0), "damping must be"),
        (lambda: KroneckerCoordinates(averages=KroneckerAveraging(iterations=3)), "spectral steps need none"),
        (lambda: KroneckerCoordinates(curvature="ggn"), "curvature must be one of"),  # type: ignore[arg-type]
        (
            lambda: KroneckerCoordinates(averages=KroneckerAveraging(columns=2), curvature="empirical"),
            "without columns",
        ),
        (lambda: CurvatureLengths(share=0.0), "share must lie"),
        (lambda: CurvatureLengths(response=0.0), "response must lie"),
        (lambda: CurvatureLengths(decay=1.0), "decay must lie"),
        (lambda: CurvatureLengths(bandwidth=-1), "bandwidth"),
    ],
)
def test_bad_options(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_the_kind_follows_from_the_coordinates() -> None:
    net = network()
    for optimizer in (SpectralNewton(net), SpectralNewton(net, coordinates=PowerLaw(), adamw=AdamWPart())):
        assert isinstance(optimizer, SpectralNewton)
    assert SpectralNewton(net).alphas == {}
    with pytest.raises(TypeError, match="needs the network itself"):
        SpectralNewton(net.parameters())


def test_the_bandwidth_of_the_step_lengths_is_an_option_of_theirs() -> None:
    nets = [network() for _ in range(3)]
    for net, bandwidth in zip(nets, ("full", 2, 0), strict=True):
        optimizer = SpectralNewton(net, "cross_entropy", step_lengths=CurvatureLengths(bandwidth=bandwidth))
        train(net, optimizer, range(4))
    assert all(map(torch.equal, values(nets[0]), values(nets[1])))  # of three layers in a row
    assert not any(map(torch.equal, values(nets[0]), values(nets[2])))


@pytest.mark.parametrize("declared", [False, True])
def test_a_loss_without_curvature_in_the_output_is_trained_with_fixed_lengths(declared: bool) -> None:
    """The mean absolute error: the second derivative is zero."""
    net, criterion = network(), nn.L1Loss()
    optimizer = SpectralNewton(net, criterion if declared else None)
    x = data(0)[0]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(net(x), x[:, :3])
        if declared:
            loss.backward()
            optimizer.step()
        else:
            optimizer.step(lambda: criterion(net(x), x[:, :3]))
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert list(optimizer.step_lengths.values()) == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_training_recovers_from_steps_that_are_far_too_long(seed: int) -> None:
    """Twenty times the learning rate for ten steps blows the loss up; afterwards it comes below where it was."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).to(F64)
    teacher = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4)).to(F64)
    x = torch.randn(512, 10, dtype=F64)
    y = (3 * teacher(x)).argmax(1)
    optimizer = SpectralNewton(net, "cross_entropy")

    def after(steps: int, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(steps):
            rows = torch.randint(512, (64,))
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        return float(functional.cross_entropy(net(x), y).detach())

    before = after(60, 1.0)
    assert after(10, 20.0) > 5 * before
    assert after(150, 1.0) < before


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing_but_at_refreshes_of_powers() -> None:
    """Of low rank, too; steps that update the factors included. (At intervals of a fourth of the steps so far.)"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 300), nn.LayerNorm(300), nn.Tanh(), nn.Linear(300, 3)).to(F64)
    optimizer = SpectralNewton(net, "cross_entropy", weight_decay=0.1)
    reads = []
    for step in range(60):
        x, y = data(step)
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        with Reads() as counted:
            optimizer.step()
        reads += [step] if counted.count else []
    assert reads == [*range(9), 10, 12, 15, 18, 22, 27, 33, 41, 51]
