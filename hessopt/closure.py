"""The closure protocol: how one optimizer step obtains loss, output and gradient, and tries other parameters.

``closure()`` evaluates the loss on the batch of this step. It may call ``zero_grad()`` and ``backward()`` itself, as
closures of :mod:`torch.optim` do, or leave them out. It returns

- the loss, a tensor with one element; or
- ``(loss, output)``, where the loss is a function of ``output`` alone; or
- a :class:`LeastSquares`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diagnostics.backends import second_order_kernels
from hessopt.errors import ClosureError


class LeastSquares:
    """The loss ``½ Σ r²`` of residuals ``r``, for a closure to return.

    There is no 1/N in it: for a mean-squared objective over N residuals pass ``r * (2 / N) ** 0.5``.

    Args:
        residuals: Tensor of any shape; the optimizers that need samples expect ``(B, …)``.

    Attributes:
        residuals: What was passed.
        loss: ``½ Σ r²``, a tensor without dimensions.

    Example:
        >>> LeastSquares(torch.tensor([3.0, 4.0])).loss
        tensor(12.5000)
    """

    def __init__(self, residuals: Tensor) -> None:
        if not isinstance(residuals, Tensor):
            raise TypeError(f"LeastSquares takes a tensor of residuals, got {type(residuals).__name__}.")
        self.residuals = residuals
        self.loss: Tensor = residuals.square().sum() / 2

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Call ``loss.backward`` with the same arguments."""
        # Through the tensor, so that a TorchFunctionMode sees the call.
        self.loss.backward(*args, **kwargs)

    def item(self) -> float:
        """The loss as a number."""
        return float(self.loss.item())

    def __repr__(self) -> str:
        return f"LeastSquares(residuals of shape {tuple(self.residuals.shape)})"


ClosureResult: TypeAlias = "Tensor | tuple[Tensor, Tensor] | LeastSquares"
Closure: TypeAlias = Callable[[], ClosureResult]


@dataclass(frozen=True)
class Evaluation:
    """What one run of the closure gave.

    Attributes:
        loss: The loss, without dimensions, on the autograd tape, which is still there.
        result: What the closure returned.
        backward_called: The closure called ``backward``; the gradient is then in the parameters' ``.grad``.
        outputs: What the module returned, once for each of its calls.
    """

    loss: Tensor
    result: ClosureResult
    backward_called: bool
    outputs: list[Any] = field(default_factory=list)

    @property
    def is_least_squares(self) -> bool:
        """The closure returned a :class:`LeastSquares`; :attr:`output` is then its residuals."""
        return isinstance(self.result, LeastSquares)

    @property
    def output(self) -> Tensor:
        """The tensor that the loss is a function of: residuals, or the closure's output, or the module's.

        Raises:
            ClosureError: the closure gave none and the module was not called exactly once, or returned no tensor.
        """
        if isinstance(self.result, LeastSquares):
            return self.result.residuals
        if isinstance(self.result, tuple):
            return self.result[1]
        way_out = (
            "Let the closure return `(loss, output)`, with the tensor that the loss is computed from, or "
            "`hessopt.LeastSquares(residuals)`."
        )
        if len(self.outputs) != 1:
            raise ClosureError(
                f"the closure called the module {len(self.outputs)} times, so its output is not known. {way_out}"
            )
        if not isinstance(self.outputs[0], Tensor):
            raise ClosureError(f"the module returned {_kind(self.outputs[0])}, not a tensor. {way_out}")
        return self.outputs[0]


