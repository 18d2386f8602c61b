"""KroneckerNewton: the update rule around the Kronecker engine, and how it is used."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt import BandedNewton, KroneckerBandwidth, KroneckerDamping, KroneckerNewton, LeastSquares
from hessopt.averages.accounting import kronecker_operations
from hessopt.closure.loss_curvature import named_curvature
from hessopt.errors import ClosureError, ModelError
from tests.helpers.kronecker_reference import gather, kronecker_arguments


def build(net: nn.Module, **options: Any) -> KroneckerNewton:
    params = options.pop("params", net)
    return KroneckerNewton(params, model=net, **kronecker_arguments(**options))


def declared(net: nn.Module, **options: Any) -> KroneckerNewton:
    return build(net, **{"loss": "cross_entropy", **options})


def problem(dropout: float = 0.0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    x = torch.randn(64, 4)
    return net, x, (x[:, :3] * x[:, 1:]).argmax(1)


def steps(optimizer: KroneckerNewton, net: nn.Module, x: Tensor, y: Tensor, count: int, start: int = 0) -> list[Tensor]:
    losses = []
    for i in range(start, start + count):
        rows = torch.arange(16) + 16 * (i % 4)
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        assert optimizer.step() is None
        losses.append(loss.detach())
    return losses


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in net.modules())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("bandwidth", [0, 1, "full", "auto"])
@pytest.mark.parametrize("curvature", ["fisher", "ggn", "empirical"])
def test_learns_with_the_defaults(bandwidth: Any, curvature: Any, device: torch.device) -> None:
    net, x, y = problem()
    net, x, y = net.to(device), x.to(device), y.to(device)
    optimizer = KroneckerNewton(net, bandwidth=bandwidth, curvature=curvature, loss="cross_entropy")
    losses = steps(optimizer, net, x, y, 210)
    assert torch.stack(losses[-8:]).mean() < 0.5 * torch.stack(losses[:4]).mean()
    assert optimizer.gradient_norm is None  # nobody waits for it


def test_defaults_beside_those_of_exact_steps() -> None:
    net = problem()[0]
    exact, averages = BandedNewton(net), KroneckerNewton(net)
    assert [exact.defaults["lr"], averages.defaults["lr"]] == [1.0, 0.5]
    assert [exact.curvature, averages.curvature] == ["ggn", "fisher"]
    assert exact.defaults["momentum"] == 0.0
    assert averages.defaults["momentum"] == 0.5
    assert averages.band.damping == 2e-3
    assert averages.bandwidth == 0
    assert not hasattr(exact, "band")


@pytest.mark.parametrize("bandwidth", [0, 1, "full", "auto"])
@pytest.mark.parametrize("curvature", ["fisher", "empirical"])
@pytest.mark.parametrize("after", [1, 5, 8, 14])
@pytest.mark.parametrize("way", ["state", "file", "deepcopy", "pickle"])
def test_resumes_bit_for_bit(bandwidth: Any, curvature: str, after: int, way: str) -> None:
    options = {"factor_every": 2, "inverse_every": 6}
    bandwidth = KroneckerBandwidth(12) if bandwidth == "auto" else bandwidth

    def make(net: nn.Module) -> KroneckerNewton:
        return declared(net, bandwidth=bandwidth, curvature=curvature, **options)

    net, x, y = problem()
    optimizer = make(net)
    steps(optimizer, net, x, y, after)
    other: nn.Module
    if way in ("deepcopy", "pickle"):
        pair = (net, optimizer)
        other, resumed = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    else:
        other = problem()[0]
        other.load_state_dict(net.state_dict())
        resumed = make(other)
        state = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        resumed.load_state_dict(state)
    expected = steps(optimizer, net, x, y, 15, after)
    found = steps(resumed, other, x, y, 15, after)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert same(net, other)


def test_momentum_in_half_precision_is_resumed_bit_for_bit() -> None:
    net, x, y = problem()
    net, x = net.bfloat16(), x.bfloat16()
    optimizer = declared(net)
    steps(optimizer, net, x, y, 3)
    other = copy.deepcopy(net)
    resumed = declared(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, net, x, y, 5, 3)
    steps(resumed, other, x, y, 5, 3)
    assert same(net, other)


def test_state_of_another_network_or_kind() -> None:
    net, x, y = problem()
    optimizer = declared(net, bandwidth=1)
    steps(optimizer, net, x, y, 2)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="of another bandwidth, 1, and the optimizer's is 0"):
        declared(problem()[0], bandwidth=0).load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match="param groups"):
        declared(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False)), bandwidth=1).load_state_dict(state)
    with pytest.raises(ValueError, match="has 'kronecker', which BandedNewton does not keep"):
        BandedNewton(problem()[0]).load_state_dict(copy.deepcopy(state))
    with pytest.raises(ValueError, match="which KroneckerNewton does not keep"):
        declared(problem()[0]).load_state_dict(BandedNewton(problem()[0]).state_dict())


@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_trust_region_bounds_the_model_before_the_learning_rate(lr: float) -> None:
    net, x, y = problem()
    optimizer = declared(net, lr=lr, momentum=0.0, trust=1e-3, bandwidth=1, decay=0.0)
    before = [p.detach().clone() for p in net.parameters()]
    steps(optimizer, net, x, y, 1)
    change = [(p.detach() - b) / lr for p, b in zip(net.parameters(), before, strict=True)]
    bound = 1e-3 * optimizer.band.scale
    measured = optimizer.band.quadratic(change)
    damping = optimizer.band.inverse.absolute_damping.value * sum(c.square().sum() for c in change)
    assert 0 < measured + damping <= bound * 1.0001
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])  # type: ignore[union-attr]
    # The bound is attained by the damped model: step = -σ d with σ² g'd = bound.
    decrement = optimizer.band.direction([p.grad for p in net.parameters()]).decrement
    scale = (bound / decrement).sqrt()
    assert torch.allclose(gradient @ torch.cat([c.flatten() for c in change]), -scale * decrement, rtol=1e-4)


def test_maximize() -> None:
    net, x, y = problem()
    twin, third = copy.deepcopy(net), copy.deepcopy(net)
    steps(declared(net), net, x, y, 5)
    optimizer = declared(twin, maximize=True)
    for i in range(5):
        rows = torch.arange(16) + 16 * (i % 4)
        optimizer.zero_grad()
        (-functional.cross_entropy(twin(x[rows]), y[rows])).backward()
        optimizer.step()
    assert same(net, twin)
    # Not declared: the curvature is that of minus the loss.
    optimizer = build(third, maximize=True, curvature="ggn")
    losses = [optimizer.step(lambda: -functional.cross_entropy(third(x), y)) for _ in range(20)]
    assert losses[-1] > losses[0]


def test_weight_decay_is_decoupled_and_spares_what_has_no_gradient() -> None:
    net, x, y = problem()
    optimizer = declared(net, lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    functional.cross_entropy(net(x), y).backward()
    optimizer.zero_grad(set_to_none=False)
    net[0].weight.grad = None  # type: ignore[union-attr]
    optimizer.step()
    for p, b in zip(net.parameters(), before, strict=True):
        assert torch.allclose(p, b if p is net[0].weight else 0.95 * b, rtol=1e-6)


def test_grafting() -> None:
    net, x, y = problem()
    optimizer = declared(net, lr=0.1, momentum=0.0, trust="graft")
    before = [p.detach().clone() for p in net.parameters()]
    steps(optimizer, net, x, y, 1)
    for p, b in zip(net.parameters(), before, strict=True):
        assert torch.allclose((p - b).norm(), 0.1 * p.grad.norm(), rtol=1e-4)  # type: ignore[union-attr]


def test_param_groups_have_their_own_rate_decay_and_momentum() -> None:
    """Against the rule written down for each group, on the engine's own directions."""
    net, x, y = problem()
    twin = copy.deepcopy(net)
    layers = [list(net[0].parameters()), [p for m in net[1:] for p in m.parameters()]]
    settings = [
        {"lr": 0.2, "weight_decay": 0.1, "momentum": 0.5},
        {"lr": torch.tensor(0.05), "weight_decay": 0.0, "momentum": 0.0},
    ]
    groups = [{"params": own, **s} for own, s in zip(layers, settings, strict=True)]
    optimizer = declared(net, params=groups, trust=None)
    reference = declared(twin, params=list(twin.parameters()), trust=None)
    buffers: dict[Tensor, Tensor] = {}
    for i in range(4):
        rows = torch.arange(16) + 16 * i
        steps(optimizer, net, x, y, 1, i)
        twin.zero_grad()
        functional.cross_entropy(twin(x[rows]), y[rows]).backward()
        with torch.no_grad():
            found = reference.band.direction([p.grad for p in twin.parameters()]).steps
            for number, (p, d) in enumerate(zip(twin.parameters(), found, strict=True)):
                s = settings[number >= 2]
                buffers[p] = d + s["momentum"] * buffers.get(p, torch.zeros_like(p))
                p.mul_(1 - float(s["lr"]) * s["weight_decay"]).sub_(float(s["lr"]) * buffers[p])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_groups_that_do_not_fit() -> None:
    net = problem()[0]
    optimizer = build(net, params=[net[0].weight])
    for group, message in [
        ({"params": [net[0].bias], "momentum": 1.0}, "momentum must lie in"),
        ({"params": [net[0].bias], "maximize": True}, "maximize must be the same"),
        ({"params": [nn.Parameter(torch.ones(1))]}, "not a parameter of the network"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("with_closure", [True, False])
def test_unfrozen_parameters_and_new_groups_are_trained(with_closure: bool) -> None:
    net, x, y = problem()
    net[4].requires_grad_(False)
    optimizer = declared(net, params=[p for m in net[:5] for p in m.parameters()])
    steps(optimizer, net, x, y, 3)
    net[4].requires_grad_(True)
    optimizer.add_param_group({"params": net[6].parameters(), "lr": 0.1})
    before = [p.detach().clone() for p in net.parameters()]

    def closure() -> Tensor:
        return functional.cross_entropy(net(x), y)

    for _ in range(2):
        if with_closure:
            optimizer.step(closure)
        else:
            steps(optimizer, net, x, y, 1)
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    count = hooks(net)
    optimizer.band.detach()
    assert hooks(net) == 0
    assert count == 1 + 4  # the network and its four layers, once each


CLOSURES: dict[str, Callable[[nn.Module, KroneckerNewton, Tensor, Tensor], Any]] = {
    "loss": lambda net, _, x, y: functional.cross_entropy(net(x), y),
    "pair": lambda net, _, x, y: (lambda z: (functional.cross_entropy(z, y), z))(net(x)),
}


def _backward(net: nn.Module, optimizer: KroneckerNewton, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = functional.cross_entropy(net(x), y)
    loss.backward()
    return loss


CLOSURES["backward"] = _backward


@pytest.mark.parametrize("options", [{"loss": "cross_entropy"}, {"curvature": "ggn"}, {"curvature": "empirical"}])
def test_all_closures_take_the_same_steps(options: dict[str, Any]) -> None:
    ends = []
    for make in CLOSURES.values():
        net, x, y = problem(dropout=0.2)
        optimizer = build(net, bandwidth=1, **options)
        torch.manual_seed(1)
        for _ in range(12):
            loss = optimizer.step(lambda o=optimizer, n=net, m=make, x=x, y=y: m(n, o, x, y))
            assert not loss.requires_grad
        ends.append(net)
    for other in ends[1:]:
        for p, q in zip(ends[0].parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"loss": "cross_entropy"}, {"curvature": "empirical"}])
def test_with_and_without_closure_alike(options: dict[str, Any]) -> None:
    net, x, y = problem()
    twin = copy.deepcopy(net)
    steps(build(net, **options), net, x, y, 12)
    optimizer = build(twin, **options)
    for i in range(12):
        rows = torch.arange(16) + 16 * (i % 4)
        optimizer.step(lambda r=rows: CLOSURES["loss"](twin, optimizer, x[r], y[r]))
    assert same(net, twin)
    assert all(p.grad is None for p in twin.parameters())


def test_residuals_and_parts_of_the_network() -> None:
    net, x, _ = problem()
    target = x[:, :3] * x[:, 1:]
    optimizer = build(net, bandwidth=1)

    def closure() -> LeastSquares:
        return LeastSquares((net[3:](net[:3](x)) - target) * (2 / target.numel()) ** 0.5)

    losses = [optimizer.step(closure) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    declared_too = build(net, loss="mse", curvature="ggn")
    declared_too.step(closure)  # the network itself is not called: the residuals are what the loss is of
    empirical = build(net, curvature="empirical")
    empirical.step(closure)


def test_without_closure_or_loss() -> None:
    net, x, y = problem()
    optimizer = build(net)
    functional.cross_entropy(net(x), y).backward()
    with pytest.raises(ClosureError, match=r"Declare it, `loss='cross_entropy'.*pass a closure"):
        optimizer.step()
    optimizer = declared(net)
    with pytest.raises(ClosureError, match="no curvature was gathered"):
        optimizer.step()
    sparse = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 3))
    optimizer = declared(sparse)
    functional.cross_entropy(sparse(torch.tensor([0, 1])), torch.tensor([0, 1])).backward()
    with pytest.raises(ModelError, match="sparse gradient"):
        optimizer.step()
    for columns in (1, "exact"):
        optimizer = build(sparse, curvature="ggn", columns=columns)
        with pytest.raises(ModelError, match="sparse gradient"):
            optimizer.step(lambda: functional.cross_entropy(sparse(torch.tensor([0, 1])), torch.tensor([0, 1])))
    optimizer = build(sparse, curvature="empirical")
    functional.cross_entropy(sparse(torch.tensor([0, 1])), torch.tensor([0, 1])).backward()
    with pytest.raises(ModelError, match="sparse gradient"):
        optimizer.step()


