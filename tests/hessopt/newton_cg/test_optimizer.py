"""NewtonCG's steps beside dense linear algebra, and what it does with closures, groups and failures."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.errors import DiagnosticsError
from hessopt.closure.protocol import LeastSquares
from hessopt.errors import ClosureError, ModelError
from hessopt.newton_cg.optimizer import NewtonCG
from hessopt.newton_cg.truncated_cg import Exit
from hessopt.search.rules import LevenbergMarquardt, TrustRadius
from tests.hessopt.closure.test_step_curvature import dense

OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "hessian": {"curvature": "hessian"},
    "ggn": {"curvature": "ggn"},
    "levenberg-marquardt": {"method": LevenbergMarquardt(1e-2)},
    "diagonal": {"preconditioner": "diagonal"},
    "warm start": {"warm_start": True},
    "everything": {
        "method": LevenbergMarquardt(1e-2),
        "curvature": "ggn",
        "preconditioner": "diagonal",
        "warm_start": True,
        "weight_decay": 1e-3,
    },
}


def regression(
    seed: int = 0, device: torch.device | str = "cpu", noise: float = 1.0
) -> tuple[nn.Module, Tensor, Tensor]:
    """A tanh network with targets that it cannot fit."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    y = x.prod(1, keepdim=True) + noise * torch.randn(20, 1, generator=generator, dtype=torch.float64)
    return net.to(device), x.to(device), y.to(device)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def run(net: nn.Module, closure: Callable[[], Any], steps: int, **options: Any) -> NewtonCG:
    optimizer = NewtonCG(net, **options)
    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_full_step_is_the_dense_one_by_groups(kind: str, maximize: bool, device: torch.device) -> None:
    """θ - γ (±C + ω)⁻¹ (±∇f + ωθ) with γ and ω by groups."""
    net, x, y = regression(device=device)
    sign = -1.0 if maximize else 1.0

    def loss_fn(z: Tensor) -> Tensor:
        return sign * functional.mse_loss(z, y)

    gradient, hessian, ggn = dense(net, x, loss_fn)
    decay = torch.cat([torch.full((12,), 3.0), torch.full((5,), 2.0)]).double().to(device)  # convex with these
    rates = torch.cat([torch.full((12,), 0.5), torch.full((5,), 0.25)]).double().to(device)
    theta = flat(net)
    matrix = sign * (hessian if kind == "hessian" else ggn) + decay.diag()
    g = sign * gradient + decay * theta
    expected = -rates * torch.linalg.solve(matrix, g)
    groups = [
        {"params": net[0].parameters(), "lr": 0.5, "weight_decay": 3.0},
        {"params": net[2].parameters(), "lr": 0.25, "weight_decay": 2.0},
    ]
    optimizer = NewtonCG(groups, curvature=kind, model=net, maximize=maximize, method=TrustRadius(1e6), forcing=1e-12)
    optimizer.step(lambda: loss_fn(net(x)))
    last = optimizer.last_step
    assert last.accepted
    assert last.trials == 1
    assert torch.allclose(flat(net) - theta, expected, rtol=1e-8, atol=1e-10)
    assert last.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    step = flat(net) - theta
    assert last.predicted_reduction == pytest.approx(-float(g @ step + step @ matrix @ step / 2), rel=1e-8)
    before = float(sign * loss_fn(torch.zeros_like(y))) * 0  # the objective by hand, weight decay included
    for value, point in ((1, theta), (-1, flat(net))):
        loss = last.loss if value == 1 else last.trial_loss
        before += value * (sign * loss + float((decay * point**2).sum()) / 2)
    assert last.actual_reduction == pytest.approx(before, rel=1e-10)
    assert last.smallest_ritz == pytest.approx(float(torch.linalg.eigvalsh(matrix)[0]), rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_quadratic_in_one_step(options: str) -> None:
    """Linear least squares from far away: one step, whatever the options (without a radius in the way)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    b = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    net = nn.Linear(5, 1, bias=False).double()
    far = LevenbergMarquardt(1e-12) if "method" in OPTIONS[options] else TrustRadius(1e6)
    chosen = {**OPTIONS[options], "weight_decay": 0.1, "forcing": 1e-12, "method": far}
    run(net, lambda: LeastSquares(net(a) - b), 1, **chosen)
    best = torch.linalg.solve(a.T @ a + 0.1 * torch.eye(5, dtype=torch.float64), a.T @ b)
    assert torch.allclose(net.weight.T, best, rtol=1e-8)


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize(maximize: bool) -> None:
    ends = []
    for sign in (1, -1) if maximize else (1, 1):
        net, x, y = regression()
        loss = closures(net, x, y)["plain"]
        run(net, lambda s=sign, f=loss: s * f(), 8, maximize=sign < 0, weight_decay=0.01)
        ends.append(flat(net))
    assert torch.equal(*ends)


def closures(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    optimizer = torch.optim.SGD(net.parameters())

    def plain() -> Tensor:
        return functional.mse_loss(net(x), y)

    def backward() -> Tensor:
        optimizer.zero_grad()
        loss = plain()
        loss.backward()
        return loss

    def pair() -> tuple[Tensor, Tensor]:
        z = net(x)
        return functional.mse_loss(z, y), z

    def squares() -> LeastSquares:
        return LeastSquares((net(x) - y) * (2 / len(y)) ** 0.5)

    return {"plain": plain, "backward": backward, "pair": pair, "least squares": squares}


@pytest.mark.parametrize("options", ["auto", "hessian", "ggn", "levenberg-marquardt"])
@pytest.mark.parametrize("kind", ["backward", "pair", "least squares"])
def test_closures_of_all_kinds_give_the_same_steps(kind: str, options: str) -> None:
    ends = []
    for which in ("plain", kind):
        net, x, y = regression()
        run(net, closures(net, x, y)[which], 4, **OPTIONS[options])
        ends.append(flat(net))
    if kind == "least squares":
        assert torch.allclose(*ends, rtol=1e-6)
    else:
        assert torch.equal(*ends)


def test_gradients_are_the_closures_own() -> None:
    net, x, y = regression()
    for p in net.parameters():
        p.grad = torch.full_like(p, 3.0)
    run(net, closures(net, x, y)["plain"], 2)
    assert all(bool((p.grad == 3).all()) for p in net.parameters())
    expected = torch.autograd.grad(functional.mse_loss(net(x), y), list(net.parameters()))
    run(net, closures(net, x, y)["backward"], 1)
    assert all(torch.allclose(p.grad, e, rtol=1e-12) for p, e in zip(net.parameters(), expected, strict=True))
    assert not any(p.grad.requires_grad for p in net.parameters())


def test_inside_no_grad_and_without_a_trace() -> None:
    ends = []
    for enabled in (True, False):
        net, x, y = regression()
        with torch.set_grad_enabled(enabled):
            run(net, closures(net, x, y)["plain"], 4)
        ends.append(flat(net))
        assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    assert torch.equal(*ends)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", [TrustRadius(), LevenbergMarquardt()])
def test_rejection_restores_bit_for_bit(method: Any, bad: float) -> None:
    net, x, y = regression()
    before = [p.detach().clone() for p in net.parameters()]
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        loss = functional.mse_loss(net(x), y)
        return loss if len(calls) == 1 else loss * bad

    optimizer = run(net, closure, 1, method=method, max_trials=3)
    last = optimizer.last_step
    assert not last.accepted
    assert last.trials == 3
    assert len(calls) == 4
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    if isinstance(method, TrustRadius):
        assert last.radius == pytest.approx(0.0625**3 * min(1.0, 1.0), rel=0.9)
        assert last.radius <= 0.0625**3
    else:
        assert last.damping == pytest.approx(2e-2)
    products = sum(last.products.values())
    assert products == last.iterations  # a rejection costs no product
    calls.clear()
    assert not optimizer.step(closure).isnan()


def test_rejected_trial_shrinks_and_succeeds_without_products() -> None:
    p = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = NewtonCG([p], method=TrustRadius(100.0))
    optimizer.step(lambda: (1 + p**2).sqrt().sum())  # Newton's step goes to -27
    last = optimizer.last_step
    assert last.accepted
    assert last.trials > 1
    assert last.products["hessian"] == 1
    assert abs(p.item()) < 3
    assert last.exit is Exit.BOUNDARY


def test_negative_curvature_is_followed_to_the_boundary() -> None:
    p = nn.Parameter(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    optimizer = NewtonCG([p], method=TrustRadius(0.5))
    before = p.detach().clone()
    optimizer.step(lambda: p[0] ** 4 / 4 - p[0] ** 2 / 2 + 5 * p[1] ** 2)
    last = optimizer.last_step
    assert last.exit in (Exit.NEGATIVE_CURVATURE, Exit.BOUNDARY)
    assert (p - before).norm().item() == pytest.approx(0.5)
    for _ in range(20):
        optimizer.step(lambda: p[0] ** 4 / 4 - p[0] ** 2 / 2 + 5 * p[1] ** 2)
    assert torch.allclose(p, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-8)


def test_only_the_output_serves_the_gauss_newton_matrix() -> None:
    net, x, y = regression()
    way_out = r"\(loss, output\).*LeastSquares"
    with pytest.raises(ClosureError, match=rf'curvature="ggn".*2 times.*{way_out}'):
        run(net, lambda: (net(x) - net(-x) - y).square().mean(), 1, curvature="ggn")
    with pytest.raises(ClosureError, match=rf"depends on parameter 2 .*weight_decay.*{way_out}"):
        run(net, lambda: (net(x) - y).square().mean() + net[2].weight.square().sum(), 1, curvature="ggn")
    with pytest.raises(ClosureError, match=rf"given no module.*{way_out}"):
        NewtonCG(net.parameters(), curvature="ggn").step(lambda: (net(x) - y).square().mean())
    optimizer = NewtonCG(net.parameters(), curvature="ggn")
    optimizer.step(lambda: LeastSquares(net(x) - y))
    assert optimizer.last_step.curvature == "ggn"


def test_auto_falls_back_to_the_hessian_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    net, x, y = regression()
    for closure, model in (
        (lambda: (net(x) - net(-x) - y).square().mean(), net),
        (lambda: (net(x) - y).square().mean(), None),
    ):
        caplog.clear()
        optimizer = NewtonCG(net.parameters(), model=model)
        with caplog.at_level(logging.INFO, "hessopt"):
            for _ in range(3):
                optimizer.step(closure)
                assert optimizer.last_step.curvature == "hessian"
        assert [r.message for r in caplog.records if "uses the full Hessian" in r.message].__len__() == 1


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("through_file", [False, True])
def test_resume_bit_for_bit(options: str, through_file: bool) -> None:
    chosen = {**OPTIONS[options], "lr": 0.9}
    net, x, y = regression()
    optimizer = run(net, closures(net, x, y)["plain"], 6, **chosen)
    saved: Any = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    saved = copy.deepcopy(saved)
    other, x, y = regression(seed=9)
    resumed = NewtonCG(other, **chosen)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(6):
        assert optimizer.step(closures(net, x, y)["plain"]) == resumed.step(closures(other, x, y)["plain"])
        assert optimizer.last_step == resumed.last_step
    assert torch.equal(flat(net), flat(other))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(clone: Callable[[NewtonCG], NewtonCG]) -> None:
    net, x, y = regression()
    optimizer = run(net, closures(net, x, y)["plain"], 3, max_products=7)
    twin = clone(optimizer)
    assert twin.model is not net
    assert twin.param_groups[0]["params"][0] is twin.model[0].weight
    assert (twin.max_products, twin.last_step) == (7, optimizer.last_step)
    for _ in range(3):
        optimizer.step(closures(net, x, y)["plain"])
        twin.step(closures(twin.model, x, y)["plain"])
    assert torch.equal(flat(net), flat(twin.model))


def test_frozen_unused_and_late_parameters() -> None:
    net, x, y = regression()
    net[0].weight.requires_grad_(False)
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = NewtonCG([*net.parameters(), extra], model=net)
    before = flat(net)
    optimizer.step(closures(net, x, y)["plain"])
    changed = flat(net) != before
    assert not changed[:8].any()
    assert changed[8:].any()
    assert bool((extra == 1).all())
    net[0].weight.requires_grad_(True)
    for _ in range(2):
        optimizer.step(closures(net, x, y)["plain"])
    assert not torch.equal(flat(net)[:8], before[:8])
    for p in [*net.parameters(), extra]:
        p.requires_grad_(False)
    with pytest.raises(ClosureError, match="none of the optimizer's parameters requires grad"):
        optimizer.step(closures(net, x, y)["plain"])


def test_shared_weights() -> None:
    torch.manual_seed(0)
    inner = nn.Linear(3, 3)
    net = nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    optimizer = NewtonCG(net)
    losses = [optimizer.step(lambda: (net(x) - 1).square().mean()).item() for _ in range(15)]
    assert losses[-1] < 1e-3 * losses[0]


def test_dropout_and_batch_norm(device: torch.device) -> None:
    """Trials see the first run's mask and statistics; afterwards both are as if the closure had run once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    net.to(device)
    x = torch.randn(9, 3, dtype=torch.float64).to(device)
    seen = []

    def closure() -> Tensor:
        loss = net(x).square().mean()
        seen.append(loss.item())
        return loss

    twin = copy.deepcopy(net)
    torch.manual_seed(3)
    twin(x)
    expected = torch.rand(2), torch.rand(2, device=device)
    torch.manual_seed(3)
    optimizer = NewtonCG(net, lr=1e-30)
    optimizer.step(closure)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    found = torch.rand(2), torch.rand(2, device=device)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(net[1].running_mean, twin[1].running_mean)
    optimizer = NewtonCG(net)
    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.last_step.ratio is not None
        assert 1e-4 < optimizer.last_step.ratio < 3


def test_attention_uses_kernels_with_a_second_derivative() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    optimizer = NewtonCG(net)
    losses = [optimizer.step(lambda: (net(x) - 1).square().mean()).item() for _ in range(3)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("preconditioner", ["none", "diagonal"])
def test_warm_start_begins_with_the_last_direction(preconditioner: str) -> None:
    net, x, y = regression()
    optimizer = run(net, closures(net, x, y)["plain"], 3, warm_start=True, preconditioner=preconditioner)
    state = optimizer.state[net[0].weight]
    assert "direction" in state
    assert state["direction"].shape == net[0].weight.shape


def test_preconditioner_by_hand() -> None:
    """The exact inverse: one product a step."""
    net, x, y = regression()
    _, _, ggn = dense(net, x, lambda z: functional.mse_loss(z, y))
    matrix = ggn + torch.eye(len(ggn), dtype=torch.float64)
    optimizer = NewtonCG(
        net,
        curvature="ggn",
        weight_decay=1.0,
        forcing=1e-8,
        method=TrustRadius(1e6),
        preconditioner=lambda v: torch.linalg.solve(matrix, v),
    )
    optimizer.step(closures(net, x, y)["plain"])
    assert optimizer.last_step.iterations == 1


def test_lr_scheduler_hooks_and_printing() -> None:
    net, x, y = regression()
    optimizer = NewtonCG(net, lr=torch.tensor(1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for _ in range(3):
        optimizer.step(closures(net, x, y)["plain"])
        schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == 0.125
    assert len(seen) == 3
    assert repr(optimizer).startswith("NewtonCG (")
    assert set(optimizer.param_groups[0]) >= {"params", "lr", "weight_decay", "maximize"}


def test_zero_gradient_and_zero_lr_change_nothing() -> None:
    net, x, y = regression()
    before = flat(net)
    for options in OPTIONS.values():
        optimizer = NewtonCG(net, **{**options, "weight_decay": 0.0})
        optimizer.step(lambda: functional.mse_loss(net(x), y) * 0)
        assert optimizer.last_step.exit is Exit.STATIONARY
        optimizer = NewtonCG(net, lr=0.0, **options)
        optimizer.step(closures(net, x, y)["plain"])
        assert not optimizer.last_step.accepted
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    net, x, y = regression(noise=0.0)
    dtype = torch.float32 if autocast else torch.bfloat16
    net.to(dtype)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return functional.mse_loss(net(x.to(dtype)).float(), y.float())

    optimizer = NewtonCG(net)
    losses = [optimizer.step(closure).item() for _ in range(15)]
    assert min(losses) < 0.5 * losses[0]
    assert net[0].weight.dtype == dtype


def test_no_closure_explains_the_grad_scaler() -> None:
    net, _, _ = regression()
    with pytest.raises(ClosureError, match=r"needs a closure.*GradScaler.*bfloat16"):
        NewtonCG(net).step()


def test_gradient_or_curvature_not_finite() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ClosureError, match=r"gradient of parameter 0, .* is not finite"):
        NewtonCG([p]).step(lambda: p.abs().sqrt().sum())
    q = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ClosureError, match="curvature is not finite"):
        NewtonCG([q]).step(lambda: (q.abs() ** 1.5 + q).sum())
    assert not p.any()
    assert not q.any()


def test_no_second_derivative() -> None:
    net, x, _ = regression()

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    before = flat(net)
    for curvature in ("auto", "hessian"):
        with pytest.raises(DiagnosticsError, match="differentiated twice"):
            NewtonCG(net, curvature=curvature).step(lambda: Once.apply(net(x)).square().mean())
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "fisher"}, 'curvature must be one of "auto", "hessian", "ggn", got .fisher.'),
        ({"preconditioner": "jacobi"}, 'preconditioner must be one of "none", "diagonal", or a function'),
        ({"max_products": 0}, "max_products must be an integer of at least 1"),
        ({"max_trials": True}, "max_trials must be"),
        ({"forcing": 1.0}, r"forcing must lie in \(0, 1\)"),
        ({"lr": -1.0}, "lr must be a finite number"),
        ({"weight_decay": math.nan}, "weight_decay must be"),
        ({"warm_start": True, "preconditioner": lambda v: v}, "warm_start needs products with M"),
        ({"model": nn.Linear(1, 1)}, "two different networks"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    net, _, _ = regression()
    with pytest.raises(ValueError, match=message):
        NewtonCG(net, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_more_arguments() -> None:
    net, _, _ = regression()
    with pytest.raises(TypeError, match="model must be"):
        NewtonCG(net.parameters(), model=3)  # type: ignore[arg-type]
    optimizer = NewtonCG(net)
    with pytest.raises(ValueError, match="maximize must be the same"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "maximize": True})
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1
    compiled = nn.Sequential(net, nn.Identity())
    compiled[0].compile()
    with pytest.raises(ModelError, match="compiled"):
        NewtonCG(compiled)


def test_options_of_methods() -> None:
    net, _, _ = regression()
    for make in (lambda: TrustRadius(0.0), lambda: TrustRadius(1.0, 0.5), lambda: LevenbergMarquardt(-1.0)):
        with pytest.raises(ValueError, match="must lie"):
            make()
    with pytest.raises(TypeError, match=r"a hessopt\.TrustRadius or hessopt\.LevenbergMarquardt, got str"):
        NewtonCG(net, method="levenberg-marquardt")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [TrustRadius(), LevenbergMarquardt(0.7)])
