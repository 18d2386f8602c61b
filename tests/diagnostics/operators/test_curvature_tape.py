"""Tapes of any loss by any parameters, against dense derivatives in float64, to 1e-12 of their norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics import CaptureError, DiagnosticsError
from diagnostics.operators import curvature_tape
from diagnostics.operators.curvature_tape import JointTape, SplitTape

NAMES = ["a", "b"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-12 * expected.norm())


def flat(parts: list[Tensor]) -> Tensor:
    """Columns ``(k, *shape)`` as ``(k, P)``."""
    return torch.cat([part.flatten(1) for part in parts], 1)


X, Y = normal(5, 3, seed=3), torch.tensor([0, 1, 1, 0, 2])
SIZES = (12, 12)


def network(theta: Tensor) -> Tensor:
    """``tanh(x A) B`` of parameters side by side."""
    a, b = theta.split(SIZES)
    return torch.tanh(X @ a.view(3, 4)) @ b.view(4, 3)


def parameters() -> list[Tensor]:
    return [normal(12, seed=1).requires_grad_(), normal(12, seed=2).requires_grad_()]


def dense() -> tuple[Tensor, Tensor, Tensor]:
    """H, the Gauss-Newton matrix and the Jacobian of z."""
    theta = torch.cat(parameters()).detach()
    hessian = torch.func.hessian(lambda t: functional.cross_entropy(network(t), Y))(theta)
    jacobian = torch.func.jacrev(network)(theta).reshape(15, 24)
    z = network(theta)
    bend = torch.func.hessian(lambda z: functional.cross_entropy(z, Y))(z).reshape(15, 15)
    return hessian, jacobian.mT @ bend @ jacobian, jacobian


def split_tape(**options: Any) -> SplitTape:
    theta = parameters()
    z = network(torch.cat(theta))
    return SplitTape(functional.cross_entropy(z, Y), theta, NAMES, [z], **options)


@pytest.fixture(params=[1, 3, 6])
def columns(request: pytest.FixtureRequest) -> list[Tensor]:
    """One, a few taken one by one, and several taken together."""
    return [normal(request.param, 12, seed=7), normal(request.param, 12, seed=8)]


def test_hessian_of_a_loss_on_its_tape(columns: list[Tensor]) -> None:
    theta = parameters()
    loss = functional.cross_entropy(network(torch.cat(theta)), Y)
    tape = JointTape(loss, theta, NAMES)
    assert close(flat(tape.hessian(columns)), flat(columns) @ dense()[0])
    assert close(tape.gradient(), torch.cat(torch.autograd.grad(loss, theta)))
    assert not tape.loss.requires_grad


def test_parts_of_a_loss_on_the_tape_of_the_output(columns: list[Tensor]) -> None:
    hessian, gauss_newton, jacobian = dense()
    tape, v = split_tape(), flat(columns)
    assert close(flat(tape.jvp(columns)), v @ jacobian.mT)
    assert close(flat(tape.gauss_newton(columns)), v @ gauss_newton)
    assert (flat(tape.tensor(columns)) - v @ (hessian - gauss_newton)).norm() <= 1e-12 * (v @ hessian).norm()
    tensor, moved = tape.tensor_and_jvp(columns)
    assert close(flat(moved), v @ jacobian.mT)
    assert close(flat(tensor) + flat(tape.gauss_newton(columns, moved)), v @ hessian)
    assert close(flat(tape.pull_back(moved)), v @ jacobian.mT @ jacobian)


def test_both_tapes_have_the_same_gradient() -> None:
    theta = parameters()
    loss = functional.cross_entropy(network(torch.cat(theta)), Y)
    assert close(split_tape().gradient(), JointTape(loss, theta, NAMES).gradient())


def test_a_loss_cut_from_the_network_may_depend_on_parameters(columns: list[Tensor]) -> None:
    """Of a penalty ``Σ a³ + Σ a z₀``: ``(J; 1)ᵀ ∇²ℓ(z, θ) (J; 1)``."""
    theta = parameters()
    z = network(torch.cat(theta))
    cut = z.detach().requires_grad_()

    def penalized(z: Tensor, a: Tensor) -> Tensor:
        return functional.cross_entropy(z, Y) + (a**3).sum() + a.sum() * z[0, 0]

    tape = SplitTape(penalized(cut, theta[0]), theta, NAMES, [z], [cut])
    joint = torch.cat([dense()[2], torch.eye(24, dtype=torch.float64)])
    point = torch.cat([z.detach().reshape(-1), *(p.detach() for p in theta)])
    bend = torch.func.hessian(lambda t: penalized(t[:15].view(5, 3), t[15:27]))(point)
    assert close(flat(tape.gauss_newton(columns)), flat(columns) @ (joint.mT @ bend @ joint))
    whole = torch.cat(torch.autograd.grad(penalized(z, theta[0]), theta))
    assert close(tape.gradient(), whole)


def test_outputs_that_the_loss_leaves_out_are_zero() -> None:
    theta = parameters()
    z = network(torch.cat(theta))
    other = torch.cat(theta).square()
    tape = SplitTape(functional.cross_entropy(z, Y), theta, NAMES, [z, other])
    assert tape.slopes[1] is None
    assert tape.used_outputs() == [z]
    columns = [normal(2, 12), normal(2, 12, seed=1)]
    assert close(flat(tape.gauss_newton(columns)), flat(columns) @ dense()[1])
    padded = tape.on_used(lambda u: [2 * part for part in u])(tape.jvp(columns))
    assert not padded[1].any()
    assert close(padded[0], 2 * tape.jvp(columns)[0])


def test_columns_together_equal_columns_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [normal(6, 12), normal(6, 12, seed=1)]
    together = flat(split_tape().gauss_newton(columns))
    monkeypatch.setattr(curvature_tape, "TOGETHER_BYTES", {"cpu": 0})
    assert close(flat(split_tape().gauss_newton(columns)), together)


def test_parameters_without_influence_have_zero_rows() -> None:
    theta, alone = parameters(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    loss = functional.cross_entropy(network(torch.cat(theta)), Y)
    tape = JointTape(loss, [*theta, alone], [*NAMES, "alone"])
    assert tape.gradients[2] is None
    assert not tape.hessian([normal(2, 12), normal(2, 12), normal(2, 2)])[2].any()
    assert not tape.gradient()[24:].any()


class OffTheTape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (2 * ctx.saved_tensors[0] * g).detach()


@pytest.mark.parametrize("kind", [JointTape, SplitTape])
def test_gradients_off_the_tape_are_refused_where_that_is_asked_for(kind: Any) -> None:
    p = normal(3).requires_grad_()
    z = OffTheTape.apply(p)
    outputs = [[z]] if kind is SplitTape else []
    with pytest.raises(DiagnosticsError, match="gradient of parameter 'p' is computed off the tape"):
        kind(z.square().sum(), [p], ["p"], *outputs)
    kind(z.square().sum(), [p], ["p"], *outputs, verify=False)


@pytest.mark.parametrize("verify", [False, True])
def test_sparse_gradients_are_refused(verify: bool) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    z = table(torch.tensor([0, 2]))
    with pytest.raises(CaptureError, match="gradient of parameter 'table' is sparse"):
        JointTape(z.square().sum(), [table.weight], ["table"], verify=verify)
    with pytest.raises(CaptureError, match="gradient of parameter 'table' is sparse"):
        SplitTape(z.square().sum(), [table.weight], ["table"], [z], verify=verify)


def test_a_loss_without_the_output_is_refused() -> None:
    theta = parameters()
    with pytest.raises(CaptureError, match="does not depend on the model's output"):
        SplitTape(theta[0].square().sum(), theta, NAMES, [network(torch.cat(theta))])


def test_a_loss_on_its_tape_is_known_at_one_output_only() -> None:
    with pytest.raises(ValueError, match="of a tape made by of_batch only"):
        split_tape().loss_curvature_at(normal(5, 3), normal(1, 5, 3))