def test_a_closure_that_failed_leaves_nothing_behind() -> None:
    net, x, y = problem()
    twin = copy.deepcopy(net)
    optimizer, other = build(net, curvature="ggn"), build(twin, curvature="ggn")
    with pytest.raises(ClosureError, match="the number"):
        optimizer.step(lambda: functional.cross_entropy(net(5 * x), y).item())  # type: ignore[arg-type, return-value]
    optimizer.step(lambda: functional.cross_entropy(net(x), y))
    other.step(lambda: functional.cross_entropy(twin(x), y))
    assert same(net, twin)


@pytest.mark.parametrize("is_declared", [True, False])
def test_adapts_the_damping_with_a_closure(is_declared: bool) -> None:
    net, x, y = problem(dropout=0.1)
    options = {"loss": "cross_entropy"} if is_declared else {"curvature": "ggn"}
    optimizer = build(net, bandwidth=1, adapt_every=2, trust=4e-5, **options)
    make = CLOSURES["backward" if is_declared else "pair"]
    start = optimizer.band.damping
    for _ in range(20):
        optimizer.step(lambda: make(net, optimizer, x, y))
    # Steps this small are predicted well, so the damping falls.
    assert optimizer.band.damping == pytest.approx(start * 0.95**20)
    optimizer.param_groups[0]["lr"] = 300.0
    optimizer._kronecker.trust = None
    before = optimizer.band.damping
    for _ in range(4):
        optimizer.step(lambda: make(net, optimizer, x, y))
    assert optimizer.band.damping > before


