"""SaddleEscape leaves saddles, leaves everything else alone, and behaves as the optimizer that it wraps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics
import hessopt
from hessopt.closure.protocol import LeastSquares
from hessopt.errors import ClosureError
from hessopt.wrappers.saddle import SaddleEscape
from hessopt.wrappers.stationarity import Stationarity

F64 = torch.float64
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
}


def _linear(depth: int, width: int = 4, scale: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(scale * torch.eye(width, dtype=F64))
    return net


def _closure(optimizer: torch.optim.Optimizer, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("depth", [2, 3])
def test_leaves_the_saddle_at_the_origin_of_a_deep_linear_network(base: str, depth: int, device: torch.device) -> None:
    # at depth 3 the Hessian vanishes at the origin itself: the start is next to it
    net = _linear(depth, scale=0.0 if depth == 2 else 1e-3).to(device)
    x, y = torch.eye(4, dtype=F64, device=device), torch.diag(torch.tensor([2.0, 1.5, 1, 0.5], dtype=F64)).to(device)
    saddle = F.mse_loss(torch.zeros_like(y), y).item()
    optimizer = SaddleEscape(BASES[base](net.parameters()), model=net)
    closure = _closure(optimizer, net, x, y)
    optimizer.step(closure)
    check = optimizer.last_check
    assert check is not None
    assert check.escaped
    assert check.loss == pytest.approx(saddle, rel=1e-6)
    assert closure().item() < 0.75 * saddle  # the first eigenvalue holds 4 / 7.5 of the loss
    for _ in range(300):
        optimizer.step(closure)
    assert closure().item() < 1e-2 * saddle  # several saddles later


def test_the_base_alone_stays() -> None:
    net = _linear(2)
    optimizer = BASES["sgd"](net.parameters())
    closure = _closure(optimizer, net, torch.eye(4, dtype=F64), torch.eye(4, dtype=F64))
    losses = [optimizer.step(closure).item() for _ in range(50)]  # type: ignore[arg-type, attr-defined]
    assert losses[0] == losses[-1]


def test_the_direction_is_the_eigenvector_of_the_dense_hessian() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.01)
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, 2, dtype=F64)
    y -= y.mean(0)  # so that biases have no slope
    before = torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])
    graph = diagnostics.capture(net, x, lambda z: F.mse_loss(z, y))
    hessian = diagnostics.parameter_hessian(graph)
    values = torch.linalg.eigvalsh(hessian)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))])
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.0), model=net, max_products=60)
    optimizer.step(_closure(optimizer, net, x, y))
    check = optimizer.last_check
    assert check is not None
    assert check.escaped
    assert check.eigenvalues[0] == pytest.approx(values[0].item(), rel=1e-4)
    assert check.norm == pytest.approx(values.abs().max().item(), rel=1e-4)
    assert check.gradient_norm == pytest.approx(g.norm().item(), rel=1e-12)
    moved = torch.cat([p.detach().reshape(-1) for p in net.parameters()]) - before
    # eigenvalues lie close together here, so it is the curvature along the move that tells
    assert float(moved @ hessian @ moved / moved.square().sum()) == pytest.approx(values[0].item(), rel=1e-3)
    assert float(g @ moved) / float(moved.norm()) == pytest.approx(check.slope * (1 if check.length > 0 else -1))
    assert check.slope < 0
    assert float(moved.norm()) == pytest.approx(abs(check.length), rel=1e-12)
    assert F.mse_loss(net(x), y).item() == pytest.approx(check.loss_after, rel=1e-12)
    assert check.loss - check.loss_after > check.gradient_norm**2 / (2 * check.norm)


def test_a_convex_problem_never_triggers() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 3).double()
    x, y = torch.randn(40, 5, dtype=F64), torch.randint(0, 3, (40,))
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=1.0), model=net)

    def closure() -> Tensor:
        return F.cross_entropy(net(x), y)

    checks = set()
    for _ in range(500):
        optimizer.step(closure)
        checks.add(optimizer.last_check)
    assert optimizer.escapes == 0
    assert 1 < len(checks) < 10  # it was looked for on the plateau at the end, ever more rarely


def _digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with batch statistics and dropout: what a careless check would change."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3)).double()
    x = torch.randn(40, 8, dtype=F64)
    return net, x, x[:, :3].argmax(1)


def test_negative_curvature_on_a_slope_is_no_saddle() -> None:
    def f(p: Tensor) -> Tensor:  # at the origin the slope gains 10²/2 within the step 1/‖H‖, the curvature 1/4
        return 10 * p[0] + p[0] ** 2 / 2 - p[1] ** 2 / 2 + p[1] ** 4 / 4

    p = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = SaddleEscape(torch.optim.SGD([p], lr=0.0))
    optimizer.step(lambda: f(p))
    check = optimizer.last_check
    assert check is not None
    assert check.eigenvalues == pytest.approx((-1.0,))
    assert check.reason.endswith("on a slope: steepest descent gains 50 of 0")
    assert check.evaluations == 0
    assert torch.equal(p, torch.zeros(2, dtype=F64))
    with torch.no_grad():
        p[0] = -9.9  # where the slope is nearly gone, the same curvature is a saddle's
    optimizer.stationarity.wait = 0
    optimizer.step(lambda: f(p))
    assert optimizer.escapes == 1
    assert p[1].abs().item() == pytest.approx(1.0, rel=0.5)


def _classify(optimizer: torch.optim.Optimizer, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def test_checks_that_cost_too_much_beside_the_steps_are_put_off(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()  # convex, on a plateau from the start
    x, y = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    rule = Stationarity(patience=1, max_wait=1, plateau=1.0, overhead=0.5, free=60)
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=1e-9), model=net, stationarity=rule)
    closure, checks = _closure(optimizer, net, x, y), 0
    with caplog.at_level("WARNING", logger="hessopt.wrappers.saddle"):
        for step in range(120):
            before = optimizer.last_check
            optimizer.step(closure)
            checks += optimizer.last_check is not before
            assert rule.spent <= max(60, 0.5 * step)
    assert checks > 2
    assert rule.put_off > 60
    assert caplog.text.count("the next one is put off") == 1
    again = SaddleEscape(torch.optim.SGD(net.parameters(), lr=1e-9), model=net)
    again.load_state_dict(optimizer.state_dict())
    assert again.stationarity.spent == rule.spent
    assert again.stationarity.put_off == rule.put_off


def test_a_check_keeps_to_its_memory() -> None:
    net = _linear(2, width=12)
    x, y = torch.eye(12, dtype=F64), torch.diag(torch.linspace(2, 0.5, 12, dtype=F64))
    vector = 8 * sum(p.numel() for p in net.parameters())
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.1), model=net, memory_limit=8 * vector)
    optimizer.step(_closure(optimizer, net, x, y))
    assert optimizer.last_check is not None
    assert optimizer.last_check.escaped
    before = [p.clone() for p in net.parameters()]
    small = SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.1), model=net, memory_limit=4 * vector)
    with pytest.raises(diagnostics.MemoryBudgetError, match="more than the limit"):
        small.step(_closure(small, net, x, y))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert small.last_check is None
    with pytest.raises(ValueError, match="a number of bytes"):
        SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.1), memory_limit=0)


def test_is_the_base_bit_for_bit_where_nothing_is_due() -> None:
    ends = []
    for wrap in (False, True):
        net, x, y = _digits()
        optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        if wrap:
            optimizer = SaddleEscape(optimizer, model=net, stationarity=Stationarity(plateau=0.0, gradient_ratio=0.0))
            optimizer.stationarity.checked(escaped=False)  # the one at the start is not wanted here
        torch.manual_seed(1)
        losses = [optimizer.step(_classify(optimizer, net, x, y)).item() for _ in range(20)]  # type: ignore[arg-type, attr-defined]
        ends.append((losses, copy.deepcopy(net.state_dict()), torch.get_rng_state()))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_check_without_an_escape_leaves_no_trace() -> None:
    ends = []
    for due in (False, True):
        net, x, y = _digits()
        optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=1e-3), model=net, threshold=0.99)
        if not due:
            optimizer.stationarity.checked(escaped=False)
        torch.manual_seed(1)
        losses = [optimizer.step(_classify(optimizer, net, x, y)).item()]
        assert optimizer.escapes == 0
        ends.append((losses, copy.deepcopy(net.state_dict()), [p.grad for p in net.parameters()]))
        assert (optimizer.last_check is not None) == due
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_closures_of_all_kinds_give_the_same_steps() -> None:
    runs = {}
    for kind in ("backward", "loss", "pair", "least squares"):
        net, x, y = _linear(2), torch.eye(4, dtype=F64), torch.eye(4, dtype=F64)
        optimizer = SaddleEscape(BASES["sgd"](net.parameters()), model=net)

        def closure(
            kind: str = kind, net: nn.Module = net, x: Tensor = x, y: Tensor = y, optimizer: Any = optimizer
        ) -> Any:
            z = net(x)
            loss = (z - y).square().sum() / 2
            if kind == "backward":
                optimizer.zero_grad()
                loss.backward()
            return {"pair": (loss, z), "least squares": LeastSquares(z - y)}.get(kind, loss)

        runs[kind] = [float(optimizer.step(closure)) for _ in range(30)]
        assert optimizer.escapes >= 1
    for losses in runs.values():
        assert losses == pytest.approx(runs["loss"], rel=1e-12)


@pytest.mark.parametrize("base", ["banded", "kronecker", "newton-cg", "spectral"])
def test_around_optimizers_of_this_package(base: str) -> None:
    """The steps are the base's own, and what it saw of loss and gradient is what the checks go by."""
    make = {
        "banded": hessopt.BandedNewton,
        "kronecker": partial(hessopt.KroneckerNewton, bandwidth="auto", loss="cross_entropy"),
        "newton-cg": hessopt.NewtonCG,
        "spectral": partial(hessopt.SpectralNewton, lr=0.01),
    }[base]
    ends = []
    for wrap in (False, True):
        net, x, y = _digits()
        optimizer: Any = make(net)
        if wrap:
            optimizer = SaddleEscape(optimizer, model=net, stationarity=Stationarity(plateau=0.0, gradient_ratio=0.0))
            optimizer.stationarity.checked(escaped=False)
            seen: list[tuple[float, float]] = []
            optimizer.stationarity.observe = lambda *figures, seen=seen: seen.append(figures)
        twin = copy.deepcopy(net)  # has other batch statistics afterwards
        torch.manual_seed(1)  # of the dropout
        slopes = torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters()))
        torch.manual_seed(1)
        losses = [float(optimizer.step(_classify(optimizer, net, x, y))) for _ in range(3)]
        ends.append((losses, copy.deepcopy(net.state_dict())))
        norm = float(torch.cat([g.flatten() for g in slopes]).norm())
    assert seen[0] == pytest.approx((losses[0], norm), rel=1e-4)
    assert len(seen) == 3
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_state_of_the_base_is_emptied_after_an_escape_only_if_wanted() -> None:
    for reset in (True, False):
        net = _linear(2)
        optimizer = SaddleEscape(BASES["adamw"](net.parameters()), model=net, reset_state=reset)
        closure = _closure(optimizer, net, torch.eye(4, dtype=F64), torch.eye(4, dtype=F64))
        optimizer.stationarity.checked(escaped=False)
        for _ in range(3):
            optimizer.step(closure)
        optimizer.stationarity.checked(escaped=True)
        optimizer.stationarity.wait = 0
        optimizer.step(closure)
        assert optimizer.last_check is not None
        assert optimizer.last_check.escaped
        assert {int(s["step"]) for s in optimizer.base.state.values()} == ({1} if reset else {4})


