"""The baselines that are written here from their papers: the first step against dense algebra."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.studies.ablation.baselines.muon_family import Mousse, NewtonMuon, muon, orthogonalized
from tests.examples.ablation.toys import build

F64 = torch.float64


def layer() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=False, dtype=F64)
    x = torch.randn(20, 6, dtype=F64) * torch.tensor([3.0, 1, 1, 1, 0.3, 0.1], dtype=F64)
    return linear, x


def gradient(linear: nn.Linear, x: Tensor) -> Tensor:
    linear.zero_grad()
    linear(x).sin().sum().backward()
    assert linear.weight.grad is not None
    return linear.weight.grad


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def test_mousse_is_a_polar_step_between_powers_of_the_factors() -> None:
    linear, x = layer()
    before, g = linear.weight.detach().clone(), gradient(linear, x)
    Mousse([linear.weight], 0.1, alpha=0.125, eps=1e-5).step()
    left, right = (
        power(f * len(f) / f.trace() + 1e-5 * torch.eye(len(f), dtype=F64), -0.125) for f in (g @ g.T, g.T @ g)
    )
    polar = orthogonalized(left @ (1.95 * g) @ right)
    found = left @ polar @ right
    expected = before - 0.1 * 0.2 * 6**0.5 * polar.norm() / found.norm() * found
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_newton_muon_takes_the_inverse_moment_of_the_inputs() -> None:
    linear, x = layer()
    optimizer = NewtonMuon([linear.weight], 0.1, ridge=0.2)
    optimizer.watch(linear)
    before, g = linear.weight.detach().clone(), gradient(linear, x)
    optimizer.step()
    moment = x.T @ x / 20
    damped = moment + (0.2 * moment.trace() / 6 + 1e-8) * torch.eye(6, dtype=F64)
    expected = before - 0.1 * 0.2 * 6**0.5 * orthogonalized(g @ torch.linalg.inv(damped))
    torch.testing.assert_close(linear.weight.detach(), expected, rtol=1e-9, atol=1e-12)


def test_newton_muon_sees_the_patches_of_convolutions() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False).to(F64)
    optimizer = NewtonMuon([conv.weight], 0.1)
    optimizer.watch(conv)
    x = torch.randn(2, 3, 5, 5, dtype=F64)
    y = conv(x)
    patches = torch.nn.functional.unfold(x, 3, padding=1, stride=2)
    torch.testing.assert_close((conv.weight.flatten(1) @ patches).view_as(y), y)  # the order of rows
    y.sum().backward()
    optimizer.step()
    rows = patches.mT.flatten(0, 1)
    torch.testing.assert_close(optimizer.state[conv.weight]["second_moment"], rows.T @ rows / len(rows))


def test_muon_treats_filters_as_rows() -> None:
    """Not the first layer's; and the parameters themselves change, not only the views that the optimizer holds."""
    task = build(0, torch.device("cpu"), None)
    task.model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 1), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 1)
    )
    stepper = muon(task, lr=0.1)
    before = [p.detach().clone() for p in task.model.parameters()]
    task.model(torch.randn(5, 4)).sum().backward()
    for optimizer in stepper.optimizers:  # type: ignore[attr-defined]
        optimizer.step()
    filters = before[2] - list(task.model.parameters())[2].detach()
    assert filters.shape == (2, 3, 2, 2)
    singular = torch.linalg.svdvals(filters.flatten(1)) / (0.1 * 0.2 * 12**0.5)
    assert float((singular - 1).abs().max()) < 0.5  # Muon's iteration in bfloat16
    assert all(not torch.equal(p, old) for p, old in zip(task.model.parameters(), before, strict=True))