def test_hooks_leave_with_the_optimizer_and_stay_away_from_copies() -> None:
    net, x, y = problem()
    optimizer = declared(net)
    count = hooks(net)
    averaged = copy.deepcopy(net)
    through_file = pickle.loads(pickle.dumps(net))
    for other in (averaged, through_file):
        functional.cross_entropy(other(x), y).backward()
    # The copies' forward passes are not seen.
    with pytest.raises(ClosureError, match="no curvature was gathered"):
        optimizer.step()
    second = declared(averaged)
    assert hooks(averaged) == count  # dead ones are cleared away
    steps(second, averaged, x, y, 2)
    del optimizer
    gc.collect()
    assert hooks(net) == 0
    assert hooks(averaged) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"trust": 0.0}, "trust must be"),
        ({"trust": "adam"}, "trust must be"),
        ({"adapt_every": 0}, "adapt_every must be"),
        ({"adapt_every": 2, "adapt_rate": 1.0}, "adapt_rate must lie in"),
        ({"adapt_rate": 0.9}, "there are none without adapt_every"),
        ({"loss": "hinge"}, "loss must be"),
        ({"columns": 0}, "columns must be"),
        ({"damping_unit": "trace"}, "unit of the damping must be"),
        ({"decay": 1.0}, "decay must lie in"),
        ({"seed": 0.5}, "seed must be"),
        ({"loss": "mse", "class_dim": -1}, "class_dim must be"),
        ({"loss": "cross_entropy", "class_dim": True}, "class_dim must be"),
        ({"columns": "exact"}, 'columns="exact" is curvature="ggn"'),
        ({"columns": 1, "curvature": "empirical"}, "without columns"),
        ({"iterations": 3}, "of which bandwidth=0 needs none"),
        ({"curvature": "hessian"}, "curvature must be one of"),
        ({"bandwidth": 0.5}, "bandwidth must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(problem()[0], **options)


def test_options_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"averages must be a hessopt.KroneckerAveraging, got dict"):
        KroneckerNewton(problem()[0], averages={"decay": 0.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"window": 0}, {"candidates": (1, 2)}, {"candidates": (0, 2, 1)}, {"hysteresis": -1.0}]
)
def test_bad_choices_of_the_bandwidth(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        KroneckerBandwidth(**options)


def test_adaptation_needs_a_closure() -> None:
    net, x, y = problem()
    optimizer = declared(net, adapt_every=2)
    functional.cross_entropy(net(x), y).backward()
    with pytest.raises(ClosureError, match="pass one"):
        optimizer.step()


def test_damping_in_units_of_layers_starts_from_one() -> None:
    assert KroneckerDamping(unit="layer").start == 1.0
    assert declared(problem()[0], damping_unit="layer").band.damping == 1.0


def deep(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(width, width), nn.Tanh())], nn.Linear(width, 3))