def test_resumes_bit_for_bit() -> None:
    net, x, y = _linear(3, scale=1e-3), torch.eye(4, dtype=F64), torch.diag(torch.arange(1.0, 5, dtype=F64))
    optimizer = SaddleEscape(BASES["adamw"](net.parameters()), model=net, directions=2)
    for _ in range(25):
        optimizer.step(_closure(optimizer, net, x, y))
    saved = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    other = _linear(3, scale=7.0)
    resumed = SaddleEscape(BASES["adamw"](other.parameters()), model=other, directions=2)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    other.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    for _ in range(40):
        a = optimizer.step(_closure(optimizer, net, x, y))
        b = resumed.step(_closure(resumed, other, x, y))
        assert torch.equal(a, b)
    assert optimizer.last_check is None or resumed.escapes == optimizer.escapes


def test_shares_groups_and_state_with_its_base_and_can_be_scheduled_and_copied() -> None:
    net = _linear(2)
    base = torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.5)
    optimizer = SaddleEscape(base, model=net)
    optimizer.add_param_group({"params": net[1].parameters(), "lr": 0.2})
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(_closure(optimizer, net, torch.eye(4, dtype=F64), torch.eye(4, dtype=F64)))
    scheduler.step()
    assert [group["lr"] for group in base.param_groups] == [0.05, 0.1]
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.param_groups is other.base.param_groups
        assert [group["lr"] for group in other.param_groups] == [0.05, 0.1]
        assert other.last_check == optimizer.last_check
    assert "SGD" in repr(optimizer)


