"""What a closure asks of autograd: the tensors that it calls ``backward`` on are its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diagnostics.autograd.kernels import without_saved_tensor_hooks
from diagnostics.autograd.tape import passes_through
from hessopt.errors import ClosureError


class BackwardCalls(TorchFunctionMode):
    """Notes calls of autograd while watching (:meth:`watch`), and makes ``backward`` keep the tape or do nothing.

    Args:
        keep_tapes: Make ``backward`` retain the tape, whatever the caller asked for, and keep it with :attr:`terms`.
        swallow_for: Make ``backward`` do nothing but give these parameters a zero ``.grad`` where they have none.

    Attributes:
        called: ``backward`` was called.
        terms: What it was called on, one tensor without dimensions for each; what is done to the originals in place
            afterwards does not reach them.
        roots: What it was called on, as it was.
        hidden: Shapes of what it was called on with ``gradient=``, weights that hide the loss behind them, and of
            gradient edges, which have no value.
        inputs: For each call with ``inputs=``, the ids of what it accumulates into.
        derivatives: ``torch.autograd.grad`` was called.
    """

    def __init__(self, *, keep_tapes: bool = False, swallow_for: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._keep_tapes = keep_tapes
        self._swallow_for = swallow_for
        self._inside = False
        self.called = False
        self.terms: list[Tensor] = []
        self.roots: list[Any] = []
        self.hidden: list[tuple[int, ...]] = []
        self.inputs: list[set[int]] = []
        self.derivatives = False

    def watch(self, stack: ExitStack) -> None:
        """Watch until the stack is left."""
        stack.enter_context(self)
        if not _DISPATCHES_BACKWARD:
            original = torch.autograd.backward
            stack.callback(setattr, torch.autograd, "backward", original)
            torch.autograd.backward = lambda *args, **kwargs: self.__torch_function__(original, (), args, kwargs)

    @property
    def loss(self) -> Tensor:
        """The sum of the terms, without dimensions."""
        first, *rest = self.terms
        return sum((term.to(first.device) for term in rest), first)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:  # what backward() itself calls
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            self.derivatives = True
        elif func in _BACKWARD:
            bound = inspect.signature(func).bind(*args, **kwargs)
            self.called = True
            self._note(bound.arguments)
            if self._swallow_for is not None:
                for p in self._swallow_for:
                    if p.grad is None and p.requires_grad:
                        p.grad = torch.zeros_like(p)
                return None
            if self._keep_tapes:
                bound.arguments["retain_graph"] = True
            self._inside = True
            try:
                return func(*bound.args, **bound.kwargs)
            finally:
                self._inside = False
        elif func is _UNSCALE and self._swallow_for is None:
            # GradScaler.unscale_: what is in .grad belongs to the loss without the scale.
            scale = args[2].detach()
            with torch.set_grad_enabled(self._keep_tapes):
                self.terms = [term * scale.to(term.device, term.dtype) for term in self.terms]
        return func(*args, **kwargs)

    def _note(self, call: dict[str, Any]) -> None:
        """Take down what one call of ``backward`` is of."""
        tensors = _listed(call["tensors"] if "tensors" in call else call["self"])
        weights = call.get("gradient", call.get("grad_tensors"))
        weights = [None] * len(tensors) if weights is None else _listed(weights)
        self.roots += tensors
        for tensor, weight in zip(tensors, weights, strict=False):
            if not isinstance(tensor, Tensor) or tensor.numel() != 1:
                self.hidden.append(tuple(tensor.shape) if isinstance(tensor, Tensor) else ())
                continue
            with torch.set_grad_enabled(self._keep_tapes):
                term = tensor if self._keep_tapes else tensor.detach()
                term = term.reshape(())
                self.terms.append(term.clone() if weight is None else term * weight.detach().reshape(()))
        inputs = call.get("inputs")
        if inputs is not None:
            self.inputs.append({id(t) for t in _listed(inputs)})


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, Tensor) else [value]


def _dispatches_backward() -> bool:
    """Whether modes see calls of ``torch.autograd.backward``; up to torch 2.9 at least they do not."""
    calls = BackwardCalls()
    with calls:
        torch.autograd.backward(torch.zeros((), requires_grad=True))
    return calls.called


_BACKWARD = (Tensor.backward, torch.autograd.backward)
_UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_
_DISPATCHES_BACKWARD = _dispatches_backward()


def without_recomputation() -> AbstractContextManager[None]:
    """Refuse what replaces the tensors that a closure's tape saves, as checkpointing does.

    Raises:
        ClosureError: the closure uses it.
    """
    return without_saved_tensor_hooks(_RECOMPUTES, ClosureError)


def gradients_of(loss: Tensor, parameters: Sequence[Tensor], *, retain_graph: bool) -> list[Tensor | None]:
    """Derivatives of the loss, None where it does not depend on a parameter.

    Raises:
        ClosureError: reentrant checkpointing hides a parameter.
    """
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain_graph)
    if any(g is None for g in found):
        refuse_reentrant(loss)
    return list(found)


def refuse_reentrant(*tapes: Tensor) -> None:
    """Raise a ClosureError if a tape has a reentrant checkpoint: for derivatives by name it ends there, in silence.

    It walks the tape, so it is for those cases where a derivative has come out as none at all.
    """
    if any(passes_through(tape, "CheckpointFunctionBackward") for tape in tapes):
        raise ClosureError(
            "the closure uses reentrant checkpointing (torch.utils.checkpoint with use_reentrant=True), behind which "
            "derivatives with respect to parameters do not reach. Turn it off for this optimizer "
            "(model.gradient_checkpointing_disable() in transformers)."
        )


_RECOMPUTES = (
    "the closure uses torch.utils.checkpoint or other saved-tensor hooks, which would run parts of the network again "
    "at every product with its curvature. Turn them off for this optimizer (model.gradient_checkpointing_disable() in "
    "transformers)."
)
