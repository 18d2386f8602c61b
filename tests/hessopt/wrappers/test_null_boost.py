"""NullBoost multiplies the gradient's part in a subspace, is its base at β = 1, and freezes nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessopt
from hessopt.errors import ClosureError
from hessopt.wrappers.null_boost import Mode, NullBoost

F64 = torch.float64
MODES = get_args(Mode)
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
}


class Problem:
    def __init__(self, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().to(device)
        self.x, self.y = torch.randn(16, 5, dtype=F64).to(device), torch.randint(0, 3, (16,)).to(device)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.y)

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return run

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.net.parameters()]).clone()

    def gradient(self) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(self.loss(), list(self.net.parameters()))])

    def hessian(self) -> Tensor:
        parameters = list(self.net.parameters())
        slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(self.loss(), parameters, create_graph=True)])
        rows = [torch.autograd.grad(s, parameters, retain_graph=True) for s in slope]
        return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", MODES)
def test_beta_1_is_the_base_bit_for_bit(base: str, mode: Mode, device: torch.device) -> None:
    ours, plain = Problem(device), Problem(device)
    optimizer = NullBoost(BASES[base](ours.net.parameters()), model=ours.net, mode=mode, beta=1.0, every=2, krylov=6)
    reference = BASES[base](plain.net.parameters())
    for _ in range(6):
        loss = optimizer.step(ours.closure(optimizer))
        expected = reference.step(plain.closure(reference))  # type: ignore[arg-type]
        assert loss == expected
        assert torch.equal(ours.flat(), plain.flat())
        for p, q in zip(ours.net.parameters(), plain.net.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_another_beta_is_not(mode: Mode) -> None:
    ours, plain = Problem(), Problem()
    optimizer = NullBoost(BASES["sgd"](ours.net.parameters()), mode=mode, krylov=10)
    optimizer.step(ours.closure(optimizer))
    reference = BASES["sgd"](plain.net.parameters())
    reference.step(plain.closure(reference))  # type: ignore[arg-type]
    assert not torch.equal(ours.flat(), plain.flat())
    assert optimizer.last_refresh is not None
    assert optimizer.last_refresh.rank >= 1


@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_that_of_the_boosted_gradient(mode: Mode, device: torch.device) -> None:
    """SGD of learning rate 1: θ₀ − θ₁ − g is (β − 1) QQᵀg, with the properties that the mode promises."""
    problem = Problem(device)
    before, g, hessian = problem.flat(), problem.gradient(), problem.hessian()
    optimizer = NullBoost(
        torch.optim.SGD(problem.net.parameters(), lr=1.0), mode=mode, beta=4.0, krylov=12, rank=3, seed=5
    )
    optimizer.step(problem.loss)
    extra = (before - problem.flat() - g) / 3  # QQᵀg
    report = optimizer.last_refresh
    assert report is not None
    q = optimizer._basis
    assert q is not None
    assert q.shape == (len(g), report.rank)
    torch.testing.assert_close(q.mT @ q, torch.eye(report.rank, dtype=F64, device=device), rtol=0, atol=1e-12)
    torch.testing.assert_close(extra, q @ (q.mT @ g), rtol=0, atol=1e-12)
    assert report.gradient_share == pytest.approx((extra.norm() / g.norm()).item(), rel=1e-9)
    form, top = q.mT @ hessian @ q, torch.linalg.matrix_norm(hessian, 2)
    krylov = g.unsqueeze(1) / g.norm()
    while krylov.shape[1] < 12:  # Arnoldi, dense
        rest = hessian @ krylov[:, -1]
        for _ in range(2):
            rest = rest - krylov @ (krylov.mT @ rest)
        krylov = torch.cat([krylov, (rest / rest.norm()).unsqueeze(1)], 1)
    ritz, own = torch.linalg.eigvalsh(krylov.mT @ hessian @ krylov), torch.linalg.eigvalsh(form)
    if mode == "null":
        assert form.abs().max() <= 1e-12 * top
    if mode == "negative_curvature":
        torch.testing.assert_close(own, ritz[:3], rtol=1e-9, atol=1e-12)
    if mode == "low_curvature":
        least = ritz[ritz.abs().argsort()[:3]].sort().values
        torch.testing.assert_close(own, least, rtol=1e-9, atol=1e-12)
    if mode == "random":
        assert report.products == 0
        assert report.inertia is None
    else:
        assert report.products == 12
        assert report.inertia is not None
        assert report.inertia == (int((ritz > 0).sum()), int((ritz < 0).sum()), 0)


def test_krylov_modes_stay_in_the_krylov_space_of_the_gradient() -> None:
    problem = Problem()
    g, hessian = problem.gradient(), problem.hessian()
    powers = [g]
    for _ in range(4):
        image = hessian @ powers[-1]
        powers.append(image / image.norm())
    krylov = torch.linalg.qr(torch.stack(powers, 1)).Q
    for mode in MODES:
        fresh = Problem()
        optimizer = NullBoost(BASES["sgd"](fresh.net.parameters()), mode=mode, krylov=5, rank=2)
        optimizer.step(fresh.loss)
        q = optimizer._basis
        if q is None:
            assert mode in ("null", "negative_curvature")
            continue
        outside = (q - krylov @ (krylov.mT @ q)).norm()
        assert outside > 0.5 if mode == "random" else outside < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_frozen_and_gradients_are_the_users(mode: Mode, device: torch.device) -> None:
    """The published optimizer leaves ``requires_grad`` False on what it boosts: every matrix must go on moving."""
    problem = Problem(device)
    optimizer = NullBoost(torch.optim.SGD(problem.net.parameters(), lr=0.1), model=problem.net, mode=mode, every=2)
    for _ in range(5):
        before = [p.detach().clone() for p in problem.net.parameters()]
        g = problem.gradient()
        state = torch.get_rng_state()
        optimizer.step(problem.closure(optimizer))
        assert torch.equal(state, torch.get_rng_state())
        assert all(p.requires_grad for p in problem.net.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, problem.net.parameters(), strict=True))
        assert torch.equal(torch.cat([p.grad.reshape(-1) for p in problem.net.parameters()]), g)  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", MODES)
def test_resuming_goes_on_bit_for_bit(mode: Mode) -> None:
    problem = Problem()
    optimizer = NullBoost(BASES["adam"](problem.net.parameters()), mode=mode, every=3, krylov=8)
    for _ in range(4):
        optimizer.step(problem.closure(optimizer))
    other = copy.deepcopy(problem)
    second = NullBoost(BASES["adam"](other.net.parameters()), mode=mode, every=3, krylov=8)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pickled = pickle.loads(pickle.dumps((problem, optimizer)))
    for _ in range(4):
        optimizer.step(problem.closure(optimizer))
        second.step(other.closure(second))
        pickled[1].step(pickled[0].closure(pickled[1]))
    assert torch.equal(problem.flat(), other.flat())
    assert torch.equal(problem.flat(), pickled[0].flat())


def test_steps_without_a_closure() -> None:
    problem = Problem()
    due = NullBoost(BASES["sgd"](problem.net.parameters()))
    problem.loss().backward()
    start = problem.flat()
    with pytest.raises(ClosureError, match="every=None and call refresh"):
        due.step()
    assert torch.equal(start, problem.flat())

    optimizer = NullBoost(torch.optim.SGD(problem.net.parameters(), lr=1.0), every=None, krylov=6, beta=3.0)
    kept = [p.grad.clone() for p in problem.net.parameters()]  # type: ignore[union-attr]
    report = optimizer.refresh(problem.loss)
    assert report is optimizer.last_refresh
    assert all(torch.equal(a, p.grad) for a, p in zip(kept, problem.net.parameters(), strict=True))  # type: ignore[arg-type]
    g, q = problem.gradient(), optimizer._basis
    assert q is not None
    assert optimizer.step() is None
    torch.testing.assert_close(start - problem.flat(), g + 2 * q @ (q.mT @ g), rtol=0, atol=1e-13)


def test_one_refresh_a_step_where_the_base_runs_the_closure_several_times() -> None:
    problem = Problem()
    optimizer = NullBoost(BASES["lbfgs"](problem.net.parameters()), every=2, krylov=4)
    for _ in range(3):
        optimizer.step(problem.closure(optimizer))
    assert optimizer._drawn == 2


def test_maximizing_turns_the_curvature_around() -> None:
    up, down = Problem(), Problem()
    a = NullBoost(torch.optim.SGD(up.net.parameters(), lr=0.1, maximize=True), mode="negative_curvature")
    b = NullBoost(torch.optim.SGD(down.net.parameters(), lr=0.1), mode="negative_curvature")
    a.step(lambda: -up.loss())
    b.step(down.loss)
    torch.testing.assert_close(up.flat(), down.flat(), rtol=0, atol=1e-12)
    assert a.last_refresh is not None
    assert b.last_refresh is not None
    assert a.last_refresh.inertia == b.last_refresh.inertia


def test_a_frozen_parameter_stays_and_a_zero_gradient_is_no_error() -> None:
    problem = Problem()
    first = next(problem.net.parameters())
    optimizer = NullBoost(BASES["sgd"](problem.net.parameters()), every=1)
    optimizer.step(problem.closure(optimizer))
    first.requires_grad_(False)
    before = first.detach().clone()
    optimizer.step(problem.closure(optimizer))
    assert torch.equal(before, first)
    still = Problem()
    optimizer = NullBoost(torch.optim.SGD(still.net.parameters(), lr=0.1))
    start = still.flat()
    optimizer.step(lambda: 0 * still.loss())
    assert torch.equal(start, still.flat())
    assert optimizer.last_refresh is not None
    assert optimizer.last_refresh.rank == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "all"}, "mode must be one of"),
        ({"beta": -1.0}, "beta must be"),
        ({"beta": float("inf")}, "beta must be"),
        ({"every": 0}, "every must be"),
        ({"krylov": 0}, "krylov must be"),
        ({"rank": 21}, "rank must be at most"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    base = torch.optim.SGD(Problem().net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        hessopt.NullBoost(base, **arguments)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        hessopt.NullBoost("sgd")  # type: ignore[arg-type]


@pytest.mark.parametrize("backward", [False, True])
def test_attention_uses_kernels_with_a_second_derivative(backward: bool) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=F64)
    optimizer = NullBoost(torch.optim.SGD(net.parameters(), lr=0.05), model=net, every=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        if backward:
            loss.backward()
        return loss

    losses = [float(cast(Tensor, optimizer.step(closure))) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optimizer.refresh(closure).rank > 0
