"""Every use of the trained parameters in one run of a closure, derivatives taken inside the closure included."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, eq=False)
class LinearUse:
    """``y = x Wᵀ + b``, or, in the derivative of one with respect to its input, ``h = g W``.

    Attributes:
        result: y or h, ``(…, d)``, on the tape.
        operand: x or g, as it entered.
        weight: W, ``(d_out, d_in)``, trained or not.
        bias: b or None.
        derivative: It is ``g W``: row i of the operand belongs to the left of W.
        forward: It is a call of the network, not part of a derivative; only those define the graph of layers.
    """

    result: Tensor
    operand: Tensor
    weight: Tensor
    bias: Tensor | None
    derivative: bool = False
    forward: bool = True

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What enters besides the operand."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors that the network's data comes in by."""
        return (self.operand,)


@dataclass(frozen=True, eq=False)
class CallUse:
    """Any other function of PyTorch that a trained parameter is passed to.

    Attributes:
        result: What it returned, on the tape.
        function: The function.
        args: As it was called.
        kwargs: As it was called.
        parameters: The trained parameters among the arguments.
    """

    result: Tensor
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[Tensor, ...]
    forward: bool = True

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors that the network's data comes in by."""
        leaves = tree_leaves((self.args, self.kwargs))
        return tuple(t for t in leaves if isinstance(t, Tensor) and all(t is not p for p in self.parameters))


Use = LinearUse | CallUse


class UseRecorder(TorchFunctionMode):
    """Records what the trained parameters are used for; the closure computes the same numbers as without.

    A linear layer is replaced by an autograd function whose derivatives are made of linear layers again, so that a
    closure that differentiates the network (``create_graph=True``, to any order) shows every use of the weights. Any
    other function is seen where it is called; its uses in derivatives, in ``torch.func`` transforms and in
    operators in place are not, which whoever builds on this must check (:mod:`hessopt.factors.layer_factors` does).

    Args:
        trained: The trained parameters.

    Attributes:
        uses: In the order of execution.
    """

    def __init__(self, trained: Collection[Tensor]) -> None:
        super().__init__()
        self._trained = set(trained)
        self.uses: list[Use] = []
        self._active = False

    def forget(self) -> None:
        """Drop the uses. They hold the tape, whose functions hold this recorder: nothing else would free them."""
        self.uses = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record uses while the context lasts."""
        self.uses, self._active = [], True
        try:
            with self:
                yield
        finally:
            self._active = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = _leaves((*args, *kwargs.values()))
        used = dict.fromkeys(t for t in leaves if isinstance(t, Tensor) and t.requires_grad and t in self._trained)
        if not used or not torch.is_grad_enabled() or _transformed():
            return func(*args, **kwargs)
        if func is functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if x not in self._trained and x.ndim >= 2:
                if _plain(x, weight):
                    y = self.rows(x, weight, bias)
                else:
                    y = func(*args, **kwargs)
                    self.uses.append(LinearUse(y, x, weight, bias))
                # A clone, so that an operation in place downstream does not change the recorded tensor's tape.
                return y.clone()
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.grad_fn is None or any(result is t for t in leaves):
            return result
        self.uses.append(CallUse(result, func, args, kwargs, tuple(used)))
        return result.clone()

    def rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, forward: bool = True) -> Tensor:
        """``x Wᵀ + b``, recorded."""
        y: Tensor = _Rows.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        if self._active:
            self.uses.append(LinearUse(y, x, weight, bias, forward=forward))
        return y

    def columns(self, g: Tensor, weight: Tensor) -> Tensor:
        """``g W``, recorded."""
        h: Tensor = _Columns.apply(g, weight, self)  # type: ignore[no-untyped-call]
        if self._active:
            self.uses.append(LinearUse(h, g, weight, None, derivative=True, forward=False))
        return h


class _Rows(torch.autograd.Function):
    """``x Wᵀ + b``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recorder: UseRecorder) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder = recorder
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        # Where no derivative of the derivative can be asked for, plain products will do (and work under vmap).
        through_x = (ctx.recorder.columns(g, weight) if torch.is_grad_enabled() else g @ weight) if needs_x else None
        rows = g.reshape(-1, g.shape[-1])
        through_weight = rows.mT @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return through_x, through_weight, rows.sum(dim=0) if needs_bias else None, None


class _Columns(torch.autograd.Function):
    """``g W``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, recorder: UseRecorder) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.recorder = recorder
        return g @ weight

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        needs_g, needs_weight, _ = ctx.needs_input_grad
        through_g = None
        if needs_g:
            on_tape = torch.is_grad_enabled()
            through_g = ctx.recorder.rows(v, weight, None, forward=False) if on_tape else v @ weight.mT
        rows = g.reshape(-1, g.shape[-1])
        return through_g, rows.mT @ v.reshape(-1, v.shape[-1]) if needs_weight else None, None


def _leaves(values: Iterable[Any]) -> list[Any]:
    """``tree_leaves``, which takes a third of a small step's time, for those few types that most arguments are of."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _LEAVES:
            found.append(value)
        else:
            found += _leaves(value) if kind in (tuple, list) else tree_leaves(value)
    return found


_LEAVES = frozenset([Tensor, Parameter, int, float, bool, str, type(None), slice, torch.dtype, torch.device])


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Without the changes of dtype of autocast, which the derivative would have to repeat."""
    return x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)


def _transformed() -> bool:
    """Inside of a ``torch.func`` transform or forward-mode differentiation, whose tensors are not those of the tape."""
    return bool(torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0)