def test_maximizing_escapes_upwards() -> None:
    net, x, y = _linear(2), torch.eye(4, dtype=F64), torch.eye(4, dtype=F64)
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.05, maximize=True), model=net)
    losses = [float(optimizer.step(lambda: -(net(x) - y).square().sum())) for _ in range(100)]
    assert optimizer.escapes >= 1
    assert losses[-1] > -1e-6


def test_explains_which_nodes_bend_down() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.1)
    x, y = torch.randn(20, 3, dtype=F64), torch.randn(20, 2, dtype=F64)
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.0), model=net, max_products=80)
    graph = diagnostics.capture(net, x, lambda z: F.mse_loss(z, y))
    hessian = diagnostics.parameter_hessian(graph)
    with pytest.raises(RuntimeError, match="no curvature check has been made"):
        optimizer.explain(graph)
    before = copy.deepcopy(net.state_dict())
    optimizer.step(_closure(optimizer, net, x, y))
    net.load_state_dict(before)
    graph = diagnostics.capture(net, x, lambda z: F.mse_loss(z, y))
    shares = optimizer.explain(graph)
    value = torch.linalg.eigvalsh(hessian)[0].item()
    assert sum(shares.values()) == pytest.approx(value, rel=1e-6)
    assert shares["gauss-newton"] >= 0
    assert min(shares.values()) < 0.5 * value


