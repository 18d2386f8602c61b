"""Kernels for the whole tape: operations that are linear while parameters are fixed, without what only they need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diagnostics.autograd.kernels import full_precision_cudnn

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class LeanKernels(TorchFunctionMode):
    """Runs convolutions and batch-norm in evaluation mode as linear maps where only their input requires grad.

    PyTorch's second derivative of a convolution computes the gradient of the weight whether or not anybody asked for
    it, which is most of a Hessian product of a convolutional network; that of batch-norm goes through the general
    formula. The function is the same, to rounding.

    Attributes:
        entries: Entries of all tensors that operations have returned with a tape: what a product holds per probe.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            result = _convolve(func, *args, **kwargs)
        elif func is F.batch_norm:
            result = _batch_norm(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.grad_fn is not None:
            self.entries += result.numel()
        return result


@dataclass(frozen=True)
class _Convolution:
    """``x ↦ weight * x`` or its transpose, from the tensors of shape ``input_shape`` to their convolutions."""

    weight: Tensor
    input_shape: torch.Size
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    transposed: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        none = [0] * len(self.stride)
        how = (self.stride, self.padding, self.dilation, False, none, self.groups)
        with full_precision_cudnn() if x.is_cuda else nullcontext():
            if not self.transposed:
                return torch.convolution(x, self.weight, None, *how)
            like = x.new_empty(()).expand(self.input_shape)
            result: Tensor = torch.ops.aten.convolution_backward(
                x, like, self.weight, None, *how, [True, False, False]
            )[0]
            return result

    @property
    def adjoint(self) -> _Convolution:
        return replace(self, transposed=not self.transposed)


class _Linear(torch.autograd.Function):
    """A linear map with a known adjoint: its derivative of any order is the one or the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear_map: _Convolution) -> Tensor:
        ctx.linear_map = linear_map
        return linear_map(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        adjoint = ctx.linear_map.adjoint
        # under torch.vmap nothing is recorded, and the plain operation has a batching rule
        (gradient,) = gradients
        return (_apply(adjoint, gradient) if torch.is_grad_enabled() else adjoint(gradient)), None


def _apply(linear_map: _Convolution, x: Tensor) -> Tensor:
    result: Tensor = _Linear.apply(x, linear_map)  # type: ignore[no-untyped-call]
    return result


def _convolve(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    dims = _CONVOLUTIONS[func]
    fixed = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if not (fixed and input.requires_grad and input.ndim == dims + 2 and not isinstance(padding, str)):
        return func(input, weight, bias, stride, padding, dilation, groups)

    def per_dim(value: int | tuple[int, ...]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    how = per_dim(stride), per_dim(padding), per_dim(dilation)
    result = _apply(_Convolution(weight, input.shape, *how, groups), input)
    return result if bias is None else result + bias.view(-1, *[1] * dims)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    constants = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if training or running_mean is None or running_var is None or any(t.requires_grad for t in constants):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt() if weight is None else weight * (running_var + eps).rsqrt()
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (-1, *[1] * (input.ndim - 2))
    return input * scale.view(shape) + shift.view(shape)
