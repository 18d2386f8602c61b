"""Evaluate a model and its loss any number of times as one and the same function, leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diagnostics.autograd.custom_backwards import check_custom_backwards, custom_backwards
from diagnostics.autograd.kernels import (
    EXCLUSIVE,
    CompositeKernels,
    RandomState,
    plain_autograd,
    twice_differentiable,
    without_saved_tensor_hooks,
)
from diagnostics.autograd.loss_checks import (
    check_scalar_loss,
    check_tapes,
    check_unmodified,
    detached_output,
    floating_tensors,
)
from diagnostics.autograd.refusals import check_loss_fn, check_model, check_tensor
from diagnostics.autograd.second_order import second_order_errors
from diagnostics.autograd.substitution import run_model
from diagnostics.errors import CaptureError, StaleGraphError
from diagnostics.operators.data import Batch


class Replay:
    """The loss of a batch as a function of the parameters, with all else held fixed.

    Every run starts from the buffers as they were when this was made (batch-norm's running statistics, spectral
    normalisation's vectors) and leaves the model's own alone; :meth:`replayed` does the same for the global random
    state. Kernels are twice differentiable ones. Autocast is off: curvature is that of the network in the dtype of
    its parameters.

    Args:
        model: The network; eager, in float32 or float64.
        loss_fn: ``loss_fn(z, targets) -> scalar``.
        device: Of the parameters; batches are moved there.

    Attributes:
        made_bytes: Bytes of the tensors that the forward pass of the last batch made.
        verified: Whether the gradient of a batch was found to be on the tape; for the tape's own use.

    Raises:
        CaptureError: the model or the loss is scripted or compiled, or cannot be differentiated twice otherwise.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], device: torch.device) -> None:
        check_loss_fn(loss_fn, "z", "targets")
        if hasattr(loss_fn, "_torchdynamo_orig_callable"):
            raise CaptureError(
                "the loss function is compiled (torch.compile): compiled code has no second derivative. Pass the "
                "original function."
            )
        self.model = model
        self.loss_fn = loss_fn
        self.device = device
        self.made_bytes = 0
        self.verified = False
        self._compared = False
        self.refresh()

    def refresh(self) -> None:
        """Take the network, its buffers and the global random state as they are now."""
        check_model(self.model)
        if isinstance(self.loss_fn, nn.Module):
            check_model(self.loss_fn)
        with EXCLUSIVE, plain_autograd():
            self._buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
            self._parameters = {name: (p, p._version, p.data_ptr()) for name, p in self.model.named_parameters()}
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._random_state = RandomState([*self.model.parameters(), *self.model.buffers()])

    def check_fresh(self) -> None:
        """Raise :class:`diagnostics.StaleGraphError` if parameters or modes are no longer those that were taken."""
        for name, (parameter, version, address) in self._parameters.items():
            if parameter._version != version or parameter.data_ptr() != address:
                raise StaleGraphError(
                    f"parameter {name!r} was changed after the operator was made (an optimizer step?), and the "
                    "operator is that of the network as it was. Call its refresh() to move it to the present "
                    "parameters, or make a new one."
                )
        switched = [module for module, mode in self._modes if module.training != mode]
        if switched:
            name = next(name for name, module in self.model.named_modules() if module is switched[0])
            raise StaleGraphError(
                f"module {name or type(self.model).__name__!r} was switched by train() or eval() after the operator "
                "was made. Switch it back, or call the operator's refresh()."
            )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from the random state that was taken; restore on exit what was there on entry."""
        with self._random_state.replayed():
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record an autograd tape that can be differentiated again."""
        with ExitStack() as stack:
            stack.enter_context(EXCLUSIVE)
            stack.enter_context(differentiating(self.device))
            stack.enter_context(twice_differentiable())
            stack.enter_context(without_saved_tensor_hooks())
            stack.enter_context(CompositeKernels())
            yield

    def output(self, batch: Batch) -> Any:
        """The model's output, checked."""
        replaced = [
            n for n, p in self.model.named_parameters() if n not in self._parameters or p is not self._parameters[n][0]
        ]
        if replaced:
            raise StaleGraphError(
                f"parameter {replaced[0]!r} was replaced by another tensor after the operator was made: make a new one."
            )
        with _MadeBytes() as made:
            z = run_model(self.model, batch.inputs, self._copied_buffers())
        self.made_bytes = made.count
        floating = floating_tensors(z)
        for tensor in floating:
            check_tensor(tensor, "the model's output")
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in floating):
            raise detached_output("the model's output", "its parameters")
        self._check_unmodified()
        check_tapes(("the model's output", tensor) for tensor in floating)
        return z

    def loss(self, z: Any, batch: Batch) -> Tensor:
        """The loss of the output, checked."""
        loss = self.loss_fn(z, batch.targets)
        check_scalar_loss(
            loss, self._values().items(), lambda: (("the model's output", t) for t in floating_tensors(z))
        )
        self._check_unmodified()
        check_tapes([("the loss", loss)])
        return loss.reshape(())

    def value(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> float:
        """The loss of the batch, not checked, with some parameters replaced by these; may be not finite."""
        private = batch.private(self.device)
        z = run_model(self.model, private.inputs, {**self._copied_buffers(), **(parameters or {})})
        return float(self.loss_fn(z, private.targets).detach())

    def check_custom_backwards(self, batch: Batch, ends: Sequence[Tensor]) -> None:
        """Hold backward passes that are not PyTorch's own, on the tapes of ``ends``, against differences; once.

        Raises:
            DiagnosticsError: one of them keeps a part of the second derivative off the tape.
        """
        if self._compared:
            return
        if custom_backwards(ends):
            with second_order_errors():
                check_custom_backwards(lambda values: self._run_at(values, batch), list(self._values().values()))
        self._compared = True

    def _run_at(self, values: Sequence[Tensor], batch: Batch) -> tuple[list[Tensor], Tensor]:
        own = batch.private(self.device)
        replaced = {**self._copied_buffers(), **dict(zip(self._values(), values, strict=True))}
        with self.replayed(), self.recording():
            z = run_model(self.model, own.inputs, replaced)
            outputs = [t for t in floating_tensors(z) if t.requires_grad]
            return outputs, self.loss_fn(z, own.targets)

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter for name, (parameter, _, _) in self._parameters.items()}

    def changed_buffers(self, batch: Batch) -> list[str]:
        """Names of the buffers that a forward pass changes."""
        copies = self._copied_buffers()
        with self.replayed(), self.recording():
            run_model(self.model, batch.private(self.device).inputs, copies)
        return [name for name, copy in copies.items() if not torch.equal(copy, self._buffers[name])]

    def _copied_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self._buffers.items()}

    def _check_unmodified(self) -> None:
        check_unmodified((name, parameter, version) for name, (parameter, version, _) in self._parameters.items())


@contextmanager
def differentiating(device: torch.device) -> Iterator[None]:
    """Differentiate in the dtype of the tensors, whatever the caller's autocast or inference mode says."""
    with plain_autograd(), torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def along_the_tape(device: torch.device) -> AbstractContextManager[None]:
    """The same for passes over a recorded tape; entering it costs nothing where nothing is to be switched."""
    switched = torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu")
    return differentiating(device) if switched or torch.is_autocast_enabled(device.type) else nullcontext()


class _MadeBytes(TorchFunctionMode):
    """Counts the bytes of the floating-point tensors that operations return: about what a tape saves."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            self.count += result.numel() * result.element_size()
        return result
