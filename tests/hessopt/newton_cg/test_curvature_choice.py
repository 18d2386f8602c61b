"""The rule of curvature="auto", case by case, and what it achieves near minima."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hessopt.closure.protocol import LeastSquares
from hessopt.newton_cg.curvature_choice import CurvatureChoice
from hessopt.newton_cg.optimizer import NewtonCG
from hessopt.newton_cg.truncated_cg import Path
from hessopt.search.rules import LevenbergMarquardt, TrustRadius
from tests.hessopt.closure.test_step_curvature import dense


def measured(gaps: list[float], **state: Any) -> CurvatureChoice:
    return CurvatureChoice(gaps=gaps, reference=1.0, **state)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("gaps", "errors", "state", "expected"),
    [
        ([0.05], (1.0, 0.1), {}, ("ggn", "small gap")),
        ([0.5], (1.0, 0.1), {}, ("hessian", "large gap")),
        ([0.5, 0.6, 0.55], (1.0, 0.99), {}, ("hessian", "large gap")),
        ([0.5], (1.0, 1.1), {}, None),
        ([0.5], (1.0, 1.3), {}, ("ggn", "no better model")),
        ([0.15], (1.0, 0.5), {}, None),
        ([0.09, 0.02], (1.0, 0.5), {}, ("ggn", "small gap")),
        ([0.0, 0.18], (1.0, 0.5), {}, None),  # mean 0.09 ± 0.09
        ([0.1, 0.6], (1.0, 0.5), {}, None),  # mean 0.35 ± 0.25
        ([0.5], (1.0, 0.8), {"indefinite": True}, None),
        ([0.5], (1.0, 0.6), {"indefinite": True}, ("hessian", "large gap")),
        ([0.05], (1.0, 0.5), {"saddle": True}, ("hessian", "saddle")),
        ([0.5], (1.0, 2.0), {"saddle": True}, None),
    ],
)
def test_table(full: bool, gaps: list[float], errors: Any, state: dict[str, bool], expected: Any) -> None:
    choice = measured(gaps, full=full, **state)
    kind = choice.begin(1.0, errors)
    if expected is None:  # hysteresis
        assert kind == ("hessian" if full else "ggn")
    else:
        assert (kind, choice.why) == expected
    assert choice.error_ratio == pytest.approx(errors[1] / errors[0])


def test_nothing_measured_changes_nothing() -> None:
    choice = CurvatureChoice()
    assert choice.begin(5.0, None) == "ggn"
    assert choice.why == "start"
    assert all(map(math.isnan, choice.gap))
    choice = measured([0.5], full=True)
    assert choice.begin(1.0, None) == "hessian"


def path_with(least: float) -> Path:
    return Path(torch.zeros(1), ritz=(least, 1.0))


@pytest.mark.parametrize(("least", "after"), [(-1.0, "hessian"), (1e-3, "ggn"), (-1e-9, "ggn")])
def test_a_look_at_the_hessian(least: float, after: str) -> None:
    """A thousand times smaller gradient: one step with H; it stays if that is a saddle."""
    choice = CurvatureChoice()
    assert choice.begin(1.0, None) == "ggn"
    choice.end(1.0, 1.0, path_with(-5.0), 3.0, None)  # a Ritz value of the Gauss-Newton matrix: rounding
    assert not choice.saddle
    assert choice.begin(2e-3, None) == "ggn"
    choice.end(2e-3, 1.0, path_with(1.0), 3.0, None)
    assert choice.begin(0.9e-3, None) == "hessian"
    assert choice.why == "look at H"
    choice.end(0.9e-3, 1.0, path_with(least), 3.0, None)
    assert choice.begin(0.8e-3, None) == after
    assert choice.why == ("saddle" if after == "hessian" else "no saddle")
    if after == "ggn":
        choice.end(0.8e-3, 1.0, path_with(1.0), 3.0, None)
        assert choice.begin(0.7e-3, None) == "ggn"  # not again before the next thousandth


@pytest.mark.parametrize(("norm", "radius", "large"), [(1.0, 1.0, True), (0.4, 1.0, False), (0.4, 0.5, True)])
def test_what_a_large_gradient_is(norm: float, radius: float, large: bool) -> None:
    choice = CurvatureChoice(full=True)
    choice.end(norm, radius, path_with(-1.0), 3.0, None)
    assert (choice.indefinite, choice.saddle) == (large, not large)
    choice.end(norm, radius, path_with(0.1), 3.0, None)
    assert (choice.indefinite, choice.saddle) == (False, False)


def test_when_to_measure() -> None:
    choice = CurvatureChoice(since=0.0)
    assert [choice.due(work, 0.5, 1) for work in (9.9, 10)] == [False, True]
    assert [choice.due(10, ratio, trials) for ratio, trials in ((1.2, 1), (1.26, 1), (None, 1), (1.0, 2))] == [
        False,
        True,
        True,
        True,
    ]
    assert [choice.due(work, 1.0, 1) for work in (39.9, 40)] == [False, True]
    choice.full = True
    assert [choice.due(work, 0.5, 1) for work in (19.9, 20)] == [False, True]
    choice.gaps = [0.5]
    assert [choice.due(work, 0.5, 1) for work in (39.9, 40)] == [False, True]
    choice.end(1.0, 1.0, path_with(1.0), 7.0, None)
    assert choice.since == 7.0
    choice.end(1.0, 1.0, path_with(1.0), 7.0, 0.3)
    assert choice.since == 0.0
    for gap in (0.1, 0.2, 0.3):
        choice.end(1.0, 1.0, path_with(1.0), 7.0, gap)
    assert choice.gaps == [0.1, 0.2, 0.3]
    mean, error = choice.gap
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(0.1 / 3**0.5)


def test_state_and_log(caplog: pytest.LogCaptureFixture) -> None:
    choice = measured([0.5])
    with caplog.at_level(logging.INFO, "hessopt"):
        choice.begin(1.0, (1.0, 0.1))
        choice.begin(1.0, (1.0, 0.1))
    assert [r.message for r in caplog.records] == ["NewtonCG takes hessian: large gap (gap 0.5 ± 0, ‖g‖ 1)"]
    assert CurvatureChoice(**choice.state_dict()) == choice


def deep_large_residual() -> tuple[nn.Module, Tensor, Tensor]:
    """A deep tanh network whose targets are mostly noise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x[:, :1]) + 2 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    return net, x, y


