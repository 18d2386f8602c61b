"""The self-scaled Broyden update against dense algebra, and the method that is made of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.shared.task import Task
from examples.studies.ablation.baselines import self_scaled as module
from examples.studies.ablation.baselines.self_scaled import SelfScaledBroyden, scaled_first, self_scaled, update
from examples.studies.ablation.contender import Finished, NotApplicable
from examples.studies.ablation.optimizers import CONTENDERS
from hessopt import LeastSquares

F64 = torch.float64


def definite(size: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=draw, dtype=F64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=F64)


def pair(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A step, and the change of the gradient of some convex quadratic."""
    s = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return s, definite(size, seed + 20) @ s


SCALINGS = [self_scaled, scaled_first, lambda b, h, n: (1.0, 1.0), lambda b, h, n: (0.3, 0.6)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("seed", range(4))
def test_secant_equation(scaling: Any, seed: int) -> None:
    before = definite(7, seed)
    after, (s, y) = before.clone(), pair(7, seed)
    update(after, s, y, torch.linalg.solve(before, s), scaling)
    torch.testing.assert_close(after @ y, s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, after.T, rtol=1e-10, atol=1e-10)
    assert torch.linalg.eigvalsh(after).min() > 0


def test_without_scaling_and_with_all_of_v_it_is_bfgs() -> None:
    before = definite(6)
    after, (s, y) = before.clone(), pair(6, 1)
    update(after, s, y, torch.linalg.solve(before, s), lambda b, h, n: (1.0, 1.0))
    off = torch.eye(6, dtype=F64) - torch.outer(s, y) / (y @ s)
    torch.testing.assert_close(after, off @ before @ off.T + torch.outer(s, s) / (y @ s), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_inverse_of_the_update_of_the_hessian(seed: int) -> None:
    """``B⁺ = τ (B - B s sᵀ B / sᵀBs + θ sᵀBs w wᵀ) + y yᵀ / yᵀs`` with ``w = y / yᵀs - Bs / sᵀBs``."""
    before, (s, y) = definite(5, seed), pair(5, 10 + seed)
    hessian = torch.linalg.inv(before)
    bs = hessian @ s
    sbs, ys = s @ bs, y @ s
    b, h = (sbs / ys).item(), (y @ before @ y / ys).item()
    tau, phi = self_scaled(b, h, 5)
    theta = (1 - phi) / (1 + (b * h - 1) * phi)  # the relation of φ and θ is its own inverse
    w = y / ys - bs / sbs
    expected = tau * (hessian - torch.outer(bs, bs) / sbs + theta * sbs * torch.outer(w, w)) + torch.outer(y, y) / ys
    after = before.clone()
    update(after, s, y, bs, self_scaled)
    torch.testing.assert_close(after @ expected, torch.eye(5, dtype=F64), rtol=0, atol=1e-8)


def test_factors_by_hand() -> None:
    # b = 2, h = 1: a = 1, c = √½, ρ = 1 - √½, and θ = max(-√½, min(1/ρ, -½)) = -½; σ = ½.
    tau, phi = self_scaled(2.0, 1.0, 3)
    assert (tau, phi) == pytest.approx((0.5, 3.0), rel=1e-14)  # min(½ · (½)^(-½), ½)
    # b = ½, h = 8: a = 3, c = √¾, ρ = min(1, 8 (1 - √¾)) = 1, θ = max(0, min(1, 1)) = 1; σ = 4.
    assert self_scaled(0.5, 8.0, 3) == pytest.approx((0.5, 0.0), rel=1e-14)  # min(4^(-½), 1): DFP
    assert scaled_first(0.5, 8.0, 3) == pytest.approx((2.0, 0.0), rel=1e-14)
    assert self_scaled(0.5, 2.0, 1)[0] == 1.0  # one parameter: v is zero


@pytest.mark.parametrize("scaling", [self_scaled, scaled_first])
def test_a_quadratic_of_n_unknowns_takes_n_exact_line_searches(scaling: Any) -> None:
    hessian, x = definite(8), torch.ones(8, dtype=F64)
    inverse = torch.eye(8, dtype=F64)
    sizes = []
    for k in range(8):
        gradient = hessian @ x
        sizes.append(gradient.norm().item())
        direction = -inverse @ gradient
        length = -(gradient @ direction) / (direction @ hessian @ direction)
        x = x + length * direction
        s = length * direction
        update(inverse, s, hessian @ s, -length * gradient, scaling if k else scaled_first)
    assert (hessian @ x).norm() < 1e-8 * sizes[0]
    assert min(sizes) > 1e-3 * sizes[0]  # and no fewer


def task_of(model: nn.Module, x: Tensor, y: Tensor) -> Task:
    def evaluate(batch: Any) -> LeastSquares:
        return LeastSquares((model(x) - y) * (2 / y.numel()) ** 0.5)

    return Task(model, itertools.repeat(None), evaluate, lambda: {}, full_batch=True)


def fit(seed: int = 0) -> Task:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.linspace(-1, 1, 30, dtype=F64).unsqueeze(1)
    return task_of(model, x, torch.sin(3 * x))


def test_steps_satisfy_the_strong_wolfe_conditions_and_the_secant_equation() -> None:
    task = fit()
    stepper = SelfScaledBroyden(task)
    parameters = list(task.model.parameters())

    def point() -> tuple[Tensor, float, Tensor]:
        evaluated = task.evaluate_loss(None)
        assert isinstance(evaluated, LeastSquares)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(evaluated.loss, parameters)])
        return torch.cat([p.detach().flatten() for p in parameters]), evaluated.loss.item(), gradient

    first = point()[1]
    for _ in range(40):
        x, value, gradient = point()
        returned = stepper.step(None)
        new, lower, slope = point()
        assert returned == pytest.approx(lower, rel=1e-12)
        s = new - x
        assert lower <= value + 1e-4 * float(gradient @ s)
        assert abs(slope @ s) <= -0.9 * float(gradient @ s)
        torch.testing.assert_close(stepper.inverse @ (slope - gradient), s, rtol=1e-7, atol=1e-9)
    assert stepper.updates == 40
    assert lower < 1e-2 * first


def test_where_the_line_search_finds_nothing_it_starts_anew_and_then_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    task = fit()
    stepper = SelfScaledBroyden(task)
    for _ in range(3):
        stepper.step(None)
    before = [p.detach().clone() for p in task.model.parameters()]

    def nothing(value: Any, gradient: Any, x: np.ndarray, direction: np.ndarray, *rest: Any, **more: Any) -> Any:
        value(x + direction)
        return None, 0, 0, None, None, None

    monkeypatch.setattr(module, "line_search", nothing)
    stepper.step(None)
    assert torch.equal(stepper.inverse, torch.eye(19, dtype=F64))
    with pytest.raises(Finished, match="no step along the gradient"):
        stepper.step(None)
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))


def test_networks_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 18)
    with pytest.raises(NotApplicable, match="for 18 parameters, and here are 19"):
        CONTENDERS["ssbroyden"].build(fit())


def test_after_adam() -> None:
    task = fit()
    stepper: Any = CONTENDERS["ssbroyden"].build(task, adam_share=0.1, lr=1e-2)
    losses = []
    for k in range(30):
        stepper.share = k / 30
        losses.append(stepper.step(None))
    assert stepper.then.updates == 27
    assert losses[-1] < 0.01 * losses[3]