def test_auto_decides_by_the_predicted_reduction_per_operation(caplog: pytest.LogCaptureFixture) -> None:
    """The evidence against dense matrices made here: of each candidate's factors, and of the exact Jacobian."""
    net = deep().double()
    x = torch.randn(64, 8, dtype=torch.float64)
    y = torch.randint(0, 3, (64,))
    options = {"factor_every": 2, "curvature": "ggn", "columns": "exact", "iterations": 60, "damping": 0.1}
    optimizer = declared(net, bandwidth=KroneckerBandwidth(4), **options)
    band = optimizer.band
    assert band.bandwidth == 0
    seen: list[Any] = []
    with caplog.at_level(logging.INFO, logger="hessopt.kronecker.bandwidth"):
        for i in range(5):
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            if i == 4:
                band.commit([p.grad for p in net.parameters()])  # as step() begins
                probe, own = band.averages.probe, band.averages.factors
                assert probe is not None
                assert own is not None
                gradient = band.inverse.flat([p.grad for p in net.parameters()]).clone()
                rows = list(band.averages.rows)
                curvature = _gauss_newton(net, x)
                probe_updates = probe.factors.updates
                for k in (0, 1, 2):
                    factors = band.averages.blank_factors(band.taper.of([k]))
                    factors.adopt(probe.factors)
                    seen.append(factors)
                views = own.views(own.matrices(torch.arange(len(gradient))))
                order = torch.cat([views[p].flatten() for p in net.parameters()])
                placed = torch.zeros_like(curvature)
                placed[order[:, None], order] = curvature
            optimizer.step()
    (record,) = [r for r in caplog.records if "bandwidth" in r.message]
    gains = []
    for k, factors in enumerate(seen):
        assert factors.updates == probe_updates >= 2
        assert bool(factors.pairs) == (k > 0)
        d = torch.linalg.solve(_dense(factors) + _extra(factors, band.inverse.absolute_damping.value), gradient)
        reduction = (gradient @ d) ** 2 / (d @ placed @ d + band.inverse.absolute_damping.value * d @ d) / 2
        cost = kronecker_operations(factors, rows, 2, 40, 60)
        assert f"{k}: {reduction:.3g} for {cost:.3g}" in record.message
        gains.append(reduction / cost)
    chosen = max(range(3), key=lambda k: gains[k])
    expected = chosen if gains[chosen] > 1.1 * gains[0] else 0
    assert band.bandwidth == expected
    assert record.message.startswith(f"bandwidth {expected} at step 4")