DECAY = 1e-2


@pytest.fixture(scope="module")
def minimum() -> tuple[nn.Module, Callable[[], Tensor], Tensor]:
    net, x, y = deep_large_residual()

    def closure() -> Tensor:
        return functional.mse_loss(net(x), y)

    optimizer = NewtonCG(net, curvature="hessian", weight_decay=DECAY)
    for _ in range(400):
        optimizer.step(closure)
        if optimizer.last_step.gradient_norm < 1e-13:
            break
    assert optimizer.last_step.gradient_norm < 1e-12
    _, hessian, _ = dense(net, x, lambda z: functional.mse_loss(z, y))
    assert float(torch.linalg.eigvalsh(hessian + DECAY * torch.eye(len(hessian)))[0]) > 1e-3
    return net, closure, torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def start_near(net: nn.Module, minimum: Tensor, relative: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(minimum), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        vector = minimum + relative * minimum.norm() / len(minimum) ** 0.5 * noise
        torch.nn.utils.vector_to_parameters(vector, net.parameters())


def errors_of(minimum: Any, steps: int, **options: Any) -> list[float]:
    net, closure, star = minimum
    start_near(net, star, 1e-3)
    optimizer = NewtonCG(net, weight_decay=DECAY, **options)
    errors = []
    for _ in range(steps):
        errors.append(float((torch.nn.utils.parameters_to_vector(net.parameters()).detach() - star).norm()))
        optimizer.step(closure)
    return errors


@pytest.mark.parametrize("forcing", [1e-10, 0.5])
def test_full_hessian_converges_quadratically(minimum: Any, forcing: float) -> None:
    """The error is squared, up to one constant, for at least three steps; to the last digits."""
    errors = errors_of(minimum, 14, curvature="hessian", forcing=forcing)
    squared = [b <= 30 * a * a for a, b in pairwise(errors) if a > 1e-7]
    assert squared[-3:] == [True] * 3
    assert min(errors) < 1e-12


def test_gauss_newton_converges_linearly(minimum: Any) -> None:
    errors = errors_of(minimum, 30, curvature="ggn", forcing=1e-10)
    factors = [b / a for a, b in pairwise(errors)]
    assert min(factors[5:]) > 0.3
    assert errors[-1] > 1e-5


def products_to_converge(minimum: Any, curvature: Any, seeds: range) -> list[float]:
    net, closure, star = minimum
    totals = []
    for seed in seeds:
        start_near(net, star, 0.03, seed)
        optimizer = NewtonCG(net, curvature=curvature, weight_decay=DECAY)
        total = 0.0
        for _ in range(60):
            optimizer.step(closure)
            if optimizer.last_step.gradient_norm < 1e-8:
                break
            total += sum(optimizer.last_step.products.values())
        else:
            total = math.inf
        totals.append(total)
    return totals


def test_auto_follows_the_hessian_near_a_minimum_with_a_large_gap(minimum: Any) -> None:
    """Within 20 % in products, over six starts."""
    hessian, auto, ggn = (
        products_to_converge(minimum, c, range(n)) for c, n in (("hessian", 6), ("auto", 6), ("ggn", 1))
    )
    assert math.isinf(min(ggn))
    assert sum(auto) <= 1.2 * sum(hessian)
    assert all(a <= 2 * h for a, h in zip(auto, hessian, strict=True))


def test_auto_stays_with_gauss_newton_where_the_residual_vanishes() -> None:
    """Rosenbrock's function: the full Hessian costs more, and nothing is gained."""
    counts = {}
    for curvature in ("ggn", "auto"):
        x = nn.Parameter(torch.tensor([-1.2, 1.0] * 2, dtype=torch.float64))
        optimizer = NewtonCG([x], curvature=curvature)
        counts[curvature] = 0.0
        for _ in range(100):
            optimizer.step(lambda x=x: LeastSquares(torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])))
            if optimizer.last_step.gradient_norm < 1e-10:
                break
            counts[curvature] += sum(optimizer.last_step.products.values())
        assert optimizer.last_step.gradient_norm < 1e-10
    assert counts["auto"] <= 1.4 * counts["ggn"]


