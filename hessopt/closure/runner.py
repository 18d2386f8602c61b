"""Runs of a closure: one for the gradient, and trials at other parameters that leave no trace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.autograd.kernels import CompositeKernels, twice_differentiable
from diagnostics.ranks.collectives import Ranks
from hessopt.closure.all_or_nothing import AllOrNothing
from hessopt.closure.backward_calls import BackwardCalls, without_recomputation
from hessopt.closure.protocol import Closure, Evaluation
from hessopt.closure.result import (
    ClosureResult,
    LeastSquares,
    check_loss,
    loss_of,
    number_of,
    on_tape,
    opened,
    returned_loss,
    without_tape,
)
from hessopt.errors import ClosureError


class ClosureRunner:
    """Runs the closure of one optimizer step: once for the gradient, then at any number of trial parameters.

    A trial evaluation sees what the first run saw — the same state of the random number generators (CPU and the
    devices that hold parameters or buffers), the same buffers of the module — and leaves nothing behind: afterwards
    random state, buffers (batch-norm statistics) and every ``.grad`` are as the first run left them, whether the
    closure calls ``zero_grad`` and ``backward`` or not. An explicit :class:`torch.Generator` and the generators of
    Python and NumPy are the closure's own business.

    Args:
        closure: See :mod:`hessopt.closure.protocol`.
        parameters: The optimizer's parameters.
        module: The network, if the optimizer knows it: its outputs are recorded and its buffers are protected.
        tape: The loss's tape is needed after a closure that calls ``backward``. Without, that call frees its tape.
        twice_differentiable: The loss will be differentiated twice: every run, trials too, uses kernels that can be
            (:func:`diagnostics.autograd.kernels.twice_differentiable`), and checkpointing is refused.
        no_backward: What is wrong with a closure that calls ``backward()``, if it must not.
        ranks: The processes that train the network, all of which run the same runs. Losses are then means over them,
            and a run that fails in one of them has a loss that is not a number in the others.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Iterable[Tensor],
        module: nn.Module | None = None,
        *,
        tape: bool = True,
        twice_differentiable: bool = False,
        no_backward: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.closure = closure
        self._no_backward = no_backward
        self._ranks = Ranks() if ranks is None else ranks
        self._tape = tape
        self._twice = twice_differentiable
        self.parameters = list(parameters)
        self.module = module
        # The closure's zero_grad() may be the module's, which knows more parameters than the optimizer.
        self._protected = list(dict.fromkeys([*self.parameters, *(() if module is None else module.parameters())]))
        self.runs = 0
        self._before: _Surroundings | None = None
        self._derives = False
        self._first: tuple[float, object] | None = None

    def evaluate(self) -> Evaluation:
        """Run the closure with gradients enabled and keep its tape.

        Raises:
            ClosureError: the closure returned something that is no loss, or a loss that cannot be differentiated or
                is not finite, or called ``backward`` and left no gradient behind, or uses checkpointing where the loss
                is differentiated twice.
        """
        if self._ranks.size == 1:
            return self._evaluate()
        with self._told():
            found = self._evaluate()
        mean = self._mean(found.loss.item())
        if not math.isfinite(mean):
            raise ClosureError(
                "the closure's loss is not finite in another process, or its run failed there: its error says why. The "
                "parameters were left as they are."
            )
        return replace(found, mean=torch.full_like(found.loss.detach(), mean))

    def _evaluate(self) -> Evaluation:
        self._before = self._surroundings()
        calls = BackwardCalls(keep_tapes=self._tape)
        recorder = _OutputRecorder(self.module)
        try:
            # An interrupt at the end of a context leaves it entered.
            with AllOrNothing(), ExitStack() as stack:
                if self._twice:
                    stack.enter_context(without_recomputation())
                    stack.enter_context(twice_differentiable())
                    stack.enter_context(CompositeKernels())
                stack.enter_context(torch.enable_grad())
                recorder.attach()
                calls.watch(stack)
                returned = opened(self.closure())
            recorder.remove()
        except BaseException:
            recorder.remove()
            raise
        outputs = recorder.outputs
        self.runs += 1
        if calls.called and self._no_backward is not None:
            raise ClosureError(self._no_backward)
        self._derives = calls.derivatives
        with torch.enable_grad():
            loss, result = self._loss_of(calls, returned)
        value = check_loss(loss, outputs, differentiable=self._tape or not calls.called)
        if calls.called and all(p.grad is None for p in self.parameters):
            raise ClosureError(
                "the closure called backward(), but left every .grad of the optimizer's parameters empty. Call "
                "zero_grad() before backward(), not after it, or leave both out; and call it on a loss that depends on "
                "them."
            )
        self._first = (value, without_tape(returned)) if calls.terms else None
        return Evaluation(loss, result, calls.called, outputs)

    def trial_loss(self) -> float:
        """Evaluate the loss at the parameters as they are now, leaving no trace; not finite is a valid answer.

        ``backward`` does nothing (it makes an empty ``.grad`` zero, so that code that clips gradients still runs).
        Gradients are disabled, unless the closure called ``torch.autograd.grad`` in :meth:`evaluate`, whose results
        may be part of the loss.

        Raises:
            ClosureError: the closure returned something that is no loss, or called ``backward`` in :meth:`evaluate` and
                does not now.
            RuntimeError: :meth:`evaluate` has not been called.
        """
        if self._ranks.size == 1:
            return self._trial_loss()
        with self._told():
            own = self._trial_loss()
        return self._mean(own)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """If a run fails here, the others, who wait for its loss, get one that is not a number."""
        try:
            yield
        except Exception:
            with suppress(RuntimeError):  # of another process that has ended
                self._mean(math.nan)
            raise

    def _mean(self, number: float) -> float:
        exchanged = torch.tensor([number], dtype=torch.float64, device=self.parameters[0].device)
        self._ranks.mean_([exchanged])
        return float(exchanged.item())

    def _trial_loss(self) -> float:
        if self._before is None:
            raise RuntimeError("call evaluate() before trial_loss(): it is what a trial evaluation repeats.")
        after = self._surroundings()
        gradients = [p.grad for p in self._protected]

        def give_back() -> None:
            for p, gradient in zip(self._protected, gradients, strict=True):
                p.grad = gradient
            after.restore()

        try:
            self._before.restore()
            for p in self._protected:
                # A stand-in: zero_grad() may drop it or overwrite it in place.
                p.grad = None if p.grad is None else p.grad.clone()
            calls = BackwardCalls(swallow_for=self._protected)
            with AllOrNothing(), ExitStack() as stack:
                if self._twice:
                    stack.enter_context(twice_differentiable())
                    stack.enter_context(CompositeKernels())
                stack.enter_context(torch.set_grad_enabled(self._derives))
                calls.watch(stack)
                returned = opened(self.closure())
            give_back()
        except BaseException:  # an interrupt in the middle of it, too
            give_back()
            raise
        self.runs += 1
        if self._first is None:
            return float(loss_of(returned).item())
        if calls.terms and not calls.hidden:
            return float(calls.loss.item())
        # `if loss.requires_grad: loss.backward()`: what is returned will do, if it was the loss before.
        loss, before = self._first
        number, same = number_of(without_tape(returned)), number_of(before)
        if number is None or same is None or abs(same - loss) > 1e-6 * abs(loss):
            raise ClosureError(
                "the closure called backward() in its first run and not in a trial, where gradients are disabled, and "
                "what it returns is not what backward() was called on. Call backward() in every run, or return the "
                "loss that it is called on."
            )
        return number

    def rewind(self) -> None:
        """Put random state and buffers back to what :meth:`evaluate` started from, as if it had not been.

        Operations in place on buffers end the use of its tape.
        """
        if self._before is not None:
            self._before.restore()

    def _loss_of(self, calls: BackwardCalls, returned: object) -> tuple[Tensor, ClosureResult]:
        """The loss of the first run, and what the closure returned in a form that has it."""
        if not calls.called:
            return returned_loss(returned)
        if self._tape:
            for inputs in calls.inputs:
                for i, p in enumerate(self.parameters):
                    if p.requires_grad and id(p) not in inputs:
                        raise ClosureError(
                            f"the closure called backward(inputs=…) without parameter {i}, of shape {tuple(p.shape)}: "
                            "what is in .grad is not the gradient that belongs to the loss. Leave out inputs=, or give "
                            "the optimizer those parameters alone."
                        )
        if calls.hidden:
            light = without_tape(returned)
            if number_of(light) is None or (self._tape and not on_tape(returned)):
                raise ClosureError(
                    f"the closure called backward() on a tensor of shape {calls.hidden[0]} with weights (gradient=…), "
                    "so the loss that these are the derivatives of is not known. Let the closure return that loss, on "
                    "its tape."
                )
            calls.terms = []
            if self._tape:
                return returned_loss(returned)
            loss = light.reshape(()) if isinstance(light, Tensor) else torch.tensor(number_of(light))
            return loss, loss
        loss = calls.loss
        if isinstance(returned, LeastSquares):
            own = returned.loss
            same = len(calls.roots) == 1 and calls.roots[0] is own
            if not (same or math.isclose(own.item(), loss.item(), rel_tol=1e-6) or not math.isfinite(loss.item())):
                raise ClosureError(
                    f"the closure returned LeastSquares of value {own.item():.6g} and called backward() on something "
                    f"else, of value {loss.item():.6g}. Call it on what is returned, or leave it out; for a mean, "
                    "scale the residuals."
                )
            return (own if self._tape else own.detach()), returned
        output = returned[1] if isinstance(returned, tuple) and len(returned) == 2 else None
        if isinstance(output, Tensor) and output.requires_grad:
            return loss, (loss, output)
        return loss, loss

    def _surroundings(self) -> _Surroundings:
        return _Surroundings(self.module, self._protected)


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


class _OutputRecorder:
    """A forward hook that records what ``module`` returns; tensors are handed on as clones."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self.outputs: list[Any] = []

    def attach(self) -> None:
        """Record from here on."""
        if self._module is not None:
            self._module.register_forward_hook(self)

    def remove(self) -> None:
        """Take the hook away, wherever it was interrupted when it was made."""
        hooks = {} if self._module is None else self._module._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Any:
        self.outputs.append(output)
        # If the closure changes the output in place (`output -= target`), only the clone's tape changes.
        return output.clone() if isinstance(output, Tensor) else None