class ClosureRunner:
    """Runs the closure of one optimizer step: once for the gradient, then at any number of trial parameters.

    A trial evaluation sees what the first run saw — the same state of the random number generators (CPU and the
    devices that hold parameters or buffers), the same buffers of the module — and leaves nothing behind: afterwards
    random state, buffers (batch-norm statistics) and every ``.grad`` are as the first run left them, whether the
    closure calls ``zero_grad`` and ``backward`` or not. An explicit :class:`torch.Generator` and the generators of
    Python and NumPy are the closure's own business.

    Args:
        closure: See the module's documentation.
        parameters: The optimizer's parameters.
        module: The network, if the optimizer knows it: its outputs are recorded and its buffers are protected.
        twice_differentiable: The loss will be differentiated twice: every run, trials too, uses kernels that can be
            (:func:`diagnostics.backends.second_order_kernels`).
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Iterable[Tensor],
        module: nn.Module | None = None,
        *,
        twice_differentiable: bool = False,
    ) -> None:
        self.closure = closure
        self._kernels = second_order_kernels if twice_differentiable else nullcontext
        self.parameters = list(parameters)
        self.module = module
        # The closure's zero_grad() may be the module's, which knows more parameters than the optimizer.
        self._protected = list(dict.fromkeys([*self.parameters, *(() if module is None else module.parameters())]))
        self.runs = 0
        self._before: _Surroundings | None = None
        self._derives = False

    def evaluate(self) -> Evaluation:
        """Run the closure with gradients enabled and keep its tape.

        Raises:
            ClosureError: the closure returned something that is no loss, or a loss that cannot be differentiated or
                is not finite, or called ``backward`` and left no gradient behind.
        """
        self._before = self._surroundings()
        calls = _AutogradCalls(retain_graph=True)
        with self._kernels(), torch.enable_grad(), _outputs_of(self.module) as outputs, calls.watching():
            result = self.closure()
            loss = _loss_of(result).reshape(())
        self.runs += 1
        self._derives = calls.derivatives
        _check_differentiable(loss)
        if calls.backward and all(p.grad is None for p in self.parameters):
            raise ClosureError(
                "the closure called backward(), but left every .grad of the optimizer's parameters empty. Call "
                "zero_grad() before backward(), not after it, or leave both out."
            )
        return Evaluation(loss, result, calls.backward, outputs)

    def trial_loss(self) -> float:
        """Evaluate the loss at the parameters as they are now, leaving no trace; not finite is a valid answer.

        ``backward`` does nothing (it makes an empty ``.grad`` zero, so that code that clips gradients still runs).
        Gradients are disabled, unless the closure called ``torch.autograd.grad`` in :meth:`evaluate`, whose results
        may be part of the loss.

        Raises:
            ClosureError: the closure returned something that is no loss.
            RuntimeError: :meth:`evaluate` has not been called.
        """
        if self._before is None:
            raise RuntimeError("call evaluate() before trial_loss(): it is what a trial evaluation repeats.")
        after = self._surroundings()
        gradients = [p.grad for p in self._protected]
        try:
            self._before.restore()
            for p in self._protected:
                # A stand-in: zero_grad() may drop it or overwrite it in place.
                p.grad = None if p.grad is None else p.grad.clone()
            calls = _AutogradCalls(swallow_for=self._protected)
            with self._kernels(), torch.set_grad_enabled(self._derives), calls.watching():
                result = self.closure()
        finally:
            for p, gradient in zip(self._protected, gradients, strict=True):
                p.grad = gradient
            after.restore()
        self.runs += 1
        return float(_loss_of(result).item())

    def rewind(self) -> None:
        """Put random state and buffers back to what :meth:`evaluate` started from, as if it had not been.

        Operations in place on buffers end the use of its tape.
        """
        if self._before is not None:
            self._before.restore()

    def _surroundings(self) -> _Surroundings:
        return _Surroundings(self.module, self._protected)


class _AutogradCalls(TorchFunctionMode):
    """Notes calls of autograd, and makes ``backward`` keep the tape or do nothing, while :meth:`watching`.

    Args:
        retain_graph: Make ``backward`` retain the tape, whatever the caller asked for.
        swallow_for: Make ``backward`` do nothing but give these parameters a zero ``.grad`` where they have none.
    """

    def __init__(self, *, retain_graph: bool = False, swallow_for: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.retain_graph = retain_graph
        self.swallow_for = swallow_for
        self.backward = False
        self.derivatives = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs inside this context."""
        original = torch.autograd.backward
        with self:
            if not _DISPATCHES_BACKWARD:
                torch.autograd.backward = lambda *args, **kwargs: self.__torch_function__(original, (), args, kwargs)
            try:
                yield
            finally:
                torch.autograd.backward = original

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            self.derivatives = True
        elif func in _BACKWARD:
            self.backward = True
            if self.swallow_for is not None:
                for p in self.swallow_for:
                    if p.grad is None and p.requires_grad:
                        p.grad = torch.zeros_like(p)
                return None
            if self.retain_graph:
                bound = inspect.signature(func).bind(*args, **kwargs)
                bound.arguments["retain_graph"] = True
                args, kwargs = bound.args, bound.kwargs
        return func(*args, **kwargs)


