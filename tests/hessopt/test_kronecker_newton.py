"""The update rule around the Kronecker engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt.kronecker_newton import KroneckerNewton


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
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("bandwidth", [0, 1, "full"])
@pytest.mark.parametrize("curvature", ["fisher", "ggn", "empirical"])
def test_learns_with_the_defaults(bandwidth: Any, curvature: str, device: torch.device) -> None:
    net, x, y = problem()
    net, x, y = net.to(device), x.to(device), y.to(device)
    optimizer = KroneckerNewton(net, bandwidth=bandwidth, curvature=curvature, loss="cross_entropy")
    losses = steps(optimizer, net, x, y, 200)
    assert torch.stack(losses[-8:]).mean() < 0.5 * torch.stack(losses[:4]).mean()


@pytest.mark.parametrize("bandwidth", [0, 1, "full"])
@pytest.mark.parametrize("curvature", ["fisher", "empirical"])
@pytest.mark.parametrize("after", [1, 5, 8])
def test_resumes_bit_for_bit(bandwidth: Any, curvature: str, after: int) -> None:
    def build(net: nn.Module) -> KroneckerNewton:
        return KroneckerNewton(
            net, bandwidth=bandwidth, curvature=curvature, loss="cross_entropy", factor_every=4, inverse_every=6
        )

    net, x, y = problem()
    optimizer = build(net)
    steps(optimizer, net, x, y, after)
    other = copy.deepcopy(problem()[0])
    other.load_state_dict(net.state_dict())
    resumed = build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = steps(optimizer, net, x, y, 15, after)
    found = steps(resumed, other, x, y, 15, after)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_is_plain_and_of_this_network() -> None:
    net, x, y = problem()
    optimizer = KroneckerNewton(net, bandwidth=1, loss="cross_entropy")
    steps(optimizer, net, x, y, 2)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="another network or bandwidth"):
        KroneckerNewton(problem()[0], bandwidth=0, loss="cross_entropy").load_state_dict(copy.deepcopy(state))
    path = torch.serialization.io.BytesIO() if hasattr(torch.serialization, "io") else None
    if path is not None:
        torch.save(state, path)
        path.seek(0)
        torch.load(path, weights_only=True)


def test_trust_region_bounds_the_model() -> None:
    net, x, y = problem()
    optimizer = KroneckerNewton(net, lr=1.0, momentum=0.0, trust=1e-3, bandwidth=1, loss="cross_entropy", decay=0.0)
    before = [p.detach().clone() for p in net.parameters()]
    steps(optimizer, net, x, y, 1)
    change = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
    bound = 1e-3 * optimizer.band.scale
    measured = optimizer.band.quadratic(change)
    damping = optimizer.band.absolute_damping * sum(c.square().sum() for c in change)
    assert 0 < measured + damping <= bound * 1.0001
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])  # type: ignore[union-attr]
    # The bound is attained by the damped model: step = -σ d with σ² g'd = bound.
    decrement = optimizer.band.direction([p.grad for p in net.parameters()]).decrement
    scale = (bound / decrement).sqrt()
    assert torch.allclose(gradient @ torch.cat([c.flatten() for c in change]), -scale * decrement, rtol=1e-4)


def test_weight_decay_maximize_grafting_and_groups() -> None:
    net, x, y = problem()
    twin = copy.deepcopy(net)
    steps(KroneckerNewton(net, loss="cross_entropy"), net, x, y, 5)
    optimizer = KroneckerNewton(twin, loss="cross_entropy", maximize=True)
    for i in range(5):
        rows = torch.arange(16) + 16 * (i % 4)
        optimizer.zero_grad()
        (-functional.cross_entropy(twin(x[rows]), y[rows])).backward()
        optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)

    net = problem()[0]
    optimizer = KroneckerNewton(net, lr=0.1, weight_decay=0.5, loss="cross_entropy")
    before = [p.detach().clone() for p in net.parameters()]
    functional.cross_entropy(net(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()
    for p, b in zip(net.parameters(), before, strict=True):
        assert torch.allclose(p, 0.95 * b, rtol=1e-6)

    net = problem()[0]
    optimizer = KroneckerNewton(net, lr=0.1, momentum=0.0, graft="sgd", loss="cross_entropy")
    before = [p.detach().clone() for p in net.parameters()]
    steps(optimizer, net, x, y, 1)
    for p, b in zip(net.parameters(), before, strict=True):
        assert torch.allclose((p - b).norm(), 0.1 * p.grad.norm(), rtol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("declared", [True, False])
def test_adapts_the_damping_with_a_closure(declared: bool) -> None:
    net, x, y = problem()
    options = {"loss": "cross_entropy"} if declared else {"curvature": "ggn"}
    optimizer = KroneckerNewton(net, bandwidth=1, adapt_every=2, trust=1e-4, **options)  # type: ignore[arg-type]

    def closure() -> Any:
        z = net(x)
        loss = functional.cross_entropy(z, y)
        if not declared:
            return loss, z
        optimizer.zero_grad()
        loss.backward()
        return loss

    start = optimizer.band.damping
    losses = [optimizer.step(closure) for _ in range(20)]
    # Steps this small are predicted well, so the damping falls.
    assert optimizer.band.damping < start
    assert losses[-1] < losses[0]  # type: ignore[operator]
    optimizer.param_groups[0]["lr"] = 300.0
    optimizer.trust = None
    before = optimizer.band.damping
    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.band.damping > before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"trust": 0.0}, "trust must be"),
        ({"graft": "adam"}, "graft must be"),
        ({"adapt_every": 0}, "adapt_every must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KroneckerNewton(problem()[0], **options)