def test_prediction_is_the_undamped_models(method: Any) -> None:
    """For γ d, in one group: -γ gᵀd - ½ γ² dᵀBd, without λ."""
    net, x, y = regression()
    gradient, _, ggn = dense(net, x, lambda z: functional.mse_loss(z, y))
    theta = flat(net)
    optimizer = NewtonCG(net, lr=0.3, curvature="ggn", method=method, weight_decay=0.1, forcing=0.1)
    optimizer.step(closures(net, x, y)["plain"])
    step, g = flat(net) - theta, gradient + 0.1 * theta
    matrix = ggn + 0.1 * torch.eye(len(g), dtype=torch.float64)
    last = optimizer.last_step
    assert last.accepted
    assert last.predicted_reduction == pytest.approx(-float(g @ step + step @ matrix @ step / 2), rel=1e-8)
    assert last.ratio == pytest.approx(last.actual_reduction / last.predicted_reduction, rel=1e-8)


def test_forcing_sequence() -> None:
    """Eisenstat and Walker's second choice, with their safeguard and the bound."""
    net, x, y = regression()
    optimizer, before = NewtonCG(net, curvature="hessian", forcing=0.6, weight_decay=0.1), None
    seen = set()
    for _ in range(25):
        optimizer.step(closures(net, x, y)["plain"])
        last = optimizer.last_step
        if before is None:
            assert last.forcing == 0.6
        else:
            eta, safe = 0.9 * (last.gradient_norm / before.gradient_norm) ** 2, 0.9 * before.forcing**2
            expected = max(eta, safe) if safe > 0.1 else eta
            seen.add("safe" if expected == safe else "bound" if expected > 0.6 else "ratio")
            assert last.forcing == pytest.approx(min(max(expected, 1e-12), 0.6), rel=1e-12)
        before = last
    assert seen == {"safe", "bound", "ratio"}
