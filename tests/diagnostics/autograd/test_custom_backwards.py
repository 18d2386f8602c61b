"""Backward passes written in Python: what they keep off the tape is refused, what they keep on it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagnostics

OPERATORS = (diagnostics.HessianOperator, diagnostics.GaussNewtonOperator, diagnostics.TensorOperator)


class FusedCrossEntropy(torch.autograd.Function):
    """Its gradient is computed in forward and kept: looks linear to autograd."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((z.softmax(1) - F.one_hot(y, z.shape[1]).to(z)) / len(z))
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return d * slope, None


class FusedNorm(torch.autograd.Function):
    """A layer norm whose backward uses the normalised values and the variance of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        ctx.save_for_backward(centred / spread, spread)
        return centred / spread

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        y, spread = ctx.saved_tensors
        return (d - y * (d * y).mean(-1, keepdim=True) - d.mean(-1, keepdim=True)) / spread


class NormOnTheTape(FusedNorm):
    """The same, from its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = centred / spread
        return (d - y * (d * y).mean(-1, keepdim=True) - d.mean(-1, keepdim=True)) / spread


class Skewed(torch.autograd.Function):
    """The square, with a backward that is right only to first order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return d * (2 * x.detach() + (x - x.detach()).cumsum(-1))


class Kinked(torch.autograd.Function):
    """A mask of its forward is a constant but at the kinks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mask = x > 0
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d * ctx.mask


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return (16 * x).round() / 16

    @staticmethod
    def backward(_: Any, d: Tensor) -> Tensor:
        return d


class Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x)  # type: ignore[no-untyped-call]
        return result


def network(function: type[torch.autograd.Function] | None, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    middle = [nn.Tanh()] if function is None else [Apply(function)]
    model = nn.Sequential(nn.Linear(5, 16), *middle, nn.Dropout(0.2), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    return model.to(dtype), torch.randn(40, 5, dtype=dtype), torch.randint(3, (40,))


def fused(z: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = FusedCrossEntropy.apply(z, y)  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_loss_with_a_gradient_from_its_forward_is_refused(operator: Any, dtype: torch.dtype) -> None:
    model, x, y = network(None, dtype)
    with pytest.raises(diagnostics.DiagnosticsError, match=r"backward of FusedCrossEntropyBackward .*kept"):
        operator(model, (x, y), fused)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_capture_refuses_it_too(dtype: torch.dtype) -> None:
    model, x, y = network(None, dtype)
    with pytest.raises(diagnostics.DiagnosticsError, match="backward of FusedCrossEntropyBackward"):
        diagnostics.capture(model, x, lambda z: fused(z, y))


def test_with_frozen_parameters_too() -> None:
    model, x, y = network(None, torch.float64)
    for parameter in model[:3].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    with pytest.raises(diagnostics.DiagnosticsError, match="backward of FusedCrossEntropyBackward"):
        diagnostics.HessianOperator(model, (x, y), fused)
    with pytest.raises(diagnostics.DiagnosticsError, match="backward of FusedCrossEntropyBackward"):
        diagnostics.capture(model.requires_grad_(False), x.requires_grad_(), lambda z: fused(z, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", [FusedNorm, Skewed])
def test_module_whose_backward_has_another_derivative_is_refused(function: Any, dtype: torch.dtype) -> None:
    model, x, y = network(function, dtype)
    with pytest.raises(diagnostics.DiagnosticsError, match=f"backward of {function.__name__}Backward is right, but"):
        diagnostics.HessianOperator(model, (x, y), F.cross_entropy)
    with pytest.raises(diagnostics.DiagnosticsError, match=f"backward of {function.__name__}Backward is right, but"):
        diagnostics.capture(model, x, lambda z: F.cross_entropy(z, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", [NormOnTheTape, Kinked, StraightThrough])
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_on_the_tape_or_a_surrogate_is_accepted(operator: Any, function: Any, dtype: torch.dtype) -> None:
    model, x, y = network(function, dtype)
    product = operator(model, (x, y), F.cross_entropy)
    assert torch.isfinite(product @ torch.ones(product.shape[1], dtype=dtype)).all()
    diagnostics.capture(model, x, lambda z: F.cross_entropy(z, y))


def test_products_of_the_norm_on_the_tape_are_those_of_pytorch() -> None:
    model, x, y = network(NormOnTheTape, torch.float64)
    model.eval()
    own = diagnostics.HessianOperator(model, (x, y), F.cross_entropy)
    model[1] = nn.LayerNorm(16, eps=1e-6, elementwise_affine=False).double()  # type: ignore[operator, index]
    theirs = diagnostics.HessianOperator(model, (x, y), F.cross_entropy)
    v = torch.cos(torch.arange(own.shape[1], dtype=torch.float64))
    torch.testing.assert_close(own @ v, theirs @ v, rtol=1e-10, atol=1e-12)


def test_comparing_leaves_everything_as_it_was() -> None:
    model, x, y = network(NormOnTheTape, torch.float64)
    model.insert(1, nn.BatchNorm1d(16).double())  # type: ignore[operator, arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [p._version for p in model.parameters()]
    state = torch.get_rng_state()
    diagnostics.HessianOperator(model, (x, y), F.cross_entropy)
    diagnostics.capture(model, x, lambda z: F.cross_entropy(z, y))
    assert torch.equal(state, torch.get_rng_state())
    assert versions == [p._version for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