def test_errors_name_the_way_out() -> None:
    net = _linear(2)
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got list"):
        SaddleEscape(list(net.parameters()))  # type: ignore[arg-type]
    for bad in ({"directions": 0}, {"max_trials": 0}, {"threshold": 1.0}, {"max_products": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SaddleEscape(torch.optim.SGD(net.parameters()), **bad)
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.1), model=net)
    with pytest.raises(ClosureError, match=r"SaddleEscape\.step\(\) needs a closure"):
        optimizer.step()
    with pytest.raises(ClosureError, match="loss is nan at the current parameters, which were left"):
        optimizer.step(lambda: net(torch.full((1, 4), torch.nan, dtype=F64)).sum())


def test_attention_uses_kernels_with_a_second_derivative() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=F64)
    optimizer = SaddleEscape(torch.optim.SGD(net.parameters(), lr=0.05), model=net)
    losses = [optimizer.step(lambda: (net(x) - 1).square().mean()).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optimizer.last_check is not None


@pytest.mark.parametrize("wrapper", [hessopt.SaddleEscape, hessopt.NullBoost, hessopt.NullProject])
def test_an_optimizer_that_draws_rows_is_refused(wrapper: Any) -> None:
    """Wrappers call the closure themselves, and would have no rows to give it."""
    net = nn.Linear(2, 1)
    base = hessopt.BandedNewton(net, rows=10)
    with pytest.raises(ValueError, match=rf"{wrapper.__name__} calls closures itself.*without rows="):
        wrapper(base, model=net)