def _dispatches_backward() -> bool:
    """Whether modes see calls of ``torch.autograd.backward``; up to torch 2.9 at least they do not."""
    calls = _AutogradCalls()
    with calls:
        torch.autograd.backward(torch.zeros((), requires_grad=True))
    return calls.backward


_BACKWARD = (Tensor.backward, torch.autograd.backward)
_DISPATCHES_BACKWARD = _dispatches_backward()


class _Surroundings:
    """Snapshot of what a run of the closure can change besides gradients: random state and the module's buffers."""

    def __init__(self, module: nn.Module | None, parameters: Sequence[Tensor]) -> None:
        self.modules = [] if module is None else list(module.modules())
        # Object and value: a forward pass may change a buffer in place or put another tensor in its place.
        self.buffers = [{name: (b, _copy(b)) for name, b in m._buffers.items()} for m in self.modules]
        tensors = [*parameters, *(b for buffers in self.buffers for b, _ in buffers.values() if b is not None)]
        self.devices = sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)
        self.cpu_random = torch.get_rng_state()
        self.device_random = [torch.get_device_module(d).get_rng_state(d) for d in self.devices]

    @torch.no_grad()
    def restore(self) -> None:
        torch.set_rng_state(self.cpu_random)
        for device, state in zip(self.devices, self.device_random, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        for module, buffers in zip(self.modules, self.buffers, strict=True):
            for name, (buffer, value) in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


@contextmanager
def _outputs_of(module: nn.Module | None) -> Iterator[list[Any]]:
    """Record what ``module`` returns; tensors are handed on as clones."""
    outputs: list[Any] = []

    def record(_: nn.Module, __: Any, output: Any) -> Any:
        outputs.append(output)
        # If the closure changes the output in place (`output -= target`), only the clone's tape changes.
        return output.clone() if isinstance(output, Tensor) else None

    with ExitStack() as stack:
        if module is not None:
            stack.callback(module.register_forward_hook(record).remove)
        yield outputs


def _loss_of(result: object) -> Tensor:
    """The loss in what a closure returned, with one element."""
    if isinstance(result, LeastSquares):
        return result.loss
    loss = result
    if isinstance(result, tuple):
        if len(result) != 2 or not all(isinstance(part, Tensor) for part in result):
            raise ClosureError(
                f"the closure returned a tuple of {', '.join(map(_kind, result)) or 'nothing'}. Return `loss` or "
                "`(loss, output)`, both tensors."
            )
        loss = result[0]
    if loss is None:
        raise ClosureError("the closure returned None. End it with `return loss`.")
    if isinstance(loss, (float, int)):
        raise ClosureError(
            f"the closure returned the number {loss}, which has no autograd tape. Return the tensor: `return loss`, "
            "not `return loss.item()`."
        )
    if not isinstance(loss, Tensor):
        raise ClosureError(
            f"the closure returned {_kind(loss)}. Return the loss tensor, `(loss, output)` or "
            "`hessopt.LeastSquares(residuals)`."
        )
    if loss.numel() != 1:
        raise ClosureError(
            f"the closure returned a loss of shape {tuple(loss.shape)}. Reduce it to one number, e.g. with `.mean()`; "
            "residuals go into `hessopt.LeastSquares(residuals)`."
        )
    return loss


def _check_differentiable(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ClosureError(
            "the closure's loss has no autograd tape. Return it without `.detach()` and compute it outside of "
            "`torch.no_grad()` and `torch.inference_mode()`; at least one parameter must require grad."
        )
    if loss.is_complex():
        raise ClosureError("the closure's loss is complex. Return a real number, e.g. `loss.abs().square()`.")
    if not math.isfinite(loss.item()):
        raise ClosureError(
            f"the closure's loss is {loss.item()} at the current parameters, which were left as they are. Check the "
            "batch and the initialisation; torch.autograd.set_detect_anomaly(True) finds the operation."
        )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