def _gauss_newton(net: nn.Module, x: Tensor) -> Tensor:
    """Of the mean cross-entropy, from the Jacobian by back-propagation of every output."""
    z = net(x)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, list(net.parameters()), retain_graph=True)])
        for v in z.flatten()
    ]
    jacobian = torch.stack(rows).view(*z.shape, -1)
    p = z.detach().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("bip,bij,bjq->pq", jacobian, hessian, jacobian) / len(x)


@pytest.mark.parametrize("columns", [1, "exact"])
def test_measured_curvature_of_all_kinds_of_layers(columns: Any) -> None:
    """One exact product for a step in all blocks, by double back-propagation of the columns' inner product."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.conv = nn.Conv1d(6, 8, 3, groups=2, padding=1)
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.norm(self.conv(self.table(tokens).mT).mT).tanh()
            return self.out(self.out.weight.new_ones(()) * h).mean(1)

    torch.manual_seed(0)
    net = Mixed().double()
    tokens = torch.randint(0, 7, (5, 4))
    optimizer = declared(net, curvature="ggn", columns=columns)
    band = optimizer.band
    gather(band, net(tokens))
    band.averages.open_probe(band.taper.of([0, 1]))
    band.gathering.start()
    generator = torch.Generator().set_state(band.seeds.generator.get_state())
    z = net(tokens)
    gather(band, z)
    shift = {p: torch.randn_like(p) for p in net.parameters()}
    step = band.inverse.flat([shift[p] for p in net.parameters()]).clone()
    assert len(band.averages.diagonals) == 0
    seeds = named_curvature("cross_entropy", "mean", z.detach()).columns(columns, False, generator)
    probe = z.detach().clone().requires_grad_()
    pull = torch.autograd.grad(net(tokens), list(net.parameters()), probe, create_graph=True)
    inner = sum((g * shift[p]).sum() for g, p in zip(pull, net.parameters(), strict=True))
    (forward,) = torch.autograd.grad(inner, probe)  # J s
    expected = (seeds * forward).sum(-1).square().sum()
    assert band.averages.probe is not None
    assert torch.allclose(band.averages.probe.curvature(step), expected, rtol=1e-10)


def _dense(factors: Any) -> Tensor:
    flat, _ = factors.blank()
    eye = torch.eye(len(flat), dtype=flat.dtype)
    columns = [torch.cat([y.flatten() for y in factors.product(factors.matrices(e.clone()))]) for e in eye]
    return torch.stack(columns, 1)


def _extra(factors: Any, damping: float) -> Tensor:
    """``A' ⊗ G' − A ⊗ G`` of the blocks, in the order of the engine's vector."""
    blocks = []
    for stack in factors.stacks:
        for a, g in zip(stack.inputs, stack.outputs, strict=True):
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            one_a, one_g = (torch.eye(len(m), dtype=m.dtype) for m in (a, g))
            damped = torch.kron(g + damping**0.5 / pi * one_g, a + pi * damping**0.5 * one_a)
            blocks.append(damped - torch.kron(g, a))
    return torch.block_diag(*blocks)


