"""What has no second derivative is refused by name, and what has one is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diagnostics import CaptureError, DiagnosticsError
from diagnostics.autograd.second_order import (
    check_differentiable,
    check_on_tape,
    refuse_sparse,
    second_order_errors,
)


class Square(torch.autograd.Function):
    """x², with a backward pass off the tape or on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, off: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.off = off
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        slope = 2 * ctx.saved_tensors[0] * g
        return (slope.detach() if ctx.off else slope), None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def leaf() -> Tensor:
    return torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)


def test_the_parameter_off_the_tape_is_named() -> None:
    p, q = leaf(), leaf()
    loss = p.square().sum() + Square.apply(q, True).sum()
    with pytest.raises(DiagnosticsError, match="gradient of parameter 'q' is computed off the tape"):
        check_differentiable(loss, [p, q], ["p", "q"])
    check_differentiable(p.square().sum() + Square.apply(q, False).sum(), [p, q], ["p", "q"])


@pytest.mark.parametrize("zero", [torch.round, torch.sign, torch.floor])
def test_zeros_of_pytorch_itself_are_curvature_enough(zero: Any) -> None:
    p = leaf()
    check_differentiable(zero(p).sum(), [p], ["p"])


def test_parameters_without_influence_and_linear_losses_pass() -> None:
    p, q = leaf(), leaf()
    check_differentiable(p.sum(), [p, q], ["p", "q"])


def test_the_tape_stays() -> None:
    p = leaf()
    loss = (p**3).sum()
    check_differentiable(loss, [p], ["p"])
    (g,) = torch.autograd.grad(loss, [p], create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), [p])[0], 6 * p.detach(), rtol=1e-15, atol=0)


def test_a_signal_that_is_the_gradient_itself_is_on_the_tape() -> None:
    """The output is the parameter."""
    p = leaf()
    signal = torch.ones_like(p).requires_grad_()
    check_on_tape(torch.autograd.grad(p, [p], signal, create_graph=True), [signal], ["p"])


def test_sparse_gradients_are_named() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    (g,) = torch.autograd.grad(table(torch.tensor([1])).sum(), [table.weight])
    with pytest.raises(CaptureError, match=r"gradient of parameter 'table' is sparse .*sparse=False"):
        refuse_sparse([None, g], ["p", "table"])
    refuse_sparse([None, g.to_dense()], ["p", "table"])


def test_errors_of_pytorch_say_what_to_do() -> None:
    p, signal = leaf(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(Once.apply(p), [p], signal, create_graph=True)
    with (
        pytest.raises(DiagnosticsError, match=r"cannot be differentiated twice: .*once_differentiable"),
        second_order_errors(),
    ):
        g.sum().backward()


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("second derivative"), CaptureError("own")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, second_order_errors():
        raise error
    assert caught.value is error