def test_auto_leaves_a_saddle_that_the_gauss_newton_matrix_does_not_see() -> None:
    """x² / 2 + (y² - 1)² / 4 from next to its saddle: where y is small, the Gauss-Newton matrix knows no way down."""
    p = nn.Parameter(torch.tensor([1.0, 1e-6], dtype=torch.float64))

    def closure() -> LeastSquares:
        return LeastSquares(torch.stack([p[0], (p[1] ** 2 - 1) / 2**0.5]))

    optimizer = NewtonCG([p])
    kinds = []
    for _ in range(60):
        optimizer.step(closure)
        kinds.append(optimizer.last_step.curvature)
    assert "hessian" in kinds
    assert abs(abs(p[1].item()) - 1) < 1e-6
    assert abs(p[0].item()) < 1e-6


@pytest.fixture(scope="module")
def negative() -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, Hessian and Gauss-Newton matrix of minus the loss, at the start."""
    net, x, y = deep_large_residual()
    return dense(net, x, lambda z: -functional.mse_loss(z, y))


@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("method", [TrustRadius(), LevenbergMarquardt(0.7)])
def test_both_models_of_the_gradient(
    negative: tuple[Tensor, Tensor, Tensor],
    method: Any,
    kind: str,
    rates: tuple[float, float],
    rejected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """g + (G + ω) d and g + (H + ω) d of the accepted step d, whatever was known of it before."""
    monkeypatch.setattr(CurvatureChoice, "due", lambda *_: True)
    monkeypatch.setattr(CurvatureChoice, "begin", lambda self, *_: kind)
    gradient, hessian, ggn = negative
    net, x, y = deep_large_residual()
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    identity = torch.eye(len(theta), dtype=torch.float64)
    groups = [{"params": net[i].parameters(), "lr": rate} for i, rate in ((0, rates[0]), (2, rates[0]), (4, rates[1]))]
    runs = []

    def closure() -> Tensor:
        runs.append(1)
        return -functional.mse_loss(net(x), y) * (math.nan if rejected and len(runs) == 2 else 1.0)

    optimizer = NewtonCG(groups, model=net, method=method, maximize=True, weight_decay=0.3, forcing=0.1)
    optimizer.step(closure)
    last = optimizer.last_step
    assert last.accepted
    assert (last.trials > 1) == rejected
    step = torch.nn.utils.parameters_to_vector(net.parameters()).detach() - theta
    g = -gradient + 0.3 * theta
    for name, matrix in (("model_ggn", ggn), ("model_hessian", hessian)):
        found = torch.cat([optimizer.state[p][name].reshape(-1) for p in net.parameters()])
        assert torch.allclose(found, g + (0.3 * identity - matrix) @ step, rtol=1e-9, atol=1e-11)
    gap = ((hessian - ggn) @ step).norm() / ((0.3 * identity - ggn) @ step).norm()
    assert last.gap == pytest.approx(float(gap), rel=1e-8)


def test_measured_after_the_trial_with_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial runs over the buffers that the tape has saved; they are put back."""
    monkeypatch.setattr(CurvatureChoice, "due", lambda *_: True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(9, 3, dtype=torch.float64)
    optimizer = NewtonCG(net)
    for _ in range(3):
        optimizer.step(lambda: (net(x) - 1).square().mean())
        assert optimizer.last_step.gap is not None