def test_auto_takes_a_band_where_steps_are_cheap_and_leaves_it_where_they_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = deep(), torch.randn(64, 8)
    y = torch.randint(0, 3, (64,))
    optimizer = declared(net, bandwidth=KroneckerBandwidth(10), factor_every=2)
    chosen = []
    costs = {0: 1e9, 1: 1e9, 2: 1.0}
    monkeypatch.setattr(
        "hessopt.kronecker.bandwidth.kronecker_operations",
        lambda factors, *_: costs[0 if not factors.pairs else 1 if len(_pairs(factors)) == 5 else 2],
    )
    for i in range(42):
        if i == 30:
            costs = {0: 1.0, 1: 1e9, 2: 1e9}
        steps(optimizer, net, x, y, 1, i)
        chosen.append(optimizer.band.bandwidth)
        # Off-diagonal averages are there in the band that is used, and in the window.
        assert optimizer.band.averages.factors is not None
        assert bool(optimizer.band.averages.factors.pairs) == (chosen[-1] != 0)
    assert chosen == [0] * 10 + [2] * 30 + [0] * 2  # decisions at 10, 20 and 40


def _pairs(factors: Any) -> list[Any]:
    return [pair for pairs in factors.pairs for pair in pairs.blocks]


def test_window_before_a_decision() -> None:
    net, x, y = problem()
    optimizer = declared(net, bandwidth=KroneckerBandwidth(40), factor_every=2)
    there = []
    for i in range(165):
        steps(optimizer, net, x, y, 1, i)
        there.append(optimizer.band.averages.probe is not None)
    window = KroneckerBandwidth().window * 2
    before = [i for decision in (40, 160) for i in range(decision - window, decision)]
    assert [i for i, is_there in enumerate(there) if is_there] == before


@pytest.mark.parametrize("curvature", ["fisher", "ggn"])
def test_stays_where_the_loss_is_nearly_zero(curvature: str) -> None:
    """In units of layers the damping vanishes with the curvature, but the rounding of gradients does not."""
    torch.manual_seed(0)
    y = torch.arange(512) % 10
    x = torch.rand(10, 16)[y] + 0.15 * torch.randn(512, 16) - 0.5
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = declared(net, curvature=curvature, damping_unit="layer", trust=2e-2)
    worst = 0.0
    for i in range(1500):
        rows = torch.arange(64) + 64 * (i % 8)
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        if i >= 1100:
            worst = max(worst, loss.item())
    assert worst < 1e-6


def test_rates_and_momentum_are_not_rounded_to_float32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    lr, decay, mu = 0.3, 0.07, 0.9
    optimizer = KroneckerNewton(net, lr, 0, weight_decay=decay, loss="mse", momentum=mu)
    nn.functional.mse_loss(net(x), y).backward()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    momentum = [optimizer._kronecker.momentum[p].clone() for p in net.parameters()]
    for p, b, m in zip(net.parameters(), before, momentum, strict=True):
        assert torch.allclose(p, (1 - lr * decay) * b - lr * m, rtol=1e-14, atol=1e-15)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    for p, m in zip(net.parameters(), momentum, strict=True):
        assert torch.allclose(optimizer._kronecker.momentum[p], mu * m, rtol=1e-14, atol=0)
